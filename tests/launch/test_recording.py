"""What a run's records are: each epoch, step and figure once, at times that never go back."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launch.silent import Silent

from amint_ray.contracts import RunError, UserError
from amint_ray.launch.recording import Recording
from amint_ray.launch.records import RunRecords
from amint_ray.tracking.run_log import EPOCH_METRIC, STEP_METRIC, OpenedRun
from amint_ray.tracking.spool import Record, Spool, SpooledRun

RUN = SpooledRun("a" * 32, "r", "http://127.0.0.1:9")


class Kept:
    """Takes records as a server would, or refuses them."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.records: list[Record] = []
        self.refuses = False

    def __call__(self, records: Sequence[Record]) -> int:
        if self.refuses:
            raise ConnectionError("nobody there")
        self.records.append(records[0])
        return 1

    def points(self, metric: str) -> list[tuple[int, float]]:
        return [
            (record["step"], record["values"][metric])
            for record in self.records
            if metric in record.get("values", {})
        ]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def opening(tmp_path: Path, kept: Kept) -> Callable[..., Recording]:
    def make(run: OpenedRun, *, steps_per_point: int = 1) -> Recording:
        return Recording(
            lambda: RunRecords(
                run, Spool(tmp_path / "spool" / "r", RUN), kept, steps_per_point=steps_per_point
            )
        )

    return make


def epoch(number: int) -> dict[str, float]:
    return {"phase": "epoch", "epoch": number, EPOCH_METRIC: number / 8}  # type: ignore[dict-item]


def sums(task_loss: float) -> list[float]:
    """Of 4 rows of D, of which the head was told 2."""
    return [4 * task_loss, 1.0, 4.0, 2 * task_loss, 2.0, 0.0, 0.0]


