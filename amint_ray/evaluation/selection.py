"""What a search selects by: the figures of a run without a look at `test`.

A figure that chose among many runs is better than the winner is; `test` must not have chosen.
`calibration` was not trained on either: one half of it sets the thresholds, the other is what they
are measured on.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable, leaves
from amint_ray.evaluation.report import evaluate

NEGATIVES = "calibration (half)"
_READ = (Role.MEMBER, Role.WITHHELD, Role.CALIBRATION)


def selection_figures(
    table: ScoreTable, config: Evaluation, *, head_trained: bool
) -> dict[str, Any]:
    """Every figure of membership and of the task, half of `calibration` standing for `test`.

    Args:
        table: the scores; rows of `test` and `external` are not read.
        config: levels and confidences.
        head_trained: False where λ₂ = 0; then nothing is said of the head.

    Returns:
        What `report.evaluate` does.
    """
    table = table.kept(np.isin(table.role, [role.value for role in _READ]))
    measured = np.array([_measured(name) for name in table.sample_id.tolist()], np.bool_)
    measured &= table.role == Role.CALIBRATION.value
    table = replace(table, role=np.where(measured, Role.TEST.value, table.role))
    return evaluate(table, config, head_trained=head_trained, negatives=NEGATIVES)


def selection_metrics(
    table: ScoreTable, config: Evaluation, *, head_trained: bool
) -> dict[str, float]:
    """The same as `selection.path`, `selection.path.low` and `.high`; what is not known is absent.

    Args:
        table: as for `selection_figures`.
        config: likewise.
        head_trained: likewise.
    """
    return leaves(selection_figures(table, config, head_trained=head_trained), "selection.")


def _measured(sample_id: str) -> bool:
    """Which half a sample is in: a function of its name alone, for every run the same."""
    return bool(hashlib.blake2b(sample_id.encode(), digest_size=1).digest()[0] & 1)
