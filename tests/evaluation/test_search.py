"""What a search found, against brute force and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from search_trials import ACCURACY, AUC, LOSS, figure, trial

from amint_ray.evaluation.importance import importance
from amint_ray.evaluation.objectives import (
    front_axes,
    metric_names,
    short_names,
    shown,
    shown_parameters,
)
from amint_ray.evaluation.search import Configuration, baseline, best, configurations, front


def found(*points: tuple[float, ...], axes: Any = (AUC, ACCURACY), **changes: Any) -> Any:
    names = [metric for metric, _ in axes]
    rows = [trial(i, dict(zip(names, p, strict=True)), **changes) for i, p in enumerate(points)]
    return configurations(rows, axes)


def numbers(found: list[Configuration]) -> list[int]:
    return [each.number for each in found]


def test_seeds_are_put_together_with_student_s_interval() -> None:
    values = [0.71, 0.78, 0.74]
    rows = [trial(4, {AUC[0]: v, "loss": v}, seed=i) for i, v in enumerate(values)]
    rows[1]["figures"]["loss"] = figure(0.78, spread=None)
    rows += [trial(2, {AUC[0]: 0.5}), trial(9, {AUC[0]: 0.9}, baseline=True)]
    first, second = configurations(rows[::-1], [AUC])
    assert (first.number, second.number) == (2, 4)
    assert first.figures[AUC[0]] == {**figure(0.5), "seeds": 1}
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert second.figures[AUC[0]]["value"] == pytest.approx(np.mean(values))
    for name in (AUC[0], "loss"):
        low_high = [second.figures[name][end] for end in ("low", "high")]
        assert low_high == pytest.approx(list(expected))
    assert second.seeds == (0, 1, 2) and second.trials == ("t0040", "t0041", "t0042")
    assert second.complete and second.feasible and second.violation is None
    plain = baseline(rows)
    assert plain is not None and plain.value(AUC[0]) == 0.9
    assert baseline(rows[:-1]) is None


def test_only_a_rate_s_interval_ends_at_one() -> None:
    rows = [trial(0, {"rate": v, "loss": v}, seed=i) for i, v in enumerate((0.9, 0.97))]
    for row in rows:
        row["figures"]["loss"] = figure(row["figures"]["loss"]["value"], spread=None)
    (one,) = configurations(rows, [])
    assert one.figures["rate"]["high"] == 1 < one.figures["loss"]["high"]
    assert one.figures["rate"]["low"] == one.figures["loss"]["low"]


def test_what_is_not_done_on_all_seeds_or_lacks_an_objective_is_not_complete() -> None:
    rows = [
        *(trial(0, {AUC[0]: 0.9}), trial(0, {AUC[0]: 0.8}, seed=1, state="stopped")),
        *(trial(1, {AUC[0]: 0.9}), trial(1, {AUC[0]: math.nan}, seed=1)),
        *(trial(2, {AUC[0]: 0.9}, violation=0.0), trial(2, {AUC[0]: 0.8}, seed=1, violation=0.02)),
        trial(3, state="waiting"),
    ]
    made = configurations(rows, [AUC])
    assert [each.complete for each in made] == [False, False, True, False]
    assert [each.state for each in made] == ["stopped", "done", "done", "waiting"]
    assert made[1].figures[AUC[0]]["seeds"] == 1
    assert made[2].violation == pytest.approx(0.01) and not made[2].feasible
    assert made[3].value(AUC[0]) is None
    assert front(made, [AUC]) == []


@pytest.mark.parametrize("dimensions", [2, 3])
def test_front_is_what_brute_force_finds(dimensions: int) -> None:
    axes = [AUC, LOSS, ACCURACY][:dimensions]
    signs = [1 if mode == "max" else -1 for _, mode in axes]
    rng = np.random.default_rng(dimensions)
    for _ in range(20):
        # Coarse, so that there are equals and ties on single axes.
        points = rng.integers(0, 6, (40, dimensions)) / 5
        broken = rng.random(40) < 0.2
        names = [name for name, _ in axes]
        made = configurations(
            [
                trial(i, dict(zip(names, p, strict=True)), violation=float(b))
                for i, (p, b) in enumerate(zip(points, broken, strict=True))
            ],
            axes,
        )
        good = {i: tuple(points[i] * signs) for i in range(40) if not broken[i]}
        expected = {
            i
            for i, p in good.items()
            if not any(
                q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in good.values()
            )
        }
        on_front = numbers(front(made, axes))
        assert set(on_front) == expected and len(on_front) == len(expected)
        assert on_front == sorted(on_front, key=lambda i: (-good[i][0], i))


def test_best_of_one_objective_is_feasible_and_the_first_of_equals() -> None:
    made = found((0.7, 0.9), (0.8, 0.9), (0.8, 0.95))
    assert best(made, [AUC]).configuration is made[1]
    assert best(made, [(AUC[0], "min")]).configuration is made[0]
    rows = [trial(i, {AUC[0]: 0.5 + i / 10}, violation=v) for i, v in enumerate((0.2, 0.1, 0.1))]
    chosen = best(configurations(rows, [AUC]), [AUC])
    assert (chosen.configuration and chosen.configuration.number, chosen.feasible) == (2, False)
    rows[0]["violation"] = 0.0
    chosen = best(configurations(rows, [AUC]), [AUC])
    assert (chosen.configuration and chosen.configuration.number, chosen.feasible) == (0, True)
    nothing = best(found((0.7, 0.9), state="stopped"), [AUC])
    assert nothing.configuration is None and not nothing.feasible


def test_a_configuration_is_feasible_only_if_it_is_known_to_keep_the_constraint() -> None:
    violations = [(0.0, None), (None, None), (0.0, 0.0), (0.1, None)]
    rows = [
        trial(number, {AUC[0]: 0.9 - number / 10}, seed=seed, violation=broken)
        for number, pair in enumerate(violations)
        for seed, broken in enumerate(pair)
    ]
    made = configurations(rows, [AUC], constrained=True)
    assert [each.feasible for each in made] == [False, False, True, False]
    assert numbers(front(made, [AUC])) == [2]
    assert best(made, [AUC]).configuration is made[2]
    # What is known to be broken a little is better than what nothing is known of.
    chosen = best([made[1], made[3]], [AUC])
    assert (chosen.configuration, chosen.feasible) == (made[3], False)
    free = configurations(rows[:4], [AUC])
    assert [each.feasible for each in free] == [True, True]


def test_best_of_several_is_nearest_to_the_ideal_point_whatever_the_scales() -> None:
    # The ideal is (1, 1), the last is dominated.
    points = [(0.0, 1.0), (0.6, 0.7), (0.8, 0.45), (1.0, 0.0), (0.5, 0.65)]
    nearest = min(range(5), key=lambda i: math.dist(points[i], (1, 1)))
    for scale in (0.01, 1.0, 100.0):
        made = found(*[(auc, -scale * other) for auc, other in points], axes=(AUC, LOSS))
        assert best(made, [AUC, LOSS]).configuration is made[nearest]
    equals = found((0.0, 1.0), (1.0, 0.0))
    assert best(equals, [AUC, ACCURACY]).configuration is equals[0]
    alone = found((0.5, 0.5))
    assert best(alone, [AUC, ACCURACY]).configuration is alone[0]


def sampled(
    n: int, seed: int = 0, *, deeper: bool = False
) -> tuple[list[dict[str, Any]], np.random.Generator]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        parameters: dict[str, Any] = {
            "placement": ["entry", "middle", "output"][rng.integers(3)],
            "loss.lambda_mint": float(10 ** rng.uniform(-4, 4)),
            "train.lr": float(rng.uniform(1e-4, 1e-3)),
            "mint.detach": bool(rng.integers(2)),
        }
        if deeper and parameters["placement"] == "entry":
            parameters["taps"] = ["a", "b"][rng.integers(2)]
        rows.append(parameters)
    return rows, rng


def scored(rows: list[dict[str, Any]], values: Any) -> list[Configuration]:
    made = [trial(i, {AUC[0]: float(v)}) for i, v in enumerate(values)]
    for row, parameters in zip(made, rows, strict=True):
        row["parameters"] = parameters
    return configurations(made, [AUC])


def test_importance_ranks_what_was_planted_and_is_reproducible() -> None:
    rows, rng = sampled(40)
    effect = [
        0.1 * math.log10(row["loss.lambda_mint"]) + 0.4 * (row["placement"] == "entry")
        for row in rows
    ]
    made = scored(rows, np.array(effect) + rng.normal(0, 0.01, 40))
    shares = importance(made, AUC[0])
    assert shares is not None
    assert list(shares)[:2] == ["loss.lambda_mint", "placement"]
    assert 0.1 < shares["placement"]["value"] < shares["loss.lambda_mint"]["value"]
    assert shares["train.lr"]["value"] + shares["mint.detach"]["value"] < 0.05
    assert sum(share["value"] for share in shares.values()) == pytest.approx(1)
    assert all(0 <= s["low"] <= s["value"] <= s["high"] <= 1 for s in shares.values())
    assert importance(made[::-1], AUC[0]) == shares


def test_the_choice_of_a_branch_is_not_credited_to_what_is_only_in_it() -> None:
    rows, rng = sampled(60, deeper=True)
    quality = {"entry": 0.9, "middle": 0.6, "output": 0.5}
    made = scored(rows, [quality[row["placement"]] + rng.normal(0, 0.01) for row in rows])
    shares = importance(made, AUC[0])
    assert shares is not None and next(iter(shares)) == "placement"
    assert shares["placement"]["value"] > 0.95
    made = scored(rows, [0.5 + 0.3 * (row.get("taps") == "a") for row in rows])
    shares = importance(made, AUC[0])
    assert shares is not None and shares["taps"]["value"] > 0.3


def test_a_missing_value_that_nothing_else_tells_counts_as_a_value() -> None:
    rows, rng = sampled(40)
    there = rng.random(40) < 0.5
    for row, here in zip(rows, there, strict=True):
        if here:
            row["extra"] = float(rng.uniform())
    shares = importance(scored(rows, 0.5 + 0.3 * there), AUC[0])
    assert shares is not None and next(iter(shares)) == "extra"


def test_importance_is_not_stated_where_there_is_too_little_to_learn_from() -> None:
    rows, rng = sampled(12)
    values = rng.uniform(size=12)
    assert importance(scored(rows[:7], values[:7]), AUC[0]) is None
    assert importance(scored(rows, np.full(12, 0.5)), AUC[0]) is None
    assert importance(scored([{"placement": "entry"}] * 12, values), AUC[0]) is None
    assert importance(scored(rows, values), "another.metric") is None
    assert importance(scored(rows, values), AUC[0]) is None  # what was drawn depends on nothing
    assert importance([], AUC[0]) is None


def test_a_single_objective_gets_a_second_axis() -> None:
    assert front_axes([AUC]) == [AUC, ACCURACY]
    assert front_axes([ACCURACY]) == [ACCURACY, AUC]
    assert front_axes([LOSS, AUC, ACCURACY]) == [LOSS, AUC, ACCURACY]


def test_names_are_shortened_as_far_as_they_stay_apart() -> None:
    names = ["loss.lambda_mint", "a.x", "b.x", "x", "m.tpr_at_fpr.0.01"]
    assert list(short_names(names).values()) == [
        *("lambda_mint", "a.x", "b.x", "x", "tpr_at_fpr.0.01"),
    ]
    assert metric_names([AUC[0], ACCURACY[0]]) == {AUC[0]: "member.auc", ACCURACY[0]: "accuracy"}
    values = {"loss.lambda_mint": 0.0123456, "mint.taps": '["stages.0", "stages.1"]', "n": None}
    assert shown_parameters(values) == "lambda_mint=0.0123 taps=[stages.0, stages.1] n=null"
    assert (shown(True), shown("abcdef", 4), shown(12)) == ("true", "abc…", "12")
