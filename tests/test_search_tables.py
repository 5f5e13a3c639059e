"""What a person sees of a search's result."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from amint_ray.search_tables import print_planned, print_search

AUC, ACCURACY = "membership.member.auc", "task.accuracy"


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def configuration(number: int, auc: float, accuracy: float) -> dict[str, Any]:
    return {
        "number": number,
        "parameters": {"placement": "entry", "loss.lambda_mint": 0.1 * number},
        "settings": {"mint.taps": "entry", "loss.lambda_mint": 0.1 * number},
        "figures": {AUC: figure(auc), ACCURACY: figure(accuracy)},
        "seeds": [0, 1],
        "violation": 0.0,
    }


def document(**changes: Any) -> dict[str, Any]:
    failed = {"state": "failed", "reason": "worker 3 [a] died"}
    rows = [configuration(3, 0.9, 0.8), configuration(7, 0.7, 0.95)]
    return {
        "search": "placement",
        "run_id": "abc",
        "trials": [{"state": "done", "reason": None}, failed, failed],
        "front": rows,
        "best": rows[0],
        "feasible": True,
        "objectives": [{"metric": AUC, "mode": "max"}],
        "constraint": {"metric": ACCURACY, "at_least": None, "most_below_plain": 0.01},
        "baseline": {"figures": {ACCURACY: figure(0.91)}, "seeds": [0]},
        "importance": {AUC: {"placement": {"value": 0.75, "low": 0.6, "high": 0.8}}},
        "final": {
            "seeds": [5, 6],
            "figures": {AUC: figure(0.85), ACCURACY: figure(0.79), "unasked": figure(0.1)},
            "optimism": {AUC: {"selection": 0.9, "final": 0.85, "difference": 0.05}},
            "default": {"figures": {AUC: figure(0.6)}},
            "model_uri": "models:/amint-digits/3",
        },
        "counts": {"done": 12, "stopped": 30, "failed": 2},
        "seconds": {"search": 300.0, "final": 30.25},
        "recipe_file": "best.yaml",
        "next": "amint train best.yaml",
        **changes,
    }


def printed(made: dict[str, Any], width: int = 120) -> list[list[str]]:
    out = io.StringIO()
    print_search(made, Console(file=out, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines()[:8])) <= width
    return [line.replace("│", " ").split() for line in text.splitlines()]


def test_search_shows_front_best_final_figures_and_ends_with_the_next_command() -> None:
    lines = printed(document())
    for cells in (
        "3 * placement=entry lambda_mint=0.3 0.900 [0.880, 0.920] 0.800 [0.780, 0.820] 2",
        "7 placement=entry lambda_mint=0.7 0.700 [0.680, 0.720] 0.950 [0.930, 0.970] 2",
        "plain loss.lambda_mint=0 – 0.910 [0.890, 0.930] 1",
        "trials 12 done, 30 stopped early, 2 failed",
        "why they failed 2 times: worker 3 [a] died",
        "constraint task.accuracy at most 0.01 below plain training's",
        "best (*) 3: mint.taps=entry loss.lambda_mint=0.3",
        "member.auc depends on placement 75%",
        "member.auc 0.900 0.850 [0.830, 0.870] +0.050 0.600 [0.580, 0.620]",
        "accuracy – 0.790 [0.770, 0.810] – –",
        "MLflow run abc",
        "registered model models:/amint-digits/3",
        "recipe best.yaml",
        "seconds search 300.0 final 30.2",
    ):
        assert cells.split() in lines, cells
    assert lines[-1] == ["next", "amint", "train", "best.yaml"]
    assert not any("unasked" in line for line in lines)


def test_on_a_narrow_screen_intervals_stand_below_their_figures() -> None:
    lines = printed(document(), width=80)
    assert ["[0.880,", "0.920]", "[0.780,", "0.820]"] in [line[-4:] for line in lines]


def test_where_no_configuration_keeps_the_constraint_the_screen_says_so() -> None:
    best = configuration(4, 0.9, 0.5) | {"violation": 0.4}
    lines = printed(document(front=[], best=best, feasible=False, final=None))
    assert any(line[:2] == ["4", "*"] for line in lines)
    told = "CONSTRAINT BROKEN no configuration keeps it; 4 breaks it least, by 0.4"
    assert told.split() in lines


def test_where_none_is_known_to_keep_the_constraint_the_screen_says_that() -> None:
    best = configuration(4, 0.9, 0.5) | {"violation": None}
    lines = printed(document(front=[], best=best, feasible=False, final=None))
    assert any("is known to keep it" in " ".join(line) for line in lines)


@pytest.mark.parametrize(
    ("auc", "withheld", "told"),
    [
        (0.51, 0.9, "member.auc 0.510 [0.490, 0.530]"),
        (0.9, 0.51, "withheld.auc 0.510 [0.490, 0.530]"),
        (0.52, 0.48, "member.auc 0.520 [0.500, 0.540], withheld.auc 0.480 [0.460, 0.500]"),
        (0.53, 0.53, None),
        (0.47, 0.47, None),  # worse than guessing
    ],
)
def test_where_guessing_is_not_excluded_the_screen_says_so(
    auc: float, withheld: float, told: str | None
) -> None:
    best = configuration(3, auc, 0.8)
    best["figures"]["membership.withheld.auc"] = figure(withheld)
    objectives = [{"metric": name, "mode": "max"} for name in (AUC, "membership.withheld.auc")]
    lines = [" ".join(line) for line in printed(document(best=best, objectives=objectives))]
    found = [line for line in lines if line.startswith("GUESSING")]
    guessing = f"GUESSING the interval of the best holds 0.5 ({told}): no better than guessing is "
    assert found == ([] if told is None else [f"{guessing}not excluded"])


def test_of_a_best_without_an_auc_nothing_is_said_about_guessing() -> None:
    best = configuration(3, 0.5, 0.8)
    for unknown in (None, {"value": None, "low": None, "high": None}):
        best["figures"][AUC] = unknown
        lines = printed(document(best=best, front=[configuration(3, 0.5, 0.8)]))
        assert not any(line[:1] == ["GUESSING"] for line in lines)


def test_a_best_that_was_not_measured_on_test_is_told_to_be_that() -> None:
    for final, told in ((None, 1), (document()["final"], 0)):
        lines = [" ".join(line) for line in printed(document(final=final))]
        assert sum("the best was not measured on test" in line for line in lines) == told


def test_where_nothing_is_complete_there_is_no_best() -> None:
    changes: dict[str, Any] = dict.fromkeys(
        ("best", "constraint", "baseline", "importance", "final", "recipe_file")
    )
    lines = printed(document(front=[], feasible=False, **changes))
    assert ["best", "none:", "no", "configuration", "is", "complete"] in lines
    assert not any(line[:1] == ["recipe"] for line in lines)


def test_a_long_front_is_cut_but_not_its_best() -> None:
    rows = [configuration(i, 0.9, 0.8) for i in range(30)]
    lines = printed(document(front=rows, best=rows[27]))
    assert [line[0] for line in lines if "placement=entry" in line] == [
        *map(str, range(20)),
        "27",
    ]
    assert ["and", "9", "more", "(--json", "has", "them", "all)"] in lines


@pytest.mark.parametrize("width", [80, 120])
def test_the_paper_s_table_stands_beside_ours(width: int) -> None:
    paper = [
        {
            "row": f"cifar10 / {placement}",
            "column": "resnet50",
            "paper": {"mint": 0.86, "task": 0.53},
            "ours": {"mint": None, "task": figure(0.5)},
        }
        for placement in ("entry", "output")
    ]
    lines = printed(document(paper=paper), width=width)
    (row,) = (line for line in lines if line[:3] == ["cifar10", "/", "entry"])
    assert row[3:] == ["resnet50", "0.86", "–", "0.53", "0.500", *row[8:]]
    assert len(row) == (10 if width == 120 else 8)
    told = " ".join(word for line in lines for word in line)
    assert "published: on the paper's unseen images; here: on half of calibration" in told


def test_planned_trials_are_listed_with_how_many_there_will_be() -> None:
    planned = {
        "search": "digits",
        "trials": [
            {"id": "plain-0", "parameters": {}, "seed": 0, "baseline": True},
            {"id": "t0000", "parameters": {"mint.taps": '["a", "b"]'}, "seed": 4},
        ],
        "planned": 60,
        "concurrent": 2,
        "next": "amint tune digits.yaml",
    }
    out = io.StringIO()
    print_planned(planned, Console(file=out, width=80))
    lines = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    for cells in (
        "plain-0 plain training (λ₂ = 0) 0",
        "t0000 taps=[a, b] 4",
        "trials in all 60",
        "at a time 2",
    ):
        assert cells.split() in lines
    assert lines[-1] == ["next", "amint", "tune", "digits.yaml"]
