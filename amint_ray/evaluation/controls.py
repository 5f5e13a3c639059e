"""Figures of the controls: what must come to nothing if membership figures mean something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable
from amint_ray.evaluation import metrics
from amint_ray.evaluation.calibration import threshold_at
from amint_ray.evaluation.metrics import Interval
from amint_ray.evaluation.report import blank

Names = npt.NDArray[np.str_]
Scores = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

QUESTIONS = (Role.MEMBER, Role.WITHHELD)


def plain_figures(
    table: ScoreTable, right: Mapping[str, float], config: Evaluation
) -> dict[str, Any]:
    """What the MINT head costs the task: this model against the same recipe with λ₂ = 0.

    Args:
        table: this model's scores.
        right: by sample id, 1 where the other one's prediction is the label; NaN: not known.
        config: confidence.

    Returns:
        `accuracy`, `plain_accuracy` and `difference` (the first less the second) on the images of
        `test` of which both are known, and `n`.
    """
    test = table.of(Role.TEST)
    other = np.array([right.get(name, np.nan) for name in test.sample_id.tolist()], np.float64)
    known = np.isfinite(other)
    ours = (test.prediction == test.label)[known]
    theirs = other[known] > 0
    n, confidence = int(known.sum()), config.confidence
    return {
        "accuracy": metrics.proportion(int(ours.sum()), n, confidence=confidence).as_dict(),
        "plain_accuracy": metrics.proportion(int(theirs.sum()), n, confidence=confidence).as_dict(),
        "difference": metrics.proportion_difference(ours, theirs, confidence=confidence).as_dict(),
        "n": n,
    }


def blind_figures(role: Names, scores: Scores, config: Evaluation) -> dict[str, Any]:
    """How well a classifier that never sees the model tells D from `test`.

    Args:
        role: (n,) `Role` values.
        scores: (n,) its scores; NaN where there is none.
        config: confidence.

    Returns:
        The AUC of `member` and of `withheld` against `test`, and `clean`: whether neither's lower
        limit is above 0.5 (None: neither is known).
    """
    scored = np.isfinite(scores)
    negatives = scores[scored & (role == Role.TEST.value)]
    found = {
        each.value: metrics.auc(
            scores[scored & (role == each.value)], negatives, confidence=config.confidence
        )
        for each in QUESTIONS
    }
    lows = [area.low for area in found.values() if area.low is not None]
    clean = max(lows) <= 0.5 if lows else None
    return {**{name: area.as_dict() for name, area in found.items()}, "clean": clean}


def stranger_figures(
    table: ScoreTable, logits: Mapping[str, Scores], config: Evaluation
) -> dict[str, Any]:
    """How often images unlike those the model knows are accused.

    The threshold holds what it promises for images like those of `calibration`, and for no others.

    Args:
        table: the scores, which the threshold comes from.
        logits: by kind (k,) the MINT head's.
        config: levels and confidence.

    Returns:
        By kind `realised_fpr` at the calibrated threshold, and `n`.
    """
    threshold = threshold_at(config.threshold_fpr, table.of(Role.CALIBRATION).mint_logit)
    found = {}
    for kind, scores in logits.items():
        if threshold is None:
            rate = Interval.unknown("too few calibration images for a threshold")
        else:
            accused = int((scores > threshold).sum())
            rate = metrics.proportion(accused, len(scores), confidence=config.confidence)
        found[kind] = {"realised_fpr": rate.as_dict(), "n": len(scores)}
    return found


def duplicate_figures(
    table: ScoreTable,
    sample_id: Names,
    role: npt.NDArray[np.int64],
    pairs: npt.NDArray[np.int64],
    near: Mask,
    config: Evaluation,
    *,
    head_trained: bool,
) -> dict[str, Any]:
    """How much of the figures could come from near-duplicates that have different roles.

    Args:
        table: the scores.
        sample_id: (n,) of the images that were compared.
        role: (n,) places in `list(Role)`.
        pairs: (roles, roles) pairs of near-duplicates.
        near: (n, roles) whether an image has one in that role.
        config: confidence.
        head_trained: False where λ₂ = 0; then nothing is said of the head.

    Returns:
        `pairs`: their number by `ROLE-ROLE`, where there are some; `test_near_trained`: images of
        `test` that have one in D; `compared`; and `without`: the head's AUC of `member` and of
        `withheld` against `test` without all images of D and of `test` that have one on the other
        side.
    """
    roles = list(Role)
    names = [each.value for each in roles]
    in_d = np.array([each.trains_task for each in roles])
    test = roles.index(Role.TEST)
    with_trained = near[:, in_d].any(axis=1) & (role == test)
    with_test = near[:, test] & in_d[role]
    kept = ~np.isin(table.sample_id, sample_id[with_trained | with_test])
    negatives = table.mint_logit[kept & (table.role == Role.TEST.value)]
    without = {
        each.value: metrics.auc(
            table.mint_logit[kept & (table.role == each.value)],
            negatives,
            confidence=config.confidence,
        ).as_dict()
        for each in QUESTIONS
    }
    return {
        "compared": len(sample_id),
        "pairs": {
            f"{names[a]}-{names[b]}": int(pairs[a, b])
            for a in range(len(roles))
            for b in range(a + 1, len(roles))
            if pairs[a, b]
        },
        "test_near_trained": int(with_trained.sum()),
        "without": without
        if head_trained
        else blank(without, "the MINT head was not trained (loss.lambda_mint = 0)"),
    }
