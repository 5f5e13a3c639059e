"""Difficulty calibration: the loss, less what it is in models that did not train on the image."""

from __future__ import annotations

import numpy as np

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.method import Method
from amint_ray.attacks.yeom import log_probability
from amint_ray.evaluation.outputs import Scores


def _score(evidence: Evidence, edit: str) -> Scores:
    """Minus (loss − mean loss over the shadows that did not train on it); NaN where all did."""
    shadows = evidence.shadows
    assert shadows is not None
    score = log_probability(evidence.outputs[edit].label_confidence[0].astype(np.float64))
    for at, _, outside, phi in shadows.blocks(edit):
        total = (log_probability(phi) * outside).sum(axis=0)
        count = outside.sum(axis=0)
        score[at] -= np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return score


WATSON = Method(
    name="watson",
    title="difficulty-calibrated loss (Watson)",
    source="Watson, Guo, Cormode, Sablayrolles: On the Importance of Difficulty Calibration in "
    "Membership Inference Attacks, ICLR 2022",
    score=_score,
    needs=frozenset({"shadows"}),
    outside=1,
)
