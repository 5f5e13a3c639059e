"""What is known of trials: taken in once, kept, and read again."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from launch.searches import AUC, ledger_in, measured, place

from amint_ray.contracts import RunError
from amint_ray.launch.ledger import Ledger, TrialRecord, check_outcome, common_reason


def record(identity: str = "t0000", configuration: int = 0) -> TrialRecord:
    return TrialRecord(identity, configuration, 7, {"mint.taps": '["a"]'}, {"mint.taps": ["a"]})


def test_a_look_is_taken_in_once() -> None:
    trial = record()
    trial.looked(2, {**measured(auc=0.7), "no_interval": 3.0}, None)
    trial.looked(4, measured(auc=0.8), 0.25)
    told = asdict(trial)
    for epoch in (4, 2):  # a trial that is tried again repeats what it said
        trial.looked(epoch, measured(auc=0.1), None)
    assert asdict(trial) == told
    assert (trial.epoch, trial.violation) == (4, 0.25)
    assert trial.figures == {AUC: {"value": 0.8, "low": 0.79, "high": 0.81}}
    assert trial.history == [{"epoch": 2, AUC: 0.7}, {"epoch": 4, AUC: 0.8, "violation": 0.25}]


def test_what_ended_has_ended(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    ledger.add(record())
    ledger.begin("t0000")
    assert not ledger.trials["t0000"].ended
    ledger.end("t0000", "failed", "no memory")
    seconds = ledger.trials["t0000"].seconds
    ledger.end("t0000", "done")
    ended = ledger.trials["t0000"]
    assert (ended.state, ended.reason, ended.tries) == ("failed", "no memory", 1)
    assert ended.seconds == seconds > 0


def test_a_trial_that_is_tried_again_counts_tries_and_seconds() -> None:
    ledger = Ledger(None)
    ledger.add(record())
    ledger.begin("t0000")
    assert ledger.trials["t0000"].seconds == 0
    ledger.begin("t0000")
    first = ledger.trials["t0000"].seconds
    (running,) = ledger.documents()
    assert running["seconds"] > first > 0
    assert running["tries"] == 2


def test_another_driver_reads_what_was_written(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    for number in (1, 0):
        ledger.add(record(f"t000{number}", number))
    ledger.begin("t0001")
    with ledger.changing("t0001") as changed:
        changed.looked(3, measured(auc=0.8), 0.5)
        changed.run_id = "abc"
    ledger.end("t0001", "stopped", "no time left")
    again = ledger_in(tmp_path)
    assert again.trials == ledger.trials
    assert again.documents() == ledger.documents()
    assert [found.id for found in again.where(lambda t: True)] == ["t0000", "t0001"]
    assert [found.id for found in again.where(lambda t: t.ended)] == ["t0001"]


def test_a_damaged_file_is_named_and_its_trial_forgotten(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    for number in range(3):
        ledger.add(record(f"t000{number}", number))
    folder = tmp_path / "trials"
    whole = (folder / "t0001.json").read_bytes()
    for name, content in {
        "t0001": whole[: len(whole) // 2],
        "t0002": b"",
        "t0003": b'{"id": "t0003", "of_another_version": 1}',
        "t0004": b"null",
        "t0005": whole,
        "t0006": whole.replace(b'"t0001"', b'"t0006"').replace(b'"history": []', b'"history": 5'),
        "t0007": b"\xff",
        "plain-0": whole.replace(b'"t0001"', b'"plain-0"'),
        "t0001 (copy)": whole,  # which is no trial's file
        "notes": b"",
    }.items():
        (folder / f"{name}.json").write_bytes(content)
    again = Ledger(place(tmp_path))
    damaged = again.load()
    assert set(again.trials) == {"t0000"}
    assert set(damaged) == {*(f"t000{number}" for number in range(1, 8)), "plain-0"}
    assert damaged["t0005"] == "it is of trial t0001, baseline = False"
    assert "history" in damaged["t0006"]
    assert not any("\n" in reason for reason in damaged.values())


def test_a_folder_that_is_not_there_has_no_trials(tmp_path: Path) -> None:
    ledger = Ledger(place(tmp_path).below("none"))
    ledger.load()
    assert ledger.documents() == []


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        (["a", "b\nat line 3", "b\nat line 3"], "b"),
        (["b", "a", "b", "a"], "b"),
        ([None, "a", None], "unknown"),
    ],
)
def test_the_common_reason(reasons: list[str | None], told: str) -> None:
    failed = [record(f"t{number}") for number in range(len(reasons))]
    for trial, reason in zip(failed, reasons, strict=True):
        trial.reason = reason
    assert common_reason(failed) == told


def test_where_all_failed_the_way_out_is_told() -> None:
    ledger = Ledger(None)
    named = "training failed: loss nan; samples of the batch: a, b, c, d, e"
    for number in range(2):
        ledger.add(record(f"t{number:04d}"))
        ledger.end(f"t{number:04d}", "failed", named)
    with pytest.raises(RunError) as told:
        check_outcome(ledger)
    assert str(told.value).startswith(
        "search: all 2 trials failed: training failed: loss nan; samples of the batch: a, b, c and "
        "2 more; failed trials are not tried again: "
    )
    assert "--new" in str(told.value) and "name=OTHER" in str(told.value)
    ledger.add(record("t0002"))
    ledger.end("t0002", "failed", "another")
    with pytest.raises(RunError, match="all 3 trials failed, most of them so: training failed"):
        check_outcome(ledger)


def test_a_trial_that_storage_did_not_take_is_written_down_later(tmp_path: Path) -> None:
    folder = tmp_path / "trials"
    ledger = Ledger(place(tmp_path))
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("in the way")  # as good as storage that is away
    ledger.add(record())
    ledger.begin("t0000")
    with pytest.raises(OSError):
        ledger.catch_up()
    folder.unlink()
    ledger.catch_up()
    again = Ledger(place(tmp_path))
    again.load()
    assert again.trials["t0000"].state == "running"
