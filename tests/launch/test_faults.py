"""Runs whose workers, nodes, storage and drivers die: real processes, killed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
from launch.commands import Command

from infra.local.stack import LocalStack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 25
RUN = ["train", "digits", f"train.epochs={EPOCHS}", "train.checkpoint_every=1", "--json"]
ONCE = list(range(1, EPOCHS + 1))


def told(uri: str, run_id: str) -> list[int]:
    """The steps at which MLflow was told of an epoch."""
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, "train/task_loss")
    return [point.step for point in history]


def weights(folder: Path) -> bytes:
    """Of the newest checkpoint below a folder of runs."""
    newest = max(folder.rglob("checkpoint_*/scores.parquet"), key=lambda path: path.parent.name)
    return newest.with_name("model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Command(folder, [*RUN, "cluster.workers=2"]).document()
    return weights(folder / "amint_runs")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack"), workers=2, cpus=1) as running:
        yield running


def train_workers(folder: Path) -> list[psutil.Process]:
    """Ray Train's workers on a stack's nodes."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("RAY_AUTH_TOKEN_PATH") == str(folder / "ray_token")
            if ours and "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def epochs_told(command: Command) -> int:
    return max(map(int, re.findall(r"epoch (\d+) ", command.stderr)), default=0)


def test_worker_node_and_storage_die_and_the_run_ends_as_if_nothing_had_happened(
    stack: LocalStack, undisturbed: bytes, tmp_path: Path
) -> None:
    """On object storage, below a name with a space and an umlaut."""
    arguments = [*RUN, "cluster.workers=2", "storage.path=s3://amint/my rüns"]
    command = Command(tmp_path, arguments, environment=stack.environment)
    command.wait_until(lambda: epochs_told(command) > 0)
    train_workers(stack.folder)[-1].kill()
    seen = len(re.findall("epoch ", command.stderr))
    command.wait_until(lambda: len(re.findall("epoch ", command.stderr)) > seen + 1)
    node = next(
        name
        for name, server in stack.nodes.items()
        if name != "head"
        and server.process is not None
        and any("TrainWorker" in " ".join(p.cmdline()) for p in server.process.children(True))
    )
    stack.remove_node(node, signal.SIGKILL)
    command.wait_until(lambda: len(train_workers(stack.folder)) == 2)
    stack.object_store.stop()
    time.sleep(6)
    stack.object_store.start()
    document = command.document()
    assert document["workers"] == 2
    assert command.leftovers() == []
    bucket = stack.folder / "s3/buckets/amint/my rüns"
    assert weights(bucket) == undisturbed
    assert len(list(bucket.rglob("checkpoint_*/state.json"))) == 2
    assert not list((bucket / "unfinished").rglob("*.json"))
    assert told(stack.environment["MLFLOW_TRACKING_URI"], document["run_id"]) == ONCE
    run = mlflow.MlflowClient(stack.environment["MLFLOW_TRACKING_URI"]).get_run(document["run_id"])
    assert run.info.status == "FINISHED"


def test_the_same_command_goes_on_where_a_killed_driver_was(
    undisturbed: bytes, tmp_path: Path
) -> None:
    """And takes the checkpoint before one that was cut short."""
    arguments = [*RUN, "cluster.workers=2"]
    killed = Command(tmp_path, arguments)
    killed.wait_until(lambda: len(list(tmp_path.rglob("checkpoint_*/state.json"))) == 2)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert killed.leftovers() == []
    newest = max(tmp_path.rglob("checkpoint_*/update.pt"), key=lambda path: path.parent.name)
    newest.write_bytes(newest.read_bytes()[:100])
    (run,) = (tmp_path / "amint_runs").glob("digits-*")

    command = Command(tmp_path, arguments)
    document = command.document()
    assert f"going on with run {run.name}" in command.stderr
    assert "update.pt is not as it was written; the one before it is taken" in command.stderr
    assert document["run_name"] == run.name
    assert document["resumed"] is True
    assert weights(tmp_path / "amint_runs") == undisturbed
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (only,) = mlflow.MlflowClient(uri).search_runs(["1"])
    assert (only.info.run_id, only.info.status) == (document["run_id"], "FINISHED")
    assert told(uri, document["run_id"]) == ONCE
    assert command.leftovers() == []
