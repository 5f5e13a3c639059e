"""A head that is told nothing but lies: what it seems to see is not membership.

Among all images of `member` and `external`, who is called a member is drawn by lot, and a head is
trained on that. What it was told it may know by heart. Of images that were called something but
never shown to it, it cannot know which they were called: there its AUC is 0.5, unless samples,
batches or roles are mixed up somewhere between the images and the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import Mask, Names
from amint_ray.contracts import Role
from amint_ray.evaluation import metrics
from amint_ray.evaluation.outputs import Scores

LOTS = 3
"""Heads that are trained, each on a lot of its own."""
_HELD_OUT = 0.25


@dataclass(frozen=True)
class Shuffled:
    """Who is called what; all arrays (n,).

    Attributes:
        role: under which a head is trained: `member` and `external` where it is told so by lot,
            `test` where it is not shown, else what it was.
        positive: whether the sample is called a member.
        told: whether the head is told so.
        held_out: whether the sample is called something and the head is not told.
    """

    role: Names
    positive: Mask
    told: Mask
    held_out: Mask


def shuffle_roles(role: Names, content: npt.NDArray[np.generic], *, seed: int) -> Shuffled:
    """Deal the roles of `member` and `external` out anew among these images.

    As many are called members as are; a quarter of either is kept from the head.

    Args:
        role: (n,) `Role` values.
        content: (n,) hashes; equal ones are called the same.
        seed: of the lot.
    """
    pool = np.isin(role, [Role.MEMBER.value, Role.EXTERNAL.value])
    distinct, unit = np.unique(content[pool], return_inverse=True)
    members = len(np.unique(content[pool & (role == Role.MEMBER.value)]))
    lot = np.random.default_rng(seed).permutation(len(distinct))
    called, kept = np.zeros(len(distinct), np.bool_), np.zeros(len(distinct), np.bool_)
    called[lot[:members]] = True
    for side in (lot[:members], lot[members:]):
        kept[side[: round(_HELD_OUT * len(side))]] = True
    positive, held_out = np.zeros(len(role), np.bool_), np.zeros(len(role), np.bool_)
    positive[pool], held_out[pool] = called[unit], kept[unit]
    names = np.where(positive, Role.MEMBER.value, Role.EXTERNAL.value)
    names = np.where(held_out, Role.TEST.value, names)
    return Shuffled(np.where(pool, names, role), positive, pool & ~held_out, held_out)


def shuffled_figures(
    shuffled: Shuffled, role: Names, logit: Scores, *, confidence: float
) -> dict[str, Any]:
    """What a head that was told these roles makes of them.

    Args:
        shuffled: what it was told.
        role: (n,) the true `Role` values.
        logit: (n,) its scores; NaN where there is none.
        confidence: of the intervals.

    Returns:
        `auc`: images called members against images called external, none of which it was shown;
        `told`: images that it was told are members against `test`, which it may know by heart;
        `n_positives` and `n_negatives` of `auc`. Leaves are `{value, low, high}`.
    """
    scored = np.isfinite(logit)
    positives = logit[scored & shuffled.held_out & shuffled.positive]
    negatives = logit[scored & shuffled.held_out & ~shuffled.positive]
    told = metrics.auc(
        logit[scored & shuffled.told & shuffled.positive],
        logit[scored & (role == Role.TEST.value)],
        confidence=confidence,
    )
    return {
        "auc": metrics.auc(positives, negatives, confidence=confidence).as_dict(),
        "told": told.as_dict(),
        "n_positives": len(positives),
        "n_negatives": len(negatives),
    }


def over_lots(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several lots as one: values and limits are means.

    Lots share images, and their errors may go together; a mean's standard error is at most the mean
    of theirs, so that a sound head is at chance far more often than the confidence says.

    Args:
        found: what `shuffled_figures` gave of each, one at least.

    Returns:
        `auc` and `told`; `chance`: whether the interval of `auc` holds 0.5 (None: not known);
        `lots`, and of each the `aucs`; `n_positives` and `n_negatives` of the first.
    """
    document: dict[str, Any] = {}
    for name in ("auc", "told"):
        leaves = [each[name] for each in found]
        unknown = [leaf for leaf in leaves if leaf["value"] is None]
        document[name] = (
            unknown[0]
            if unknown
            else {
                key: float(np.mean([leaf[key] for leaf in leaves]))
                for key in ("value", "low", "high")
            }
        )
    area = document["auc"]
    chance = None if area["value"] is None else area["low"] <= 0.5 <= area["high"]
    return {
        **document,
        "chance": chance,
        "lots": len(found),
        "aucs": [each["auc"]["value"] for each in found],
        **{name: found[0][name] for name in ("n_positives", "n_negatives")},
    }
