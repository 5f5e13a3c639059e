"""The winner's trainings, put together; none of them is trained here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amint_ray.launch.winner import _difference, _figures, _over_seeds


def trained(auc: float) -> dict[str, Any]:
    """As much of a training's document as has figures, and something that has none."""
    stated = {"value": auc, "low": auc - 0.1, "high": auc + 0.1}
    return {
        "counts": {"test": 3},
        "membership": {
            "member": {"auc": stated, "tpr": {"value": None, "low": None, "high": None}}
        },
    }


@pytest.mark.parametrize("seeds", [[4], [4, 5]])
def test_one_pair_of_trainings_has_no_interval_and_two_have(seeds: list[int]) -> None:
    mine = [_figures(trained(0.8 + seed / 100)) for seed in seeds]
    theirs = [_figures(trained(0.6 - seed / 100)) for seed in seeds]
    found = _over_seeds(list(map(_difference, mine, theirs)), seeds)
    json.dumps(found, allow_nan=False)
    told = found["membership.member.auc"]
    assert told["value"] == pytest.approx(0.2 + 2 * sum(seeds) / len(seeds) / 100)
    assert (told["low"] is None) == (len(seeds) == 1)
    assert found.keys() == {"membership.member.auc"}
