"""Whether joint training makes a model tell an outsider more of what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import PLAIN, Evidence, Mask, Shadows
from amint_ray.attacks.lira import LIRA_OFFLINE_FIXED, LIRA_ONLINE_FIXED
from amint_ray.attacks.method import Method
from amint_ray.attacks.rmia import RMIA_OFFLINE, RMIA_ONLINE
from amint_ray.attacks.yeom import YEOM
from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, RunError
from amint_ray.evaluation import metrics
from amint_ray.evaluation.calibration import threshold_at
from amint_ray.evaluation.metrics import Interval
from amint_ray.evaluation.outputs import Outputs, Scores
from amint_ray.evaluation.report import rates_at

FPR = 0.01
"""At which true-positive rates are compared."""
ATTACKS = ((YEOM,), (LIRA_ONLINE_FIXED, LIRA_OFFLINE_FIXED), (RMIA_ONLINE, RMIA_OFFLINE))
"""What an outsider has; of each kind the first that the shadows suffice for."""
IN_D = (Role.MEMBER, Role.WITHHELD)


def outsiders(joint: Evidence, plain: Evidence) -> tuple[Method, ...]:
    """Of each kind in `ATTACKS` the first that scores images of D and of `test` of both models.

    Where none does it is the first, whose figures then say why there are none.
    """

    def scores(method: Method, evidence: Evidence) -> bool:
        found = np.isfinite(method.scores(evidence)[0])
        return bool(found[evidence.of(*IN_D)].any() and found[evidence.of(Role.TEST)].any())

    return tuple(
        next((each for each in kind if scores(each, joint) and scores(each, plain)), kind[0])
        for kind in ATTACKS
    )


def compare_models(
    joint: Evidence, plain: Evidence, methods: Sequence[Method], config: Evaluation
) -> dict[str, Any]:
    """The model trained jointly against the one trained with λ₂ = 0, on the same samples.

    Positives are all of D, told to the head or not: an outsider knows no difference. Intervals of
    the differences are over samples, for these two models; they do not say how another training
    would have gone (`paired_over_targets` does).

    Args:
        joint: of the model under audit.
        plain: of the plain model, with the same samples in the same order and with shadows of its
            own recipe.
        methods: see `outsiders`.
        config: levels and confidence.

    Returns:
        By method `joint` and `plain`, each with `auc`, and `tpr` and `realised_fpr` at 1 % by
        calibration; `difference` (joint less plain) of `auc` and of `tpr`, thresholds taken as
        given; and `compared`, the samples that both models have a score of. Leaves are
        `{value, low, high}`.

    Raises:
        RunError: the two were not trained on the same samples.
    """
    same = np.array_equal(joint.sample_id, plain.sample_id)
    in_d, test = joint.of(*IN_D), joint.of(Role.TEST)
    if not same or not np.array_equal(in_d, plain.of(*IN_D)):
        raise RunError(
            "the model and the plain one were not trained on the same samples in the same order: "
            "there is nothing to compare; train both from one manifest"
        )
    calibration = joint.of(Role.CALIBRATION)
    found = {}
    for method in methods:
        of_joint, why_joint = method.scores(joint)
        of_plain, why_plain = method.scores(plain)
        both = np.isfinite(of_joint) & np.isfinite(of_plain)
        found[method.name] = _compare(
            of_joint,
            of_plain,
            in_d & both,
            test & both,
            calibration & both,
            config,
            why_joint or why_plain,
        )
    return found


def _compare(
    joint: Scores,
    plain: Scores,
    in_d: Mask,
    test: Mask,
    calibration: Mask,
    config: Evaluation,
    why: str | None,
) -> dict[str, Any]:
    def figures(scores: Scores) -> dict[str, Any]:
        area = metrics.auc(scores[in_d], scores[test], confidence=config.confidence)
        tpr, fpr = rates_at(FPR, scores[in_d], scores[test], scores[calibration], config)
        found = {"auc": area, "tpr": tpr, "realised_fpr": fpr}
        return {name: _told(value, why) for name, value in found.items()}

    by_model = {"joint": figures(joint), "plain": figures(plain)}
    area = metrics.auc_difference(
        joint[in_d], joint[test], plain[in_d], plain[test], confidence=config.confidence
    )
    tpr = Interval.unknown(by_model["joint"]["tpr"].get("note", ""))
    if by_model["joint"]["tpr"]["value"] is not None:
        hits = []
        for scores in (joint, plain):
            threshold = threshold_at(FPR, scores[calibration])
            assert threshold is not None  # or there were no rate
            hits.append(scores[in_d] > threshold)
        tpr = metrics.proportion_difference(hits[0], hits[1], confidence=config.confidence)
    return by_model | {
        "difference": {"auc": _told(area, why), "tpr": _told(tpr, why)},
        "compared": {
            "positives": "member, withheld",
            "n_positives": int(in_d.sum()),
            "negatives": Role.TEST.value,
            "n_negatives": int(test.sum()),
        },
    }


def _told(interval: Interval, why: str | None) -> dict[str, Any]:
    return (interval if why is None else Interval.unknown(why)).as_dict()


def leave_one_out(
    shadows: Shadows,
    label: npt.NDArray[np.int64],
    *,
    pool: Mask | None = None,
    methods: Sequence[Method] = (YEOM, LIRA_ONLINE_FIXED, RMIA_ONLINE),
) -> dict[str, Scores]:
    """Each shadow attacked in turn, the others being its shadows: an AUC for each training.

    Without the target, what it trained on would be inside of one shadow fewer than other images,
    and they outside of one fewer: noise alone would tell them apart. So its complement is left out
    with it; where it has none, another shadow for each image, by lot: one of those that are outside
    of what the target trained on, or inside of what it did not.

    Args:
        shadows: S of them.
        label: (n,) class indices.
        pool: (n,) samples that shadows were drawn from; None: those that some shadow trained on.
        methods: that read nothing but φ.

    Returns:
        By method (S,) AUCs of what the shadow trained on against what it did not; NaN where there
        are none, as with too few shadows.
    """
    used = range(len(shadows.inside)) if shadows.rows is None else shadows.rows
    drawn = np.asarray(shadows.inside[list(used)]).any(axis=0) if pool is None else pool
    found = {method.name: np.full(len(used), np.nan) for method in methods}
    names = np.arange(len(label)).astype(np.str_)
    for place, target in enumerate(used):
        inside = np.asarray(shadows.inside[target])
        complements = [
            row for row in used if np.array_equal(shadows.inside[row][drawn], ~inside[drawn])
        ]
        role = np.where(inside, Role.MEMBER.value, Role.CALIBRATION.value)
        phi = np.asarray(shadows.label_confidence[PLAIN][target], np.float32)[None]
        evidence = Evidence(
            sample_id=names,
            role=np.where(drawn, role, Role.EXTERNAL.value),
            label=label,
            outputs={PLAIN: Outputs(phi, *(np.full_like(phi, np.nan),) * 4)},
            known=np.zeros(len(label), np.bool_),
            shadows=shadows.without(target, *complements)
            if complements
            else replace(shadows.without(target), silent=_balancing(shadows, target)),
        )
        for method in methods:
            scores, _ = method.scores(evidence)
            scored = np.isfinite(scores) & drawn
            area = metrics.auc(scores[scored & inside], scores[scored & ~inside], confidence=0.95)
            if area.value is not None:
                found[method.name][place] = area.value
    return found


def _balancing(shadows: Shadows, target: int) -> npt.NDArray[np.int64]:
    """(n,) by lot one of the shadows that have an image where the target does not; −1: none has."""
    used = range(len(shadows.inside)) if shadows.rows is None else shadows.rows
    inside = np.asarray(shadows.inside[target])
    rng = np.random.default_rng(target)
    chosen, seen = np.full(len(inside), -1), np.zeros(len(inside), np.int64)
    for row in used:
        other = np.asarray(shadows.inside[row]) != inside
        seen += other
        chosen[other & (rng.random(len(inside)) * seen < 1)] = row  # each with the same chance
    return chosen


def paired_over_targets(joint: Scores, plain: Scores, *, confidence: float) -> dict[str, Any]:
    """Mean difference of AUCs over trainings, with Student's t interval.

    Trainings are taken as independent. They share parts of one pool, two complements more than
    others, so the interval is somewhat too narrow.

    Args:
        joint: (k,) AUCs of models trained jointly.
        plain: (k,) of plain models, each trained on the same samples as its partner.
        confidence: of the interval.

    Returns:
        `{value, low, high}` of joint less plain, and `pairs`, those that both have an AUC.

    Raises:
        ValueError: not as many of the one as of the other.
    """
    if len(joint) != len(plain):
        raise ValueError(f"{len(joint)} AUCs cannot be paired with {len(plain)}")
    difference = (joint - plain)[np.isfinite(joint) & np.isfinite(plain)]
    k = len(difference)
    if k < 2:
        interval = Interval.unknown("fewer than two pairs of models")
    else:
        interval = metrics.mean_over_trainings(difference, confidence=confidence)
    return interval.as_dict() | {"pairs": k}
