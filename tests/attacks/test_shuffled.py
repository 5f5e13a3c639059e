"""Roles dealt out by lot among those that a head is told of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amint_ray.attacks.shuffled import over_lots, shuffle_roles, shuffled_figures
from amint_ray.contracts import Role

ROLE = np.repeat([r.value for r in Role], [300, 40, 500, 60, 80])
CONTENT = np.array([f"c{i // 2}" for i in range(len(ROLE))])  # two images of each content


def test_only_the_roles_that_a_head_is_told_of_are_dealt_out_and_as_many_of_each() -> None:
    shuffled = shuffle_roles(ROLE, CONTENT, seed=0)
    pool = np.isin(ROLE, ["member", "external"])
    assert np.array_equal(shuffled.role[~pool], ROLE[~pool])
    assert not (shuffled.told | shuffled.held_out | shuffled.positive)[~pool].any()
    assert shuffled.positive.sum() == 300
    assert np.array_equal(shuffled.told | shuffled.held_out, pool)
    assert set(shuffled.role[shuffled.held_out]) == {"test"}
    for called, role in ((True, "member"), (False, "external")):
        side = shuffled.positive == called
        assert set(shuffled.role[shuffled.told & side]) == {role}
    kept = shuffled.held_out
    assert (kept & shuffled.positive).sum() == 76  # a quarter of 150 contents, rounded to 38
    assert (kept & ~shuffled.positive).sum() == 124
    for values in (shuffled.positive, shuffled.held_out):
        assert np.array_equal(values[::2], values[1::2]), "copies of an image are parted"


def test_the_lot_has_nothing_to_do_with_the_true_role_and_the_order() -> None:
    counts = [
        (shuffle_roles(ROLE, CONTENT, seed=seed).positive & (ROLE == "member")).sum()
        for seed in range(50)
    ]
    expected = 300 * 300 / 800
    assert abs(np.mean(counts) - expected) < 6
    order = np.random.default_rng(0).permutation(len(ROLE))
    moved = shuffle_roles(ROLE[order], CONTENT[order], seed=0)
    assert np.array_equal(moved.positive, shuffle_roles(ROLE, CONTENT, seed=0).positive[order])


def test_a_head_that_knows_by_heart_is_at_chance_on_what_it_was_not_shown() -> None:
    found = []
    for seed in range(100):
        shuffled = shuffle_roles(ROLE, CONTENT, seed=seed)
        rng = np.random.default_rng(seed + 1000)
        logit = rng.normal(size=len(ROLE)) + 3.0 * (shuffled.told & shuffled.positive)
        logit[-1] = np.nan
        found.append(shuffled_figures(shuffled, ROLE, logit, confidence=0.95))
    alone = [over_lots([each])["chance"] for each in found]
    assert sum(alone) >= 88  # 95 are promised
    together = [over_lots(found[at : at + 3])["chance"] for at in range(98)]
    assert sum(together) >= max(97, sum(alone))
    assert found[-1]["told"]["low"] > 0.95
    assert (found[-1]["n_positives"], found[-1]["n_negatives"]) == (76, 124)
    leaking = logit + 3.0 * shuffled.positive
    assert (
        over_lots([shuffled_figures(shuffled, ROLE, leaking, confidence=0.95)])["chance"] is False
    )


def test_several_lots_are_one_by_their_means() -> None:
    def figures(area: float) -> dict[str, Any]:
        leaf = {"value": area, "low": area - 0.1, "high": area + 0.1}
        return {"auc": leaf, "told": leaf, "n_positives": 5, "n_negatives": 6}

    found = over_lots([figures(0.62), figures(0.5)])
    assert found["auc"] == pytest.approx({"value": 0.56, "low": 0.46, "high": 0.66})
    assert (found["chance"], found["lots"], found["aucs"]) == (True, 2, [0.62, 0.5])
    assert (found["n_positives"], found["n_negatives"]) == (5, 6)
    unknown = {"value": None, "low": None, "high": None, "note": "no samples"}
    found = over_lots([figures(0.5), figures(0.5) | {"auc": unknown}])
    assert (found["auc"], found["chance"]) == (unknown, None)
