"""What a person sees of an attack's result."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from amint_ray.attack_tables import print_attack

NONE = {"value": None, "low": None, "high": None, "note": "too few"}


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def question(auc: float) -> dict[str, Any]:
    return {"auc": figure(auc), "tpr_at_fpr": {"0.01": figure(auc / 10), "0.001": NONE}}


def method(title: str, auc: float, **more: Any) -> dict[str, Any]:
    return {
        "title": title,
        "member": question(auc),
        "withheld": question(auc - 0.2),
        "robustness": {},
        "cost": {"seconds": 360.0, "core_hours": 2.0},
        **more,
    }


def edited(auc: float) -> dict[str, Any]:
    return {role: {"auc": figure(auc), "tpr": NONE} for role in ("member", "withheld")}


def document(**changes: Any) -> dict[str, Any]:
    nothing = {"auc": NONE, "tpr_at_fpr": {}}
    methods = {
        "mint": method("MINT head", 0.95, robustness={"jpeg_50": edited(0.8), "flip": edited(0.7)}),
        "lira_online": method("LiRA online", 0.7, member=nothing, withheld=nothing),
        "blind": method("blind classifier", 0.5),
    }
    pair = {"joint": {"auc": figure(0.6)}, "plain": {"auc": figure(0.57)}}
    pair["difference"] = {"auc": figure(0.03)}
    return {
        "model": "models:/amint-digits/1",
        "run_id": "abc",
        "methods": methods,
        "leak": {
            "pair": {"yeom": pair, "rmia_online": pair},
            "trainings": {"yeom": {"auc": {**figure(0.01), "pairs": 16}}},
        },
        "shadows": {"asked": 16, "used": 15, "failed": {"joint-003": "nan"}},
        "counts": {"member": 300, "withheld": 70, "calibration": 130, "test": 1000},
        "confidence": 0.95,
        "seconds": {"total": 61.5, "reused": 7},
        "artifacts": "attacks/1234-5678",
        "recorded": True,
        "kept": "amint_runs/attacks/1234/5678",
        **changes,
    }


def printed(made: dict[str, Any], width: int = 140) -> tuple[list[str], str]:
    """Lines with single spaces, and all the words behind each other."""
    out = io.StringIO()
    print_attack(made, Console(file=out, width=width))
    drawn = out.getvalue().translate(dict.fromkeys(map(ord, "│┃"), " "))
    lines = [" ".join(line.split()) for line in drawn.splitlines()]
    return lines, "".join(drawn.split())


def test_all_methods_beside_each_other() -> None:
    lines, _ = printed(document())
    assert (
        "models:/amint-digits/1: 300 member and 70 withheld images, each against 1000 of test"
        in (lines[0])
    )
    for row in (
        "MINT head 0.950 [0.930, 0.970] 0.095 [0.075, 0.115] 0.750 [0.730, 0.770] "
        "0.075 [0.055, 0.095] 2.1",
        "LiRA online – – – – 2.1",
        "MINT head .950 / .750 .800 / .800 .700 / .700",
        "yeom 0.600 [0.580, 0.620] 0.570 [0.550, 0.590] 0.030 [0.010, 0.050] "
        "0.010 [-0.010, 0.030] (16 pairs)",
        "rmia_online 0.600 [0.580, 0.620] 0.570 [0.550, 0.590] 0.030 [0.010, 0.050] –",
        "method as it is JPEG 50 flip",
        "shadow models 15 of 16 used, 1 training came to nothing",
        "MLflow run abc, artifacts in attacks/1234-5678",
        "kept in amint_runs/attacks/1234/5678",
        "seconds 61.5, 7 parts of an earlier attack used again",
    ):
        assert row in lines, row
    assert sum(line.startswith("blind classifier") for line in lines) == 1  # reads no suspect


def test_a_dash_is_explained_once() -> None:
    made = document()
    fixed = method("LiRA online, one variance", 0.7)
    fixed["member"]["auc"] = {**NONE, "note": "no image"}
    made["methods"]["lira_online_fixed"] = fixed
    made["methods"]["yeom"] = method("loss threshold (Yeom)", 0.7)
    made["methods"]["yeom"]["withheld"]["tpr_at_fpr"]["0.01"] = NONE
    lines, _ = printed(made)
    assert [line for line in lines if line.startswith("– ")] == [
        "– LiRA online, loss threshold (Yeom): too few",
        "– LiRA online, one variance: no image",
    ]


def test_on_a_narrow_screen_intervals_stand_below_their_figures_and_nothing_is_cut() -> None:
    made = document()
    edits = ("jpeg_90", "jpeg_75", "jpeg_50", "resize_0.9", "shift_1", "flip")
    made["methods"]["mint"]["robustness"] = {edit: edited(0.8) for edit in edits}
    made["methods"]["passive_mint"] = method("head trained afterwards (passive MINT)", 0.6)
    made["methods"]["passive_mint"]["robustness"] = made["methods"]["mint"]["robustness"]
    lines, text = printed(made, 80)
    assert "MINT head 0.950 0.095 0.750 0.075 2.1" in lines
    assert "[0.930, [0.075, [0.730, [0.055," in lines
    tables = lines[: next(i for i, line in enumerate(lines) if line.startswith("[…, …]"))]
    assert not any("…" in line for line in tables)
    for heading in ("resize", "shift", "flip"):
        assert heading in text


def test_a_name_in_brackets_is_no_markup() -> None:
    lines, _ = printed(document(model="models:/a[b]c/1"))
    assert "models:/a[b]c/1: 300 member" in lines[0]


def test_nothing_but_methods() -> None:
    plain = document(leak=None, recorded=False, shadows={"asked": 0, "used": 0, "failed": {}})
    for each in plain["methods"].values():
        each["robustness"] = {}
    lines, text = printed(plain)
    assert "suspectswereedited" not in text and "outsider" not in text
    assert "MLflow run not told" in lines
    assert not any("shadow models" in line or "0 of 0" in line for line in lines)


def test_no_trainings_to_compare_over() -> None:
    pair = document()["leak"]["pair"]
    lines, _ = printed(document(leak={"pair": pair, "trainings": None}))
    assert sum(line.endswith("[0.010, 0.050] –") for line in lines) == 2


@pytest.mark.parametrize("auc", [1.0, 0.0])
def test_ends_of_the_scale(auc: float) -> None:
    made = document()
    made["methods"]["mint"]["robustness"]["flip"] = edited(auc)
    lines, _ = printed(made)
    assert any(line.endswith("1.000 / 1.000" if auc else ".000 / .000") for line in lines)
