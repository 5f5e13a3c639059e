"""Trials of a search that never ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUC = ("membership.member.auc", "max")
ACCURACY = ("task.accuracy", "max")
LOSS = ("task_loss", "min")


def figure(value: float | None, spread: float | None = 0.02) -> dict[str, Any]:
    known = value is not None and spread is not None
    low, high = (value - spread, value + spread) if known else (None, None)
    return {"value": value, "low": low, "high": high}


def trial(
    number: int,
    figures: Mapping[str, float | None] | None = None,
    *,
    state: str = "done",
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """One that is done at epoch 8 of 8 unless something else is said."""
    values = dict(figures or {})
    return {
        "id": f"t{number:03}{seed}",
        "run_id": None,
        "state": state,
        "baseline": False,
        "configuration": number,
        "parameters": {"placement": "entry"},
        "settings": {"mint.taps": "entry"},
        "seed": seed,
        "epoch": 8,
        "epochs": 8,
        "seconds": 61.5,
        "task_loss": None,
        "mint_loss": None,
        "figures": {name: figure(value) for name, value in values.items()},
        "violation": None,
        "reason": None,
        "history": [{"epoch": epoch, **values, "violation": None} for epoch in (4, 8)],
        **changes,
    }
