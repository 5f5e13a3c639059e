"""What a person sees of a run."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from amint_ray import display
from amint_ray.contracts import few_samples
from amint_ray.display import LiveDisplay, PlainDisplay
from amint_ray.tables import (
    _code_rows,
    interval,
    print_data,
    print_document,
    print_reproduced,
    print_result,
)

EPOCH = {"phase": "epoch", "epoch": 3, "train/task_loss": 0.5, "train/mint_loss": 0.25}
STEP = {"phase": "train", "epoch": 3, "epochs": 8, "step": 30, "steps": 80}


def test_what_codes_say_is_a_row_each() -> None:
    figure = {"value": 0.75, "low": 0.7, "high": 0.8}
    unknown = {"value": None, "low": None, "high": None}
    told = {"bits": 8, "match_rate": figure, "null_match_rate": {**figure, "value": 0.5}}
    told |= {"tpr_at_p": {"0.01": figure, "1e-06": unknown}}
    member = told | {"collection": {"images": 7, "p": 1e-6}}
    withheld = told | {"collection": {"images": None, "p": 1e-6}}
    assert list(_code_rows(member, withheld)) == [
        ("right bits of the code, of 8", *["0.750 [0.700, 0.800]"] * 2),
        ("    of test images, which is ½ but for chance", *["0.500 [0.700, 0.800]"] * 2),
        ("TPR at p ≤ 0.01, an exact rate", *["0.750 [0.700, 0.800]"] * 2),
        ("images that convict together at p ≤ 1e-06", "7", "–"),
    ]
    assert list(_code_rows({}, {})) == []


def test_plain_form_is_lines_with_epoch_and_both_losses() -> None:
    out = io.StringIO()
    display = PlainDisplay(Console(file=out, width=40))
    display.phase("starting Ray")
    display.event(STEP)
    display.event(EPOCH)
    display.event({**EPOCH, "epoch": 4})  # too soon after the last line
    display.event({"phase": "evaluate"})
    display.close()
    assert out.getvalue().splitlines() == [
        "amint: starting Ray",
        "amint: epoch 3  task 0.5000  mint 0.2500",
        "amint: scoring every sample",
    ]


def test_plain_training_has_no_mint_loss() -> None:
    out = io.StringIO()
    display = PlainDisplay(Console(file=out, width=80))
    display.event({"phase": "epoch", "epoch": 1, "train/task_loss": 0.5})
    assert out.getvalue() == "amint: epoch 1  task 0.5000\n"


def test_live_form_shows_epoch_losses_and_rate() -> None:
    out = io.StringIO()
    display = LiveDisplay(Console(file=out, force_terminal=True, width=120))
    display.phase("starting 2 workers")
    display.event({**STEP, "step": 20})
    display.event(EPOCH)
    display.event(STEP)
    display._progress.refresh()
    display.close()
    text = out.getvalue()
    for part in ("epoch 3/8", "task 0.5000", "mint 0.2500", "steps/s"):
        assert part in text


PARTS = {"phase": "parts", "done": 3, "total": 12, "epochs": 17.6, "epochs_total": 40.0}


def test_parts_of_an_attack_in_both_forms() -> None:
    out = io.StringIO()
    plain = PlainDisplay(Console(file=out, width=80))
    plain.event(PARTS)
    plain.event({**PARTS, "done": 4})  # too soon after the last line
    assert out.getvalue() == "amint: 0:00  3 of 12 parts done, 18 of 40 epochs trained\n"
    out = io.StringIO()
    live = LiveDisplay(Console(file=out, force_terminal=True, width=120))
    live.phase("training and asking 12 parts")
    live.event(PARTS)
    live.event({**PARTS, "done": 5, "epochs": 0.0, "epochs_total": 0.0})  # nothing is trained
    live._progress.refresh()
    live.close()
    assert "0:00  5 of 12 parts done" in out.getvalue()
    assert "of 0 epochs" not in out.getvalue()


def test_of_a_batchs_samples_three_are_shown() -> None:
    head = "all failed: task loss nan; samples of the batch: "
    names = [f"digits/{number}" for number in range(40)]
    rest = "; not tried again, or with --new"
    for told, shown in (
        (f"{', '.join(names)}", "digits/0, digits/1, digits/2 and 37 more"),
        (f"{', '.join(names)} and 8 more", "digits/0, digits/1, digits/2 and 45 more"),
        ("a, b, c", "a, b, c"),
        ("a and 9 more", "a and 9 more"),
    ):
        for end in ("", rest):
            assert few_samples(head + told + end) == head + shown + end
            assert few_samples(head + shown + end) == head + shown + end
    assert few_samples("a, b, c, d") == "a, b, c, d"


def test_what_is_not_new_is_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    out = io.StringIO()
    plain = PlainDisplay(Console(file=out, width=80))
    for _ in range(2):
        plain.phase("bringing it to its place")
    alone = {**PARTS, "done": 0, "total": 1, "epochs": 0.0, "epochs_total": 20.0}
    for seconds, epochs in ((6, 0.0), (12, 0.0), (30, 0.0), (36, 4.0), (95, 4.0), (97, 4.0)):
        now = 100.0 + seconds
        plain.event({**alone, "epochs": epochs})
    assert out.getvalue().splitlines() == [
        "amint: bringing it to its place",
        "amint: 0:06  0 of 1 part done, 0 of 20 epochs trained",
        "amint: 0:36  0 of 1 part done, 4 of 20 epochs trained",
        "amint: 1:37  0 of 1 part done, 4 of 20 epochs trained",
    ]


def test_result_shows_figures_intervals_and_how_to_load() -> None:
    figure = {"value": 0.9, "low": 0.85, "high": 0.94}
    unknown = {"value": None, "low": None, "high": None, "note": "too few"}
    question = {
        "auc": figure,
        "threshold_fpr": 0.05,
        "balanced_accuracy": {"value": 0.8, "low": 0.7, "high": 0.85},
        "balanced_accuracy_at_half": {"value": 0.6, "low": 0.5, "high": 0.7},
        "tpr_at_fpr": {"0.01": {"value": 0.3, "low": 0.2, "high": 0.4}, "0.001": unknown},
        "realised_fpr_at": {"0.01": {"value": 0.012, "low": 0.005, "high": 0.02}, "0.001": unknown},
    }
    document = {
        "recipe": "digits",
        "confidence": 0.95,
        "counts": {"member": 294, "withheld": 73, "test": 1072},
        "membership": {"member": question, "withheld": question},
        "loss_threshold": {"member": question, "withheld": question},
        "task": {"accuracy": {"value": 0.97, "low": 0.96, "high": 0.98}},
        "quarantined": 12,
        "lost": 3,
        "confounders": {
            "clean": False,
            "comparisons": {"member_vs_test": {"auc": figure, "confounded": True}},
        },
        "run_id": "abc",
        "tracking_uri": "sqlite:///mlflow.db",
        "model_uri": "models:/amint-digits/1",
        "load": 'amint_ray.load("models:/amint-digits/1")',
        "waiting": None,
        "flops": {"joint_step": 3.2e9, "task_step": 2e9, "ratio": 1.6, "per_second": 6.4e10},
        "seconds": {"train": 1.0, "total": 2.0},
    }
    out = io.StringIO()
    print_result(document, Console(file=out, width=120))
    text = out.getvalue()
    for part in (
        "0.900 [0.850, 0.940]",
        "0.800 [0.700, 0.850]",
        "0.600 [0.500, 0.700]",
        "0.300 [0.200, 0.400]",
        "0.012 [0.005, 0.020]",
        "0.970 [0.960, 0.980]",
        "1072 test images",
        'amint_ray.load("models:/amint-digits/1")',
        "abc",
        "12, 3 of them in mid-run (quarantine.parquet)",
        "3.2 GFLOP, 1.60 times the audited-only step's; 64 GFLOP/s",
        "CONFOUNDED, trust no membership figure: without the model, AUC member from test 0.900",
    ):
        assert part in text
    assert "0.001 FPR" not in text  # no value in either column, no row


def test_reading_is_told_now_and_then_and_lost_images_beside_the_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    display = PlainDisplay(Console(file=out, width=80))
    monkeypatch.setattr("amint_ray.display.time.monotonic", lambda: now)
    now = 100.0
    display.phase("reading")
    display.event({"phase": "read", "done": 500, "total": 5000})  # most sets are read in no time
    now = 106.0
    display.event({"phase": "read", "done": 1000, "total": 5000})
    display.event({"phase": "read", "done": 2000, "total": 5000})  # too soon
    assert out.getvalue() == "amint: reading\namint: 1,000 of 5,000 images\n"
    out = io.StringIO()
    display = PlainDisplay(Console(file=out, width=80))
    display.event({**STEP, "lost": 3})
    display.event(EPOCH)
    assert out.getvalue().endswith("  3 images lost\n")


def test_what_is_in_a_source_is_shown_with_the_reasons_of_what_is_not() -> None:
    document = {
        "source": "folder",
        "path": "birds",
        "count": 1234,
        "official_test": 200,
        "classes": ["crow", "owl"],
        "labels": {"crow": 1000, "owl": 231},
        "sizes": {
            "width": {"min": 10, "median": 20, "max": 30},
            "height": {"min": 11, "median": 21, "max": 31},
        },
        "roles": {"member": 400, "test": 831},
        "duplicates": 7,
        "near_duplicates": None,
        "quarantined": [{"sample_id": f"{i}.jpg", "reason": "is empty"} for i in range(5)],
        "mode": "memory",
        "decoded_bytes": 2**30,
        "contact_sheet": "sheet.png",
    }
    out = io.StringIO()
    print_data(document, Console(file=out, width=100))
    for part in (
        "1,234, of them 200 in the official test split",
        "2: crow, owl; 231 to 1,000 images each",
        "10×11 to 30×31, median 20×21",
        "memory (1.00 GiB decoded)",
        "is empty: 0.jpg, 1.jpg, 2.jpg and 2 more",
    ):
        assert part in out.getvalue()


def test_a_reproduced_run_shows_each_difference_and_the_verdict() -> None:
    metric = {"old": 0.9, "new": 0.79, "difference": -0.11, "inside_interval": False}
    document = {
        "run_id": "a" * 32,
        "reproduced_run_id": "b" * 32,
        "metrics": {
            "task.accuracy": metric,
            "auc": metric | {"new": 0.88, "difference": -0.02, "inside_interval": True},
            "loss": metric | {"new": 0.9, "difference": 0.0, "inside_interval": None},
            "gone": metric | {"new": None, "difference": None, "inside_interval": None},
        },
        "same_commit": False,
        "same_versions": None,
        "same_data": True,
        "verdict": "outside",
        "workers": {"old": "2", "new": "1"},
        "model_uri": None,
        "waiting": "amint_runs/spool/x",
    }
    out = io.StringIO()
    print_reproduced(document, Console(file=out, width=120))
    lines = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    for cells in (
        "task.accuracy 0.9 0.79 -0.11 OUTSIDE the interval",
        "auc 0.9 0.88 -0.02 within the interval",
        "loss 0.9 0.9 0 equal",
        "gone 0.9 – –",
        "verdict NOT reproduced: a figure is outside the old one's interval",
        "code others",
        "packages not known",
        "images and roles the same",
        "workers 2; now 1",
        "not sent yet amint sync amint_runs/spool/x",
    ):
        assert cells.split() in lines


def test_a_figure_without_value_is_a_dash() -> None:
    assert interval({"value": None, "low": None, "high": None, "note": "too few"}) == "–"


def test_a_number_that_is_not_finite_is_null_in_json() -> None:
    found = {"rows": [(1.5, math.nan)], "low": -math.inf, "count": 3, "name": "NaN", "ok": True}
    out = io.StringIO()
    print_document(found, print_result, out, as_json=True)
    assert json.loads(out.getvalue(), parse_constant=pytest.fail) == {
        **found,
        "rows": [[1.5, None]],
        "low": None,
    }
