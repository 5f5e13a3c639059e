"""The loss threshold: what was trained on has a smaller loss."""

from __future__ import annotations

import numpy as np

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.method import Method
from amint_ray.evaluation.outputs import Scores


def log_probability(label_confidence: Scores) -> Scores:
    """Log p_y = −softplus(−φ): minus the cross-entropy in nats.

    Args:
        label_confidence: φ, of any shape.
    """
    with np.errstate(invalid="ignore"):  # NaN, where φ is not known, stays NaN
        value: Scores = -np.logaddexp(0.0, -label_confidence)
    return value


def _score(evidence: Evidence, edit: str) -> Scores:
    return log_probability(evidence.outputs[edit].label_confidence[0].astype(np.float64))


YEOM = Method(
    name="yeom",
    title="loss threshold (Yeom)",
    source="Yeom, Giacomelli, Fredrikson, Jha: Privacy Risk in Machine Learning, CSF 2018",
    score=_score,
)
