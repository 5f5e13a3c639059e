"""What a person sees while a search goes on."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from rich.console import Console

from amint_ray.contracts import SearchWatcher
from amint_ray.search_display import LiveSearchDisplay, PlainSearchDisplay, open_search_display

OBJECTIVES = [("membership.member.auc", "max"), ("task.accuracy", "max")]


def trial(number: int, state: str, auc: float | None = None, **changes: Any) -> dict[str, Any]:
    figures = {} if auc is None else {"membership.member.auc": {"value": auc}}
    return {
        "id": f"t{number:04}",
        "state": state,
        "baseline": False,
        "parameters": {"placement": "entry", "loss.lambda_mint": 0.01, "taps": '["a[0]", "b"]'},
        "seed": 0,
        "epoch": 3,
        "epochs": 40,
        "seconds": 75.0,
        "figures": figures,
        "violation": None,
        "reason": None,
        **changes,
    }


def follow(
    display: SearchWatcher, trials: Sequence[Mapping[str, Any]], *, planned: int = 60
) -> None:
    display.trials(trials, objectives=OBJECTIVES, planned=planned, concurrent=2)


def test_plain_form_tells_each_change_of_a_trial_once_and_all_of_them_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("amint_ray.search_display.time.monotonic", lambda: now)
    out = io.StringIO()
    display = PlainSearchDisplay(Console(file=out, width=40))
    first = [trial(0, "running", baseline=True), trial(1, "running"), trial(2, "waiting")]
    follow(display, first, planned=4)
    now = 114.0
    second = [trial(0, "done", 0.7), trial(1, "running"), trial(2, "running")]
    follow(display, second, planned=4)
    now = 116.0
    third = [
        trial(0, "done", 0.7),
        trial(1, "stopped", 0.6, violation=0.02),
        trial(2, "failed", reason="out of memory"),
    ]
    follow(display, third, planned=4)
    now = 190.0
    follow(display, third, planned=4)
    parameters = "placement=entry lambda_mint=0.01 taps=[a[0], b], seed 0"
    assert out.getvalue().splitlines() == [
        "amint: t0000 runs: plain training (λ₂ = 0), seed 0",
        f"amint: t0001 runs: {parameters}",
        "amint: 0:00  0 done, 0 stopped, 2 of 2 running, 2 waiting",
        "amint: t0000 done at epoch 3/40 after 1:15: member.auc 0.7, accuracy –",
        f"amint: t0002 runs: {parameters}",
        "amint: t0001 stopped at epoch 3/40 after 1:15: member.auc 0.6, accuracy –; "
        "breaks the constraint by 0.02",
        "amint: t0002 failed at epoch 3/40 after 1:15: out of memory",
        "amint: 0:16  1 done, 1 stopped, 1 failed, 0 of 2 running, 1 waiting; "
        "best t0000: member.auc 0.7, accuracy –",
    ]


def test_a_search_that_is_taken_up_again_counts_what_had_ended() -> None:
    out = io.StringIO()
    display = PlainSearchDisplay(Console(file=out, width=40))
    follow(display, [trial(i, "done", 0.7) for i in range(9)] + [trial(9, "running")])
    told = out.getvalue().splitlines()
    assert [line.split()[1] for line in told] == ["t0009", "0:00"]
    assert "9 done, 0 stopped, 1 of 2 running, 50 waiting; best t0000" in told[1]


def screen(trials: Sequence[Mapping[str, Any]], *, width: int, height: int) -> list[str]:
    """The lines of the last picture."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height)
    display = LiveSearchDisplay(console)
    try:
        display.phase("searching")
        follow(display, trials)
        out.seek(out.truncate(0))
        display._progress.refresh()
        text = out.getvalue()
    finally:
        display.close()
    text = text.split("\x1b[2K")[-1]  # what was drawn before is wiped line by line
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text).splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 10), (200, 60)])
def test_live_form_fits_the_screen_with_the_running_trials_first(width: int, height: int) -> None:
    trials = [trial(i, "done", i / 100) for i in range(40)]
    trials += [trial(i, "running", i / 100) for i in range(40, 43)]
    trials += [trial(i, "waiting") for i in range(43, 50)]
    trials[39]["violation"] = 0.1
    trials[38]["parameters"] = {"placement": "x" * 300}
    lines = screen(trials, width=width, height=height)
    assert len(lines) < height and max(map(len, lines)) <= width
    shown = [line.split()[:2] for line in lines if line.startswith("t00")]
    best = [[f"t{i:04}", "done"] for i in range(38, 30, -1)]
    running = [[f"t{i:04}", "running"] for i in (40, 41, 42)]
    assert shown == (running + best)[: height - 5]
    assert lines[0].split()[:5] == ["trial", "state", "epoch", "member.auc", "accuracy"]
    row = next(line for line in lines if line.startswith("t0041")).split()
    assert row[:6] == ["t0041", "running", "3/40", "0.41", "–", "1:15"]
    assert "40 done, 0 stopped, 3 of 2 running, 17 waiting" in lines[-2]
    assert "searching" in lines[-1]


def test_of_many_running_trials_the_best_that_are_done_keep_their_place() -> None:
    trials = [trial(i, "done", i / 100) for i in range(5)]
    trials += [trial(i, "running") for i in range(5, 300)]
    lines = screen(trials, width=80, height=24)
    shown = [line.split()[1] for line in lines if line.startswith("t0")]
    assert shown == ["running"] * 16 + ["done"] * 3


def test_a_trial_that_breaks_the_constraint_comes_after_all_that_keep_it() -> None:
    trials = [trial(0, "done", 0.9, violation=0.1), trial(1, "done", 0.5, violation=0.0)]
    shown = [line.split()[:2] for line in screen(trials, width=80, height=24) if "t0" in line]
    assert shown == [["t0001", "done"], ["t0000", "breaks"]]


def test_before_the_first_trial_there_is_only_the_phase() -> None:
    lines = screen([], width=80, height=24)
    assert len(lines) == 2 and "60 waiting" in lines[0]


def test_without_a_terminal_the_display_is_plain() -> None:
    beats: list[int] = []
    display = open_search_display(lambda: beats.append(1))
    assert isinstance(display, PlainSearchDisplay)
    display.phase("searching")
    assert beats == [1]
