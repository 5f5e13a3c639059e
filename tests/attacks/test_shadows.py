"""Who trains which shadow: balance, complements, duplicates, roles."""

from __future__ import annotations

import numpy as np
import pytest

from amint_ray.attacks.shadows import assign, shadow_roles
from amint_ray.contracts import UserError


def contents(rng: np.random.Generator, units: int) -> np.ndarray:
    """Hashes of so many distinct contents, some of them twice or three times, in any order."""
    names = np.array([f"{value:016x}" for value in rng.permutation(10_000)[:units]])
    content = np.concatenate([names, rng.choice(names, units // 3), rng.choice(names, units // 5)])
    return rng.permutation(content)


def test_balance_holds_for_any_numbers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        units = int(rng.integers(2, 40))
        inside, shadows = int(rng.integers(1, units)), int(rng.integers(1, 12))
        content, seed = contents(rng, units), int(rng.integers(1 << 30))
        rows = assign(content, inside=inside, shadows=shadows, seed=seed)
        assert rows.shape == (shadows, len(content))
        _, first, unit = np.unique(content, return_index=True, return_inverse=True)
        np.testing.assert_array_equal(rows[:, first][:, unit], rows)  # duplicates together
        assert (rows[:, first].sum(axis=1) == inside).all()
        times = rows[:, first].sum(axis=0)
        assert set(times) <= {shadows * inside // units, -(-shadows * inside // units)}
        if 2 * inside == units:
            for even in range(0, shadows - 1, 2):
                np.testing.assert_array_equal(rows[even], ~rows[even + 1])
        order = rng.permutation(len(content))
        again = assign(content[order], inside=inside, shadows=shadows, seed=seed)
        np.testing.assert_array_equal(again, rows[:, order])


def test_another_seed_is_another_lot_and_pairs_are_independent() -> None:
    content = np.arange(2000)
    rows = assign(content, inside=1000, shadows=6, seed=1)
    assert (rows != assign(content, inside=1000, shadows=6, seed=2)).any()
    for a, b in ((0, 2), (0, 4), (2, 4)):
        assert 430 < (rows[a] & rows[b]).sum() < 570  # 500, standard deviation 11


@pytest.mark.parametrize(
    ("inside", "shadows", "text"),
    [(2, 0, "0 shadow models"), (0, 2, "0 of 4"), (4, 2, "4 of 4"), (5, 2, "5 of 4")],
)
def test_what_cannot_be_dealt_is_refused(inside: int, shadows: int, text: str) -> None:
    with pytest.raises(UserError, match=text):
        assign(np.arange(4), inside=inside, shadows=shadows, seed=0)


def test_roles_of_a_shadow() -> None:
    rng = np.random.default_rng(5)
    content = contents(rng, 60)
    kinds = np.array(["member", "withheld", "external", "calibration", "test"])
    names, unit = np.unique(content, return_inverse=True)
    role = kinds[rng.integers(0, 5, len(names))][unit]
    pool = role != "external"
    inside = np.zeros(len(content), np.bool_)
    inside[pool] = assign(content[pool], inside=20, shadows=1, seed=0)[0]
    roles = shadow_roles(role, content, inside, withheld=6, seed=9)
    np.testing.assert_array_equal(roles == "external", ~pool)
    np.testing.assert_array_equal(np.isin(roles, ["member", "withheld"]), inside)
    was = role == "calibration"
    np.testing.assert_array_equal(roles == "test", pool & ~inside & ~was)
    np.testing.assert_array_equal(roles == "calibration", ~inside & was)
    assert len(set(content[roles == "withheld"])) == 6
    assert len(set(content[roles == "member"])) == 14
    assert not set(content[roles == "withheld"]) & set(content[roles == "member"])
    again = shadow_roles(role, content, inside, withheld=6, seed=9)
    np.testing.assert_array_equal(again, roles)
    assert (shadow_roles(role, content, inside, withheld=6, seed=10) != roles).any()
    assert not (shadow_roles(role, content, inside, withheld=0, seed=9) == "withheld").any()


def test_roles_that_make_no_sense_are_refused() -> None:
    role, content = np.array(["member", "external", "test"]), np.array(["a", "b", "c"])
    with pytest.raises(ValueError, match="external"):
        shadow_roles(role, content, np.array([True, True, False]), withheld=0, seed=0)
    with pytest.raises(ValueError, match="2 of 1"):
        shadow_roles(role, content, np.array([True, False, False]), withheld=2, seed=0)
