"""From the score table to the figures that a run reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable
from amint_ray.evaluation import keyed_rates, metrics
from amint_ray.evaluation.calibration import threshold_at
from amint_ray.evaluation.keyed_collection import images_needed
from amint_ray.evaluation.metrics import Interval

Scores = npt.NDArray[np.float64]
_COLLECTION_P, _COLLECTION_POWER = 1e-6, 0.95


def evaluate(
    table: ScoreTable,
    config: Evaluation,
    *,
    head_trained: bool = True,
    negatives: str = Role.TEST.value,
) -> dict[str, Any]:
    """Every figure of membership and of the task, from saved scores alone.

    Args:
        table: the scores.
        config: levels and confidences.
        head_trained: False where λ₂ = 0; then nothing is said of the head.
        negatives: what the rows called `test` are, for whoever reads the figures.

    Returns:
        `task.accuracy`, and `task.loss`, the mean cross-entropy in nats, on `test`;
        `membership.member` and `membership.withheld`, the MINT head's score on that role against
        `test`; `loss_threshold.member` and `.withheld`, the same with the negated task loss (Yeom
        et al., CSF 2018) as score. Of a head that says codes, `membership` also has what
        `keyed_figures` gives. Leaves are `{value, low, high}`.
    """
    test = table.of(Role.TEST)
    accuracy = metrics.proportion(
        int((test.prediction == test.label).sum()), len(test), confidence=config.confidence
    )
    loss = metrics.mean(test.task_loss, confidence=config.confidence)
    questions = (Role.MEMBER, Role.WITHHELD)
    head = {
        role.value: membership_figures(
            table.role, table.mint_logit, config, of=role, half=0.0, called=negatives
        )
        for role in questions
    }
    if table.code_p is not None:
        for role in questions:
            head[role.value] |= keyed_figures(table, config, of=role)
    if not head_trained:
        head = blank(head, "the MINT head was not trained (loss.lambda_mint = 0)")
    return {
        "confidence": config.confidence,
        "task": {"accuracy": accuracy.as_dict(), "loss": loss.as_dict()},
        "membership": head,
        "loss_threshold": {
            role.value: membership_figures(
                table.role, -table.task_loss, config, of=role, called=negatives
            )
            for role in questions
        },
    }


def membership_figures(
    role: npt.NDArray[np.str_],
    scores: Scores,
    config: Evaluation,
    *,
    of: Role,
    half: float | None = None,
    called: str = Role.TEST.value,
) -> dict[str, Any]:
    """The figures of one question: the role `of` against `test`, by one score.

    Args:
        role: (n,) `Role` values.
        scores: (n,) larger means "more likely trained on".
        config: levels and confidences.
        of: the positives.
        half: the score that stands for a membership probability of 0.5, if there is one.
        called: what the negatives are.

    Returns:
        `compared`, `auc`, `threshold` (from `calibration`) and what follows from it, `tpr_at_fpr`
        and `realised_fpr_at`. Leaves are `{value, low, high}`.
    """
    positives = scores[role == of.value]
    negatives = scores[role == Role.TEST.value]
    calibration = scores[role == Role.CALIBRATION.value]
    confidence = config.confidence

    def rates(threshold: float) -> tuple[Interval, Interval]:
        return _rates(threshold, positives, negatives, confidence=confidence)

    figures: dict[str, Any] = {
        "compared": {
            "positives": of.value,
            "n_positives": len(positives),
            "negatives": called,
            "n_negatives": len(negatives),
            "seeds": 1,
        },
        "threshold_fpr": config.threshold_fpr,
        "auc": metrics.auc(positives, negatives, confidence=confidence).as_dict(),
    }
    threshold = threshold_at(config.threshold_fpr, calibration)
    if threshold is None:
        unknown = Interval.unknown(_too_small(config.threshold_fpr, calibration)).as_dict()
        figures |= {"balanced_accuracy": unknown, "threshold": None, "realised_fpr": unknown}
        figures["precision_at_prior"] = {f"{prior:g}": unknown for prior in config.priors}
    else:
        tpr, fpr = rates(threshold)
        figures |= {
            "balanced_accuracy": metrics.balanced_accuracy(tpr, fpr).as_dict(),
            "threshold": threshold,
            "realised_fpr": fpr.as_dict(),
        }
        figures["precision_at_prior"] = {
            f"{prior:g}": metrics.precision_at_prior(
                int((positives > threshold).sum()),
                len(positives),
                int((negatives > threshold).sum()),
                len(negatives),
                prior=prior,
                confidence=confidence,
            ).as_dict()
            for prior in config.priors
        }
    if half is not None:
        figures["balanced_accuracy_at_half"] = metrics.balanced_accuracy(*rates(half)).as_dict()
    figures["tpr_at_fpr"], figures["realised_fpr_at"] = {}, {}
    for target in config.fprs:
        tpr, fpr = rates_at(target, positives, negatives, calibration, config, called=called)
        figures["tpr_at_fpr"][f"{target:g}"] = tpr.as_dict()
        figures["realised_fpr_at"][f"{target:g}"] = fpr.as_dict()
    return figures


def keyed_figures(table: ScoreTable, config: Evaluation, *, of: Role) -> dict[str, Any]:
    """What codes say of a role; nothing in it is estimated from images that were not trained on.

    Args:
        table: the scores, with codes.
        config: tells the confidence.
        of: the role.

    Returns:
        `bits` of a code; `match_rate`, the share of right bits, and `null_match_rate`, the same of
        `test`, which is ½ but for chance; `tpr_at_p`, the share of images whose p-value is at most
        0.01, 0.001, 1e-6; `null_share_at_p`, the same of `test`; `collection`: how many `images`
        are convicted together at `p` with `power`, by the number of right bits (None: more than the
        role has).
    """
    mine, null = table.of(of), table.of(Role.TEST)
    assert mine.code_p is not None and mine.code_matches is not None
    assert null.code_p is not None and null.code_matches is not None
    assert table.code_bits is not None
    bits, confidence = int(table.code_bits.max(initial=1)), config.confidence

    def shares(p: Scores) -> dict[str, Any]:
        levels = keyed_rates.tpr_at_p(p, bits=bits, confidence=confidence)
        return {level: share.as_dict() for level, share in levels.items()}

    def rate(matches: npt.NDArray[np.int64]) -> dict[str, Any]:
        return keyed_rates.match_rate(matches, bits=bits, confidence=confidence).as_dict()

    # One weight for all bits: then what counts is their number.
    right = (np.arange(bits) < mine.code_matches[:, None]).astype(np.int64)
    images = images_needed(np.ones(right.shape), right, p=_COLLECTION_P, power=_COLLECTION_POWER)
    return {
        "bits": bits,
        "match_rate": rate(mine.code_matches),
        "null_match_rate": rate(null.code_matches),
        "tpr_at_p": shares(mine.code_p),
        "null_share_at_p": shares(null.code_p),
        "collection": {"images": images, "p": _COLLECTION_P, "power": _COLLECTION_POWER},
    }


def four_lines(
    figures: Mapping[str, Any], confounders: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """The four AUCs that belong beside each other wherever membership is spoken of.

    Args:
        figures: what `evaluate` gave.
        confounders: what `confounders.check_confounders` said of the split; None: it was not asked.

    Returns:
        `member` and `withheld`: the MINT head on images it was told of, and on images that trained
        the task alone; `blind`: `member` against `test` without any model; `loss`: `member`
        against `test` by the task loss. Leaves are `{value, low, high}`.
    """
    if confounders is None:
        blind = Interval.unknown("the run made no confounder check").as_dict()
    else:
        blind = confounders["comparisons"]["member_vs_test"]["auc"]
    return {
        "member": figures["membership"]["member"]["auc"],
        "withheld": figures["membership"]["withheld"]["auc"],
        "blind": blind,
        "loss": figures["loss_threshold"]["member"]["auc"],
    }


def blank(figures: dict[str, Any], note: str) -> dict[str, Any]:
    """The same document with nothing stated in it, and why."""
    if "value" in figures:
        return Interval.unknown(note).as_dict()
    empty = {k: blank(v, note) if isinstance(v, dict) else v for k, v in figures.items()}
    return empty | ({"threshold": None} if "threshold" in empty else {})


def rates_at(
    target: float,
    positives: Scores,
    negatives: Scores,
    calibration: Scores,
    config: Evaluation,
    *,
    called: str = Role.TEST.value,
) -> tuple[Interval, Interval]:
    """TPR and realised FPR at the threshold calibrated to `target`, where they mean anything.

    Args:
        target: the false-positive rate aimed at.
        positives: (m,) scores.
        negatives: (n,) scores.
        calibration: (k,) scores that the threshold comes from.
        config: fewest false positives to be expected, and the confidence.
        called: what the negatives are.
    """
    expected = target * len(negatives)
    if expected < config.min_false_positives:
        unknown = Interval.unknown(
            f"{expected:.3g} false positives expected among {len(negatives)} {called} images, "
            f"{config.min_false_positives:g} needed"
        )
        return unknown, unknown
    threshold = threshold_at(target, calibration)
    if threshold is None:
        unknown = Interval.unknown(_too_small(target, calibration))
        return unknown, unknown
    return _rates(threshold, positives, negatives, confidence=config.confidence)


def _rates(
    threshold: float, positives: Scores, negatives: Scores, *, confidence: float
) -> tuple[Interval, Interval]:
    """Shares of both above the threshold."""
    tpr, fpr = (
        metrics.proportion(int((scores > threshold).sum()), len(scores), confidence=confidence)
        for scores in (positives, negatives)
    )
    return tpr, fpr


def _too_small(fpr: float, calibration: Scores) -> str:
    return f"{len(calibration)} calibration images are too few for a rate of {fpr:g}"
