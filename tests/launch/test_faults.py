"""Runs whose workers, nodes, storage and drivers die: real processes, killed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from launch.commands import Command, on_own_disk, train_workers

import amint_ray
from amint_ray.config.load import load_config
from infra.local.stack import LocalStack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 16
RUN = ["train", "digits", f"train.epochs={EPOCHS}", "train.checkpoint_every=1", "--json"]
RUN += ["data.confounder_check=false"]
# Secret codes, the key of which the driver alone has: whoever goes on must make them anew. With the
# recipe's own shares an epoch has no more steps than that of a binary head.
OWN_SHARES = load_config("digits").data.shares.model_dump()
RUN += [
    "mint.objective=keyed",
    "mint.key_env=SECRET_CODES",
    f"data.shares={json.dumps(OWN_SHARES)}",
]
KEY = {"SECRET_CODES": "5a" * 32}
# How long Ray Train waits for workers on a node that is dead, if it does not know that yet.
IMPATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}  # a minute by default
ONCE = list(range(1, EPOCHS + 1))


def steps_told(client: mlflow.MlflowClient, run_id: str) -> list[int]:
    """The steps of which MLflow knows the losses."""
    return [point.step for point in client.get_metric_history(run_id, "step/task_loss")]


def check_steps(client: mlflow.MlflowClient, run_id: str, *, lost: int = 0) -> None:
    """Every step's losses are there once, but for those that a killed driver had not told."""
    steps = steps_told(client, run_id)
    assert steps == sorted(set(steps))
    assert steps[-1] % EPOCHS == 0
    assert steps[-1] - len(steps) <= lost


def told(client: mlflow.MlflowClient, run_id: str) -> list[int]:
    """The steps at which MLflow was told of an epoch."""
    return [point.step for point in client.get_metric_history(run_id, "train/task_loss")]


def weights(folder: Path) -> bytes:
    """Of the newest checkpoint below a folder of runs."""
    newest = max(folder.rglob("checkpoint_*/scores.parquet"), key=lambda path: path.parent.name)
    return newest.with_name("model.safetensors").read_bytes()


# The disk is full until the ballast goes. A few KiB are
# left: Python takes another folder for temporary files if it can write nothing at all.
BALLAST = 'dd if=/dev/zero of="$0/ballast" bs=1k count=16320 2>&-'


