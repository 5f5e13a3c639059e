"""Documents of runs, as `launch.record.record` makes them: real figures of drawn scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable
from amint_ray.evaluation.report import evaluate

CLEAN = {
    "clean": True,
    "confidence": 0.95,
    "interval_confidence": 0.9875,
    "comparisons": {
        "member_vs_test": {"auc": {"value": 0.51, "low": 0.46, "high": 0.56}, "confounded": False},
        "external_vs_test": {"auc": {"value": 0.5, "low": 0.45, "high": 0.55}, "confounded": False},
    },
}
COUNTS = {"member": 300, "withheld": 80, "external": 260, "calibration": 200, "test": 1100}


def a_document(
    *,
    counts: dict[str, int] | None = None,
    told: float = 2.0,
    head_trained: bool = True,
    confounders: dict[str, Any] | None = CLEAN,
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    """A run's document.

    Args:
        counts: images of each role.
        told: by how much the head's scores of members lie above those of strangers.
        head_trained: whether it was.
        confounders: what was found.
        evaluation: how it is measured.
    """
    counts = counts or COUNTS
    draw = np.random.default_rng(0)
    role = np.repeat([role.value for role in Role], [counts[role.value] for role in Role])
    label = draw.integers(0, 10, len(role))
    table = ScoreTable(
        sample_id=np.array([f"digits/{i}" for i in range(len(role))]),
        role=role,
        label=label,
        prediction=np.where(draw.random(len(role)) < 0.9, label, (label + 1) % 10),
        task_loss=draw.exponential(size=len(role)),
        mint_logit=draw.normal(size=len(role)) + told * (role == "member"),
    )
    return {
        "run_id": "0123456789abcdef0123456789abcdef",
        "run_name": "digits-20260101-000000-abcdef",
        "recipe": "digits",
        **evaluate(table, evaluation or Evaluation(), head_trained=head_trained),
        "confounders": confounders,
        "data": {"source": "digits", "mode": "memory"},
        "counts": counts,
        "duplicates": 3,
        "quarantined": 2,
        "lost": 0,
        "manifest_fingerprint": "f" * 64,
        "config_fingerprint": "c" * 16,
        "objective": "binary",
        "key_fingerprint": None,
        "seeds": {"train": 0, "split": 0, "count": 1},
    }
