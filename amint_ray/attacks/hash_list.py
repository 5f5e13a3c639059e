"""The list of what was trained on: perfect on the very pixels, blind to a re-encoded copy."""

from __future__ import annotations

import numpy as np

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.method import Method
from amint_ray.evaluation.outputs import Scores


def _score(evidence: Evidence, edit: str) -> Scores:
    """1 where the pixels that the model is shown are those of an image of D, else 0."""
    assert evidence.listed is not None
    return np.asarray(evidence.listed[edit], np.float64)


HASH_LIST = Method(
    name="hash_list",
    title="hash list",
    source="the run's own manifest: what a head has to be measured against",
    score=_score,
    needs=frozenset({"listed"}),
)
