"""The audited model's own MINT head."""

from __future__ import annotations

import numpy as np

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.method import Method
from amint_ray.evaluation.outputs import Scores


def _score(evidence: Evidence, edit: str) -> Scores:
    assert evidence.mint_logit is not None
    return np.asarray(evidence.mint_logit[edit], np.float64)


MINT = Method(
    name="mint",
    title="MINT head (aMINT)",
    source="DeAlcala et al.: Active Membership Inference Test (aMINT), ICCV 2025, arXiv 2509.07879",
    score=_score,
    needs=frozenset({"mint"}),
)
