"""What waits on the disk: in order, each once, whatever ends the process that wrote it."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from amint_ray.tracking.spool import (
    InUseError,
    NoSpoolError,
    Record,
    Spool,
    SpooledRun,
    find_spools,
    metrics_told,
    newest_time,
    set_aside,
    steps_told,
)

RUN = SpooledRun("0" * 32, "digits-1", "http://127.0.0.1:5000")


def metric(step: int) -> Record:
    return {"kind": "metrics", "time": 1000 + step, "step": step, "values": {"a": step / 2}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spööl" / RUN.run_name


def test_what_was_not_sent_is_there_again_in_order(folder: Path) -> None:
    spool = Spool(folder, RUN)
    for step in range(5):
        spool.append(metric(step))
    spool.sent(2)
    spool.close()
    again = Spool(folder)
    assert again.run == RUN
    assert again.waiting() == [metric(2), metric(3), metric(4)]
    again.append(metric(5))
    again.sent(3)
    again.close()
    last = Spool(folder)
    assert last.waiting() == [metric(5)]
    last.close()


def test_nothing_stays_when_all_is_sent(folder: Path) -> None:
    spool = Spool(folder, RUN)
    spool.append(metric(1))
    place = spool.new_folder()
    (place / "figures.json").write_text("{}")
    spool.append({"kind": "files", "folder": place.name})
    spool.sent(1)
    assert place.is_dir()
    spool.sent(1)
    assert not place.exists()
    spool.close()
    assert not folder.parent.exists()
    with pytest.raises(NoSpoolError, match=r"spool\.json"):
        Spool(folder)


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_next_is_whole(folder: Path) -> None:
    spool = Spool(folder, RUN)
    spool.append(metric(1))
    spool.append(metric(2))
    spool.close()
    records = folder / "records.jsonl"
    records.write_bytes(records.read_bytes()[:-9])
    spool = Spool(folder)
    assert spool.waiting() == [metric(1)]
    spool.append(metric(3))
    spool.close()
    spool = Spool(folder)
    assert spool.waiting() == [metric(1), metric(3)]
    spool.close()


@pytest.mark.parametrize("name", ["spool.json", "records.jsonl"])
def test_damage_is_told_and_nothing_is_deleted(folder: Path, name: str) -> None:
    spool = Spool(folder, RUN)
    spool.append(metric(1))
    spool.close()
    (folder / name).write_text("{no JSON\n")
    with pytest.raises(NoSpoolError, match=name):
        Spool(folder)
    assert (folder / name).read_text() == "{no JSON\n"
    with pytest.raises(NoSpoolError):  # and no lock is left behind
        Spool(folder)


def test_a_count_of_a_file_that_is_gone_hides_nothing_that_is_new(folder: Path) -> None:
    spool = Spool(folder, RUN)
    spool.append(metric(1))
    spool.append(metric(2))
    spool.sent(1)
    spool.close()
    records = folder / "records.jsonl"
    records.write_bytes(records.read_bytes()[:10])  # what was written last is lost
    spool = Spool(folder)
    spool.append(metric(3))
    spool.close()
    spool = Spool(folder)
    assert spool.waiting() == [metric(3)]
    spool.close()


def _hold(folder: str, ready: multiprocessing.synchronize.Event) -> None:
    spool = Spool(Path(folder), RUN)
    spool.append(metric(1))
    ready.set()
    signal.pause()


def test_another_process_has_it_until_it_is_killed(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(folder), ready))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(InUseError, match="another process"):
            Spool(folder)
    finally:
        process.kill()
        process.join()
    spool = Spool(folder)
    assert spool.waiting() == [metric(1)]
    spool.close()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_nothing_that_can_still_be_sent(folder: Path, small_files: None) -> None:
    spool = Spool(folder, RUN)
    for step in range(4):  # 68 bytes each
        spool.append(metric(step))
    assert not spool.durable
    assert spool.waiting() == [metric(step) for step in range(4)]
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [metric(0), metric(1)]  # no half line
    spool.sent(3)
    spool.close()
    again = Spool(folder)
    assert again.waiting() == []  # two were sent, and the disk had no room for the last
    again.append(metric(7))
    assert again.waiting() == [metric(7)]
    again.close()


def test_a_disk_that_has_room_again_gets_what_waited(folder: Path) -> None:
    spool = Spool(folder, RUN)
    spool.append(metric(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        spool.append(metric(1))
        assert not spool.durable
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    spool.append(metric(2))
    assert spool.durable
    spool.sent(1)
    spool.close()
    again = Spool(folder)
    assert again.waiting() == [metric(1), metric(2)]
    again.close()


def test_a_folder_stays_where_it_cannot_be_noted_that_it_was_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(folder, RUN)
    place = spool.new_folder()
    spool.append({"kind": "files", "folder": place.name})

    def full(path: Path, text: str) -> None:
        raise OSError("no room")

    monkeypatch.setattr("amint_ray.tracking.spool._replace", full)
    spool.sent(1)
    assert place.is_dir()
    spool.close()


def test_what_waits_for_another_run_is_not_told_to_this_one(folder: Path) -> None:
    assert set_aside(folder, RUN.run_id) is None
    spool = Spool(folder, RUN)
    spool.append(metric(1))
    with pytest.raises(InUseError):
        set_aside(folder, "1" * 32)
    spool.close()
    assert set_aside(folder, RUN.run_id) is None
    aside = set_aside(folder, "1" * 32)
    assert aside == folder.with_name("digits-1.00000000")
    kept = Spool(aside)
    assert kept.waiting() == [metric(1)]
    kept.close()
    assert not folder.exists()


def test_spools_are_found(tmp_path: Path) -> None:
    for name in ("b", "a"):
        spool = Spool(tmp_path / name, RUN)
        spool.append(metric(1))
        spool.close()
    (tmp_path / "other").mkdir()
    assert find_spools(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert find_spools(tmp_path / "a") == [tmp_path / "a"]
    assert find_spools(tmp_path / "nothing") == []


def test_what_records_tell() -> None:
    records = [metric(3), {"kind": "status", "status": "KILLED", "time": 1700}, metric(2)]
    assert steps_told(records, "a") == {2, 3}
    assert steps_told(records, "b") == set()
    assert metrics_told(records) == {"a": 1.0}
    assert newest_time(records) == 1700
    assert newest_time([]) == 0


def test_records_are_lines_of_json(folder: Path) -> None:
    spool = Spool(folder, RUN)
    spool.append(metric(1))
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [metric(1)]
    spool.close()
