"""Thresholds that need no label: what was trained on is answered with more confidence."""

from __future__ import annotations

import numpy as np

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.method import Method
from amint_ray.evaluation.outputs import Scores

_SOURCE = "Salem, Zhang, Humbert, Berrang, Fritz, Backes: ML-Leaks, NDSS 2019 (adversary 3)"


def _confidence(evidence: Evidence, edit: str) -> Scores:
    """The largest probability, as a float32: from 1 − 3e-8 on it is 1, and those images tie."""
    return np.asarray(evidence.outputs[edit].top_confidence[0], np.float64)


def _entropy(evidence: Evidence, edit: str) -> Scores:
    return -np.asarray(evidence.outputs[edit].entropy[0], np.float64)


SALEM_CONFIDENCE = Method(
    name="salem_confidence",
    title="top confidence (Salem)",
    source=_SOURCE,
    score=_confidence,
)
SALEM_ENTROPY = Method(
    name="salem_entropy",
    title="entropy (Salem)",
    source=_SOURCE,
    score=_entropy,
)