def test_a_new_run_is_told_everything_once(
    opening: Callable[..., Recording], kept: Kept, tmp_path: Path
) -> None:
    run = opening(OpenedRun("a" * 32, started=0))
    run.hear({"phase": "steps", "first": 1, "sums": [sums(1.0), sums(2.0)]})
    run.hear(epoch(1))
    # A worker died, and what came of it was lost: trained again from the last checkpoint.
    run.hear({"phase": "steps", "first": 2, "sums": [sums(2.0), sums(3.0)]})
    run.hear(epoch(1))
    run.hear(epoch(2))
    figures = {"task": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    run.tell_figures(figures, step=2)
    versions, waiting = run.finish(Silent(), wait_seconds=1)
    assert (versions, waiting) == ({}, None)
    assert kept.points(EPOCH_METRIC) == [(1, 1 / 8), (2, 2 / 8)]
    assert kept.points(STEP_METRIC) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert kept.points("step/mint_loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert kept.points("task.accuracy.high") == [(2, 0.6)]
    assert kept.records[-1]["status"] == "FINISHED"
    assert list(tmp_path.iterdir()) == []  # nor the folder of spools


def test_points_are_means_over_steps(opening: Callable[..., Recording], kept: Kept) -> None:
    run = opening(OpenedRun("a" * 32, started=0), steps_per_point=2)
    run.hear({"phase": "steps", "first": 1, "sums": [sums(1.0), sums(2.0), sums(3.0)]})
    run.hear({"phase": "steps", "first": 4, "sums": [sums(6.0), sums(9.0)]})
    run.finish(Silent(), wait_seconds=1)
    assert kept.points(STEP_METRIC) == [(2, 1.5), (4, 4.5), (5, 9.0)]  # and what was left


def test_a_run_without_its_head_has_no_loss_of_it(
    opening: Callable[..., Recording], kept: Kept
) -> None:
    run = opening(OpenedRun("a" * 32, started=0))
    run.hear({"phase": "steps", "first": 1, "sums": [[4.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0]]})
    run.finish(Silent(), wait_seconds=1)
    assert kept.records[0]["values"] == {STEP_METRIC: 1.0}


def test_a_run_that_goes_on_is_not_told_again(
    opening: Callable[..., Recording], kept: Kept
) -> None:
    known = {EPOCH_METRIC: 0.25, "task.accuracy": 0.5, "task.accuracy.low": 0.3}
    told = frozenset({1, 3})  # news of the second was lost
    run = opening(OpenedRun("a" * 32, 0, True, epochs=told, last_step=6, metrics=known))
    for number in (3, 4, 1, 2, 3, 4):
        run.hear(epoch(number))
    run.hear({"phase": "steps", "first": 5, "sums": [sums(float(step)) for step in (5, 6, 7)]})
    figures = {"task": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    run.tell_figures(figures, step=3)
    run.finish(Silent(), wait_seconds=1)
    assert kept.points(EPOCH_METRIC) == [(4, 4 / 8), (2, 2 / 8)]
    assert kept.points(STEP_METRIC) == [(7, 7.0)]
    assert kept.points("task.accuracy") == []
    assert kept.points("task.accuracy.low") == [(3, 0.4)]  # evaluated otherwise


def test_steps_that_are_lost_are_named(opening: Callable[..., Recording], kept: Kept) -> None:
    watcher = Silent()
    run = opening(OpenedRun("a" * 32, started=0), steps_per_point=3)
    run.hear({"phase": "steps", "first": 1, "sums": [sums(1.0)]})
    run.hear({"phase": "steps", "first": 5, "sums": [sums(2.0), sums(4.0)]})
    run.finish(watcher, wait_seconds=1)
    assert watcher.notices == ["the losses of steps 2 to 4 are not known"]
    assert kept.points(STEP_METRIC) == [(1, 1.0), (6, 3.0)]


def test_what_waits_from_before_counts_as_told(
    opening: Callable[..., Recording], kept: Kept
) -> None:
    kept.refuses = True
    before = opening(OpenedRun("a" * 32, started=0))
    before.hear(epoch(1))
    before.hear({"phase": "steps", "first": 1, "sums": [sums(1.0), sums(2.0)]})
    watcher = Silent()
    _, waiting = before.finish(watcher, wait_seconds=0.2)
    assert waiting is not None and waiting.is_dir()
    assert "nobody there" in watcher.notices[-1]
    assert f"amint sync {waiting}" in watcher.notices[-1]
    kept.refuses = False
    after = opening(OpenedRun("a" * 32, 0, True))
    after.hear(epoch(1))
    after.hear(epoch(2))
    after.hear({"phase": "steps", "first": 2, "sums": [sums(2.0), sums(3.0)]})
    assert after.finish(Silent(), wait_seconds=1) == ({}, None)
    assert [step for step, _ in kept.points(EPOCH_METRIC)] == [1, 2]
    assert [step for step, _ in kept.points(STEP_METRIC)] == [1, 2, 3]


def test_a_clock_that_goes_back_leaves_times_in_order(
    opening: Callable[..., Recording], kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.chain([2000.0, 2001.0, 500.0, 501.0], itertools.repeat(502.0))
    run = opening(OpenedRun("a" * 32, started=1_999_000))
    assert run.run_id == "a" * 32  # it is open, before the clock is changed
    monkeypatch.setattr("amint_ray.launch.records.time.time", lambda: next(clock))
    for number in range(1, 4):
        run.hear(epoch(number))
    run.hear({"phase": "machine", "node": 0, "values": {"cpu_utilization_percentage": 50.0}})
    run.hear({"phase": "machine", "node": 2, "values": {"cpu_utilization_percentage": 60.0}})
    run.finish(Silent(), wait_seconds=1)
    times = [record["time"] for record in kept.records]
    assert times == [2_000_000] + [2_001_000] * 5
    assert kept.points("system/cpu_utilization_percentage") == [(2, 50.0)]
    assert kept.points("system/node_2/cpu_utilization_percentage") == [(2, 60.0)]


def test_a_run_that_ends_badly_is_marked(opening: Callable[..., Recording], kept: Kept) -> None:
    watcher = Silent()
    run = opening(OpenedRun("a" * 32, started=0))
    run.hear(epoch(1))
    run.mark("KILLED", watcher)
    assert [record.get("status") for record in kept.records] == [None, "KILLED"]
    assert watcher.notices == [f"MLflow run {'a' * 32} is marked KILLED"]


def test_a_trial_s_run_that_has_arrived_leaves_no_thread(opening: Callable[..., Recording]) -> None:
    before = set(threading.enumerate())
    run, deadline = opening(OpenedRun("a" * 32, started=0)), time.monotonic() + 10
    run.hear(epoch(1))
    run.end("KILLED", {})
    while not run.arrived():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_one_that_is_stopped_while_it_is_sent_stays_finished(
    opening: Callable[..., Recording], kept: Kept
) -> None:
    class Impatient(Silent):
        def heartbeat(self) -> None:
            raise KeyboardInterrupt

    kept.refuses = True
    watcher = Impatient()
    run = opening(OpenedRun("a" * 32, started=0))
    with pytest.raises(KeyboardInterrupt):
        run.finish(watcher, wait_seconds=60)
    kept.refuses = False
    run.mark("KILLED", watcher)
    assert [record["status"] for record in kept.records] == ["FINISHED"]
    assert watcher.notices[-1] == f"MLflow run {'a' * 32} is marked FINISHED"


def test_files_that_storage_does_not_take_fail_a_run_that_has_no_other_place(
    opening: Callable[..., Recording], kept: Kept
) -> None:
    kept.refuses = True
    run = opening(OpenedRun("", started=0))
    with pytest.raises(RunError, match=r"storage\.path does not take .*nobody there"):
        run.finish(Silent(), wait_seconds=0)


def test_a_run_that_cannot_be_opened_says_so_once(tmp_path: Path) -> None:
    def fails() -> RunRecords:
        raise UserError("tracking: MLflow takes no run")

    run, watcher = Recording(fails), Silent()
    run.hear(epoch(1))
    with pytest.raises(UserError, match="takes no run"):
        while True:
            run.check(watcher)
    run.mark("FAILED", watcher)
    assert watcher.notices == []
