"""Several trainings of one recipe as one result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from amint_ray.evaluation.metrics import mean_over_trainings
from amint_ray.evaluation.seeds import groups_over_seeds, over_seeds


def leaf(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def figures(area: float, loss: float, *, n: int = 5) -> dict[str, Any]:
    return {
        "confidence": 0.95,
        "task": {"accuracy": leaf(area), "loss": leaf(loss)},
        "loss": leaf(area),
        "compared": {"n_positives": n, "seeds": 1},
        "threshold": None,
        "same": leaf(0.5),
    }


def test_the_mean_has_students_interval() -> None:
    values = np.array([0.7, 0.74, 0.69, 0.75])
    found = mean_over_trainings(values, confidence=0.9)
    low, high = stats.t.interval(0.9, 3, loc=values.mean(), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert mean_over_trainings(values[:1], confidence=0.9).value is None


def test_every_figure_becomes_its_mean_and_rates_stay_rates() -> None:
    found = over_seeds([figures(0.99, 0.2, n=5), figures(0.9, 1.9, n=6)], confidence=0.95)
    assert found["task"]["accuracy"]["value"] == pytest.approx(0.945)
    assert found["task"]["accuracy"]["high"] == 1.0
    assert found["loss"]["high"] == 1.0
    assert found["task"]["loss"]["value"] == pytest.approx(1.05)
    assert found["task"]["loss"]["high"] > 1
    assert found["compared"] == {"n_positives": [5, 6], "seeds": 2}
    assert found["threshold"] is None and found["confidence"] == 0.95
    assert found["same"] == leaf(0.5)


def test_what_one_model_does_not_state_is_not_stated() -> None:
    unknown = {"value": None, "low": None, "high": None, "note": "too few"}
    found = over_seeds([{"auc": leaf(0.6)}, {"auc": unknown}], confidence=0.95)
    assert found["auc"]["value"] is None
    assert found["auc"]["note"] == "stated of 1 of 2 models: too few"
    assert over_seeds([{"auc": unknown}] * 2, confidence=0.95) == {"auc": unknown}


def test_groups_are_combined_by_name() -> None:
    def groups(**areas: float) -> dict[str, Any]:
        found = [
            {"group": name, "images": {"test": 20}, "member": leaf(area), "apart": area > 0.7}
            for name, area in areas.items()
        ]
        return {"groups": found, "ungrouped": len(found)}

    found = groups_over_seeds([groups(a=0.6, b=0.7), groups(b=0.8, c=0.9)], confidence=0.95)
    (only,) = found["groups"]
    assert only["group"] == "b" and only["images"] == {"test": 20}
    assert only["member"]["value"] == pytest.approx(0.75)
    assert only["apart"] == [False, True]
    assert found["ungrouped"] == [2, 2]
