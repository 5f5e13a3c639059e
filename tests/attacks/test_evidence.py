"""Outputs from logits, shadows by blocks, what is known, what is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_evidence import COUNTS, population

from amint_ray.attacks import evidence as evidence_module
from amint_ray.attacks.evidence import PLAIN, Shadows, choose_known
from amint_ray.contracts import UserError
from amint_ray.evaluation.outputs import append_samples, outputs_of, stack_views
from amint_ray.evaluation.selection import _measured as measured_in_a_search


def test_outputs_are_those_of_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20, 5))
    labels = rng.integers(0, 5, 20)
    labels[3] = -1
    got = outputs_of(logits, labels)
    for j in range(20):
        weights = [math.exp(value) for value in logits[j]]
        p = [weight / sum(weights) for weight in weights]
        guess = p.index(max(p))
        y = guess if labels[j] < 0 else labels[j]
        ordered = sorted(logits[j])
        expected = [
            math.log(p[y]) - math.log(1 - p[y]),
            max(p),
            -sum(q * math.log(q) for q in p),
            ordered[-1] - ordered[-2],
            float(guess == labels[j]),
        ]
        assert [column[0, j] for column in vars(got).values()] == pytest.approx(expected, rel=1e-5)
    assert {column.dtype for column in vars(got).values()} == {np.dtype(np.float32)}


def test_confidence_is_finite_where_probabilities_are_not() -> None:
    got = outputs_of(np.array([[900.0, 0.0, -5.0], [900.0, 0.0, -5.0]]), np.array([0, 2]))
    expected = [900 - math.log1p(math.exp(-5)), -905.0]
    assert got.label_confidence[0].tolist() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(got.entropy[0], 0, atol=1e-30)


def test_logits_that_are_not_finite_say_nothing() -> None:
    logits = np.array([[1.0, np.nan], [np.inf, 0.0], [1.0, 0.0]])
    got = outputs_of(logits, np.array([0, 0, 0]))
    for column in vars(got).values():
        assert np.isnan(column[0]).tolist() == [True, True, False]


def test_a_single_class_is_refused() -> None:
    with pytest.raises(UserError, match="single class"):
        outputs_of(np.zeros((3, 1)), np.zeros(3, np.int64))


def test_views_and_batches_are_put_together() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 6, 3)), rng.integers(0, 3, 6)
    at_once = stack_views([outputs_of(view, labels) for view in logits])
    first, last = (
        stack_views([outputs_of(view[part], labels[part]) for view in logits])
        for part in (slice(4), slice(4, 6))
    )
    in_parts = append_samples([first, last])
    assert at_once.margin.shape == (2, 6)
    for name, column in vars(at_once).items():
        np.testing.assert_array_equal(getattr(in_parts, name), column)


def test_blocks_of_a_table_on_disk_put_together_are_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_module, "_MOST_CELLS", 12)
    rng = np.random.default_rng(2)
    phi = np.memmap(tmp_path / "phi", np.float32, "w+", shape=(4, 11))
    phi[:] = rng.normal(size=(4, 11))
    phi[2, 5] = np.nan
    inside = rng.random((4, 11)) < 0.5
    shadows = Shadows(inside, {PLAIN: phi}).without(1)
    blocks = list(shadows.blocks(PLAIN))
    assert [at.stop - at.start for at, *_ in blocks] == [4, 4, 3]
    rows = [0, 2, 3]
    trained, left, values = (
        np.concatenate(parts, axis=1) for parts in list(zip(*blocks, strict=True))[1:]
    )
    finite = np.isfinite(phi[rows])
    np.testing.assert_array_equal(trained, inside[rows] & finite)
    np.testing.assert_array_equal(left, ~inside[rows] & finite)
    np.testing.assert_array_equal(values, np.nan_to_num(phi[rows]).astype(np.float64))
    assert len(shadows) == 3 and len(shadows.without(0)) == 2


def test_known_are_some_members_and_half_of_calibration_whatever_the_order() -> None:
    names = np.array([f"s{i}" for i in range(4000)])
    role = np.array(["member", "withheld", "calibration", "test", "external"])[np.arange(4000) % 5]
    known = choose_known(names, role, members=100, seed=3)
    assert known[role == "member"].sum() == 100
    assert 340 < known[role == "calibration"].sum() < 460
    assert not known[np.isin(role, ["withheld", "test", "external"])].any()
    order = np.random.default_rng(0).permutation(4000)
    np.testing.assert_array_equal(
        choose_known(names[order], role[order], members=100, seed=3), known[order]
    )
    assert (choose_known(names, role, members=100, seed=4) != known).any()
    searched = np.array([measured_in_a_search(name) for name in names])
    of_both = (known & searched)[role == "calibration"].sum()
    assert 150 < of_both < 250  # independent: a quarter of 800
    assert choose_known(names, role, members=0)[role == "member"].sum() == 0


def test_copies_are_known_together_or_not_at_all() -> None:
    content = np.array([f"c{i // 3}" for i in range(300)])
    for members in (0, 1, 50, 100, 299, 300):
        known = choose_known(content, np.full(300, "member"), members=members)
        assert set(known.reshape(-1, 3).sum(axis=1).tolist()) <= {0, 3}
        assert members - 3 < known.sum() <= members
    halves = choose_known(content, np.full(300, "calibration")).reshape(-1, 3).sum(axis=1)
    assert set(halves.tolist()) == {0, 3}


def test_what_is_missing_is_named() -> None:
    full = population(COUNTS, edits=(PLAIN, "flip"))
    needs = {"mint", "passive", "shadows", "snapshots", "listed", "blind"}
    assert full.lacks(needs) is None and full.lacks(needs, "flip") is None
    assert "jpeg_75" in str(full.lacks(set(), "jpeg_75"))
    for need, field in {
        "mint": "mint_logit",
        "passive": "passive_logit",
        "shadows": "shadows",
        "snapshots": "snapshots",
        "listed": "listed",
        "blind": "blind",
    }.items():
        assert replace(full, **{field: None}).lacks({need}) is not None
        assert replace(full, **{field: None}).lacks(needs - {need}) is None
    assert full.shadows is not None
    only_plain = replace(full, mint_logit={PLAIN: full.blind})
    assert "flip" in str(only_plain.lacks({"mint"}, "flip"))
    assert replace(full, snapshots={PLAIN: []}).lacks({"snapshots"}) is not None
    none_left = full.shadows.without(*range(8))
    assert replace(full, shadows=none_left).lacks({"shadows"}) is not None