@dataclass(frozen=True)
class WithoutKills:
    """A run that is never begun again: it tells no MLflow, and keeps its best checkpoints.

    Attributes:
        disk: where its temporary files go, which is full at first; None where nobody may mount one.
    """

    command: Command
    document: dict[str, Any]
    disk: Path | None

    @property
    def weights(self) -> bytes:
        return weights(self.command.folder / "amint_runs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> WithoutKills:
    """Of its neighbours only what a full disk costs: checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    disk: Path | None = folder / "small disk"
    disk.mkdir()
    try:
        within = on_own_disk(disk, "-o size=16m", BALLAST)
        environment = {"TMPDIR": str(disk), "RAY_TMPDIR": tempfile.gettempdir()}
    except pytest.skip.Exception:
        disk, within, environment = None, (), {}
    best = "storage.keep_best=calibration/task_loss"
    command = Command(
        folder,
        [*RUN, "cluster.workers=2", best, "tracking.enabled=false"],
        # Nobody would answer there.
        environment={**KEY, **environment, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
        within=within,
    )
    if disk is not None:
        command.wait_until(lambda: full(disk) in command.stderr)
        Path(f"/proc/{command.process.pid}/root{disk}/ballast").unlink()
    return WithoutKills(command, command.document(), disk)


def full(disk: Path) -> str:
    return f"a checkpoint could not be written to {disk}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack"), workers=0, cpus=1) as running:
        yield running


def newest_checkpoint(folder: Path) -> str:
    """The name, which is a date, of the newest one that is whole; "" where there is none."""
    found = [file.parent.name for file in folder.rglob("checkpoint_*/state.json")]
    return max(found, default="")


def listed_checkpoints(folder: Path) -> list[str]:
    """The names of those that Ray knows; one that is whole may not be among them yet."""
    for file in folder.rglob("checkpoint_manager_snapshot.json"):
        with contextlib.suppress(json.JSONDecodeError):  # it is being written
            listed = json.loads(file.read_text())["checkpoint_results"]
            return [result["checkpoint_dir_name"] for result in listed]
    return []


def storage_dies_in_mid_upload(stack: LocalStack, *, seconds: float) -> None:
    """Halted until an upload has begun, which is soon; then killed, and away for a while."""
    assert stack.object_store.pid is not None
    server = psutil.Process(stack.object_store.pid)
    server.suspend()
    time.sleep(5)  # several epochs, each with a checkpoint
    server.kill()
    server.wait()
    stack.object_store.stop()
    time.sleep(seconds)
    stack.object_store.start()


def test_a_run_keeps_its_best_checkpoints_and_the_last(undisturbed: WithoutKills) -> None:
    files = undisturbed.command.folder.rglob("checkpoint_*/state.json")
    states = [json.loads(path.read_text()) for path in files]
    history = max(states, key=lambda state: int(state["epoch"]))["history"]
    assert [entry["epoch"] for entry in history] == ONCE
    ranked = sorted(history, key=lambda entry: float(entry["calibration/task_loss"]))
    best = {entry["epoch"] for entry in ranked[:2]}
    assert {state["epoch"] for state in states} == best | {EPOCHS}


def test_a_full_disk_costs_checkpoints_and_not_the_run(undisturbed: WithoutKills) -> None:
    """The runs below, which had room, end with the same weights."""
    if undisturbed.disk is None:
        pytest.skip("this machine lets nobody mount a disk of his own")
    said = undisturbed.command.stderr
    assert full(undisturbed.disk) in said
    assert "No space left on device" in said
    assert "make room there, or set TMPDIR" in said
    assert undisturbed.command.leftovers() == []


def test_without_mlflow_the_model_lies_beside_the_checkpoints(undisturbed: WithoutKills) -> None:
    document, where = undisturbed.document, undisturbed.command.folder
    assert document["run_id"] is None
    assert document["model_uri"] is None
    assert document["waiting"] is None
    folder = where / "amint_runs" / document["run_name"]
    assert {path.name for path in (folder / "files").iterdir()} >= {"roc.png", "scores.parquet"}
    model = amint_ray.load(str(folder / "model"))
    assert document["load"] == f'amint_ray.load("{folder / "model"}")'
    assert len(model.preprocessing.class_names) == 10
    assert model.preprocessing.code is not None
    assert document["membership"]["member"]["match_rate"]["low"] > 0.5
    assert document["membership"]["member"]["null_match_rate"]["low"] < 0.5
    assert not (where / "mlflow.db").exists()
    assert not (where / "mlruns").exists()
    assert not (where / "amint_runs" / "spool").exists()


def test_killed_three_times_and_without_storage_a_run_ends_as_if_nothing_had_happened(
    stack: LocalStack, undisturbed: WithoutKills, tmp_path: Path
) -> None:
    """A worker, a node and the driver; on object storage, below a name with a space and an umlaut.

    The same command goes on where the driver was, from the checkpoint before one that was cut.
    """
    arguments = [*RUN, "cluster.workers=2", "storage.path=s3://amint/my rüns"]
    # Of three, the oldest may be half deleted when the driver dies, and the newest is cut below.
    arguments += ["cluster.wait_seconds=300", "storage.keep=3"]
    environment = {**stack.environment, **IMPATIENT, **KEY}
    killed = Command(tmp_path, arguments, environment=environment)
    # The cluster is too small at first, and is waited for.
    killed.wait_until(lambda: "waiting up to 300 s for it" in killed.stderr)
    stack.add_node("worker-1")
    bucket = stack.folder / "s3/buckets/amint/my rüns"

    def wait_for_another_checkpoint() -> None:
        seen = newest_checkpoint(bucket)
        killed.wait_until(lambda: newest_checkpoint(bucket) > seen)

    wait_for_another_checkpoint()
    train_workers(stack.folder)[-1].kill()
    wait_for_another_checkpoint()
    stack.remove_node("worker-1", signal.SIGKILL)
    lacking = "no workers are running; cluster.workers = 2: the cluster has 1 cores and 0 GPUs"
    killed.wait_until(lambda: lacking in killed.stderr)
    stack.add_node("worker-1")
    wait_for_another_checkpoint()
    storage_dies_in_mid_upload(stack, seconds=30)
    wait_for_another_checkpoint()
    (run,) = bucket.glob("digits-*")
    client = mlflow.MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])
    (only,) = client.search_runs(["1"], f"attributes.run_name = '{run.name}'")
    killed.wait_until(lambda: bool(steps_told(client, only.info.run_id)))
    steps = steps_told(client, only.info.run_id)
    assert steps == list(range(1, len(steps) + 1))  # so far nothing is lost or told twice
    killed.wait_until(lambda: len(listed_checkpoints(bucket)) == 3)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert killed.leftovers() == []
    psutil.wait_procs(train_workers(stack.folder), timeout=60)
    assert train_workers(stack.folder) == []
    (newest,) = bucket.rglob(f"{max(listed_checkpoints(bucket))}/optimizer.pt")
    newest.write_bytes(newest.read_bytes()[:100])

    command = Command(tmp_path, arguments, environment=environment)
    document = command.document()
    assert f"going on with run {run.name}" in command.stderr
    assert "optimizer.pt is not as it was written; the one before it is taken" in command.stderr
    assert document["run_name"] == run.name
    assert document["resumed"] is True
    assert document["workers"] == 2
    assert document["membership"] == undisturbed.document["membership"]
    assert command.leftovers() == []
    assert weights(bucket) == undisturbed.weights
    assert len(list(bucket.rglob("checkpoint_*/state.json"))) == 3
    assert not list((bucket / "unfinished").rglob("*.json"))
    (only,) = client.search_runs(["1"], f"attributes.run_name = '{run.name}'")
    assert (only.info.run_id, only.info.status) == (document["run_id"], "FINISHED")
    assert told(client, document["run_id"]) == ONCE
    # What the killed driver had just taken off the workers may be gone with it.
    check_steps(client, document["run_id"], lost=40)


def test_workers_leave_with_their_node_and_come_back_with_it(
    stack: LocalStack, tmp_path: Path
) -> None:
    """A sharded model: each number of workers takes the checkpoint of the one before."""
    if "worker-1" not in stack.nodes:
        stack.add_node("worker-1")
    settings = ["train.parallel=fsdp", "cluster.workers=[1,3]", "cluster.resize_seconds=2"]
    arguments = [*RUN, *settings, "storage.path=s3://amint/elastic"]
    command = Command(tmp_path, arguments, environment={**stack.environment, **IMPATIENT, **KEY})
    bucket = stack.folder / "s3/buckets/amint/elastic"
    command.wait_until(lambda: len(listed_checkpoints(bucket)) > 1)
    assert len(train_workers(stack.folder)) == 2
    stack.remove_node("worker-1", signal.SIGKILL)
    command.wait_until(lambda: "1 worker goes on after epoch" in command.stderr)
    halted = train_workers(stack.folder)  # or the run might end before the node is there
    for worker in halted:
        worker.suspend()
    stack.add_node("worker-1")
    for worker in halted:
        worker.resume()
    document = command.document()
    assert "2 workers go on after epoch" in command.stderr.partition("1 worker goes on")[2]
    assert document["workers"] == 2
    assert command.leftovers() == []
    client = mlflow.MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])
    assert told(client, document["run_id"]) == ONCE
    check_steps(client, document["run_id"])
    losses = client.get_metric_history(document["run_id"], "train/task_loss")
    assert all(math.isfinite(point.value) for point in losses)
    assert losses[-1].value < 0.1 < losses[0].value
