"""What a worker makes of full disks, slow storage and damaged checkpoints; Ray itself stands in."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from torch import distributed

from amint_ray.launch.context import RayContext
from amint_ray.launch.progress import Sender
from amint_ray.train.state import STATE, DamagedCheckpointError

SYNC, ASYNC = ray.train.CheckpointUploadMode.SYNC, ray.train.CheckpointUploadMode.ASYNC


class World:
    """Ray Train as one worker sees it; uploads never end."""

    def __init__(self, patch: pytest.MonkeyPatch, rank: int = 0, world_size: int = 1) -> None:
        self.reports: list[dict[str, Any]] = []
        self.said: list[str] = []
        told = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world_size)
        patch.setattr("ray.train.get_context", lambda: told)
        patch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
        patch.setattr("ray.train.report", lambda metrics, **rest: self.reports.append(rest))
        patch.setattr(Sender, "send", lambda sender, event: self.said.append(event["text"]))

    def staged(self) -> list[Path]:
        return [Path(report["checkpoint"].path) for report in self.reports if report]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return World(monkeypatch)


def fill(folder: Path) -> None:
    (folder / STATE).write_text("{}")


def test_no_more_than_two_checkpoints_wait_for_slow_storage(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = RayContext("run")
    for _ in range(4):
        assert context.report({}, fill)
    modes = [report["checkpoint_upload_mode"] for report in world.reports]
    assert modes == [ASYNC, ASYNC, SYNC, SYNC]
    assert world.said == []  # it took no time
    monkeypatch.setattr("amint_ray.launch.context._SECONDS_WORTH_A_WORD", -1.0)
    context.report({}, fill)
    context.report({}, fill)
    (text,) = world.said
    assert "the run waited 0 s for checkpoints to be brought to storage" in text

    for folder in world.staged():
        (folder / STATE).unlink()
        folder.rmdir()
    context.report({}, fill)
    assert world.reports[-1]["checkpoint_upload_mode"] is ASYNC


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_one_before_a_damaged_checkpoint_is_taken_whichever_is_best(
    best: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = []
    for second in range(4):
        folder = tmp_path / f"checkpoint_2026-01-01_12-00-0{second}.000001"
        folder.mkdir()
        (folder / STATE).write_text(json.dumps({"files": {}}))
        checkpoints.append(ray.train.Checkpoint.from_directory(folder))
    newest = checkpoints[-1]
    Path(newest.path, STATE).unlink()
    by_score = sorted(checkpoints, key=lambda checkpoint: checkpoint is checkpoints[best])
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: newest)
    monkeypatch.setattr(
        "ray.train.get_all_reported_checkpoints",
        lambda: [SimpleNamespace(checkpoint=checkpoint) for checkpoint in by_score],
    )
    with RayContext("run").latest_checkpoint() as taken:
        assert taken == Path(checkpoints[2].path)
    (text,) = world.said
    assert text.endswith(f"{STATE} is missing; the one before it is taken")
    for checkpoint in checkpoints[:3]:
        Path(checkpoint.path, STATE).unlink()
    context = RayContext("run")
    with pytest.raises(DamagedCheckpointError, match="--new"), context.latest_checkpoint():
        pass
    assert world.said[-1].endswith(f"{STATE} is missing; none is before it")


def test_another_runs_checkpoint_is_opened_where_this_run_has_none(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "another"
    folder.mkdir()
    (folder / STATE).write_text(json.dumps({"files": {}}))
    another = ray.train.Checkpoint.from_directory(folder)
    context = RayContext("run")
    own: list[ray.train.Checkpoint | None] = [None]
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: own[0])
    with context.inherited(another) as taken:
        assert taken == folder
    with context.inherited(None) as taken:
        assert taken is None
    (folder / STATE).unlink()
    with (
        pytest.raises(DamagedCheckpointError, match=f"another cannot be used: {STATE} is missing"),
        context.inherited(another),
    ):
        pass
    own[0] = another  # whatever it is: it was begun with the other, which nobody needs any more
    with context.inherited(another) as taken:
        assert taken is None


def report_together(rank: int, folder: Path) -> None:
    """A worker of two; the second one's disk takes nothing in the first try."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: f"machine-{rank}")
            world = World(patch, rank, 2)
            context = RayContext("run")
            written: list[Path] = []
            done = []
            for disk in ("/proc" if rank else str(folder), str(folder)):
                patch.setattr(tempfile, "tempdir", disk)
                done.append(context.report({}, written.append, everywhere=True))
        found = {
            "said": world.said,
            "done": done,
            "checkpoints": [bool(report) for report in world.reports],
            "written": len(written),
        }
        (folder / f"{rank}.json").write_text(json.dumps(found))
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_where_one_disk_is_full_all_workers_go_on_together(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=report_together, args=(rank, tmp_path)) for rank in range(2)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.join(timeout=10)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for found in (first, second):
        assert found["done"] == [False, True]
        assert found["checkpoints"] == [False, True]
        assert found["written"] == 1  # nobody began what another could not
    (text,) = first["said"]
    assert "could not be written to /proc of machine-1: [Errno" in text
    assert "machine-0" not in text
    assert second["said"] == []
