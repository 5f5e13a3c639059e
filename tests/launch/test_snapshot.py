"""Ray's list of a run's checkpoints, written and read by Ray's own code and damaged in between."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launch.silent import Silent
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from amint_ray.launch.snapshot import mend_snapshot
from amint_ray.storage import Location, delete, locate, open_input, write_atomically
from infra.local.object_store import ObjectStore

SNAPSHOT = "checkpoint_manager_snapshot.json"
BEST = "calibration/task_loss"
LOSSES = [0.3, 0.1, 0.2]
NAMES = [f"checkpoint_2026-01-0{n}_00-00-00.000000" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def bucket(object_store: ObjectStore) -> Iterator[Location]:
    object_store.make_bucket("snapshots")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        yield locate("s3://snapshots", "test")


@pytest.fixture(params=["folder", "S3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "folder":
        return locate(str(tmp_path), "test")
    bucket: Location = request.getfixturevalue("bucket")
    return bucket.below(tmp_path.name)


def metrics(number: int) -> dict[str, Any]:
    """Of a checkpoint; the last one was made within an epoch."""
    return {"epoch": 2, "step": 7} if number == 2 else {"epoch": number + 1, BEST: LOSSES[number]}


def manager(storage: Location, best: str | None = None) -> CheckpointManager:
    filesystem = storage.filesystem if storage.remote else None
    context = StorageContext(storage.path, "digits-1", storage_filesystem=filesystem)
    options = {"checkpoint_score_attribute": best, "checkpoint_score_order": "min"} if best else {}
    return CheckpointManager(CheckpointConfig(num_to_keep=3, **options), context)


def listed(storage: Location, best: str | None = None) -> tuple[list[tuple[str, Any]], str | None]:
    """What Ray makes of the list: names and metrics, worst first; and the newest."""
    found = manager(storage, best)
    latest = found.latest_checkpoint_result
    return (
        [(r.checkpoint.path[-len(NAMES[0]) :], r.metrics) for r in found._checkpoint_results],
        None if latest is None else latest.checkpoint.path[-len(NAMES[0]) :],
    )


def a_run(storage: Location, best: str | None = None) -> Location:
    """Three checkpoints and the list that Ray writes of them."""
    run = storage.below("digits-1")
    for number, name in enumerate(NAMES):
        weights = b"weights %d" % number
        said = metrics(number)
        state = {
            "epoch": said["epoch"],
            "step": said.get("step", 0),
            "history": [metrics(n) for n in range(min(number + 1, 2))],
            "files": {"model.safetensors": [len(weights), zlib.crc32(weights)]},
        }
        for file_name, content in (
            ("model.safetensors", weights),
            ("state.json", json.dumps(state).encode()),
        ):
            with write_atomically(run, f"{name}/{file_name}") as file:
                file.write(content)

    async def report() -> None:
        ray = manager(storage, best)
        for number, name in enumerate(NAMES):
            checkpoint = Checkpoint(f"{run.path}/{name}", run.filesystem)
            ray.register_checkpoint(_TrainingReport(checkpoint, metrics(number), validation=False))

    asyncio.run(report())
    return run


def cut(run: Location) -> None:
    with open_input(run, SNAPSHOT) as file:
        text = file.read()
    with write_atomically(run, SNAPSHOT) as file:
        file.write(text[: len(text) // 2])


def emptied(run: Location) -> None:
    with write_atomically(run, SNAPSHOT):
        pass


def without(*numbers: int) -> Callable[[Location], None]:
    def remove(run: Location) -> None:
        for number in numbers:
            run.filesystem.delete_dir(f"{run.path}/{NAMES[number]}")

    return remove


@pytest.mark.parametrize(
    ("damage", "left", "words"),
    [
        (cut, [0, 1, 2], "damaged; it is made anew"),
        (emptied, [0, 1, 2], "damaged; it is made anew"),
        (without(2), [0, 1], f"{NAMES[2]} is gone"),
        (without(0, 1), [2], f"{NAMES[0]}, {NAMES[1]} is gone"),
    ],
)
@pytest.mark.parametrize("best", [None, BEST])
def test_a_list_that_ray_refuses_is_mended(
    storage: Location,
    damage: Callable[[Location], None],
    left: list[int],
    words: str,
    best: str | None,
) -> None:
    run, watcher = a_run(storage, best), Silent()
    expected = [n for n in ([2, 0, 1] if best else [0, 1, 2]) if n in left]
    before = listed(storage, best)
    mend_snapshot(run, watcher, keep_best=best)
    assert (listed(storage, best), watcher.notices) == (before, [])
    damage(run)
    with pytest.raises(CheckpointManagerInitializationError):
        manager(storage, best)
    mend_snapshot(run, watcher, keep_best=best)
    found, latest = listed(storage, best)
    assert found == [(NAMES[n], metrics(n)) for n in expected]
    assert latest == NAMES[max(left)]
    assert len(watcher.notices) == 1 and words in watcher.notices[0]


def test_what_is_not_whole_is_left_out(storage: Location) -> None:
    run, watcher = a_run(storage), Silent()
    cut(run)
    with write_atomically(run, f"{NAMES[2]}/model.safetensors") as file:
        file.write(b"weig")
    delete(run, f"{NAMES[0]}/state.json")
    mend_snapshot(run, watcher, keep_best=None)
    assert listed(storage) == ([(NAMES[1], metrics(1))], NAMES[1])
    cut(run)
    delete(run, f"{NAMES[1]}/model.safetensors")
    mend_snapshot(run, watcher, keep_best=None)
    assert watcher.notices[-1] == "no checkpoint of the run is whole; it begins anew"
    assert listed(storage) == ([], None)


def test_a_run_that_has_no_list_yet(storage: Location) -> None:
    watcher = Silent()
    mend_snapshot(storage.below("digits-1"), watcher, keep_best=None)
    assert watcher.notices == []
    run = a_run(storage)
    delete(run, SNAPSHOT)  # the machine died between the first checkpoint and its list
    mend_snapshot(run, watcher, keep_best=None)
    assert listed(storage)[1] == NAMES[2]
