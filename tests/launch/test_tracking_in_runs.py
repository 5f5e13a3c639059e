"""Runs and their MLflow, which dies, comes back, or is not wanted: real servers and processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
from launch.commands import Command

from amint_ray.cli import main
from infra.local.stack import LocalStack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 110
SECONDS_AWAY = 25.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """MLflow on PostgreSQL, its artifacts in S3."""
    with LocalStack(tmp_path_factory.mktemp("servers"), ray=False) as stack:
        yield stack


def test_mlflow_is_away_for_a_while_and_then_for_good(
    servers: LocalStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri = servers.environment["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    client = mlflow.MlflowClient(uri)
    command = Command(
        tmp_path,
        [
            *("train", "digits", f"train.epochs={EPOCHS}", "train.checkpoint_every=50"),
            *("cluster.workers=1", "data.confounder_check=false", "tracking.wait_seconds=3"),
            *("tracking.system_seconds=1", "train.batch_size=120", "--json"),
        ],
        # No S3 keys: artifacts go through MLflow's server.
        environment={"MLFLOW_TRACKING_URI": uri},
    )

    def epochs() -> list[int]:
        return steps(client, run_id, "train/task_loss")

    try:
        record = tmp_path / "amint_runs"
        command.wait_until(lambda: bool(list(record.glob("*/run.json"))))
        (found,) = record.glob("*/run.json")
        run_id = json.loads(found.read_text())["mlflow_run_id"]
        command.wait_until(lambda: len(epochs()) > 3)
        servers.kill_mlflow()
        killed = time.monotonic()
        command.wait_until(lambda: time.monotonic() > killed + 10)
        (worker,) = command.descendants("RayTrainWorker")
        worker.suspend()  # it has gone on without MLflow, and need not use up its epochs
        command.wait_until(lambda: time.monotonic() > killed + SECONDS_AWAY)
        servers.start_mlflow()
        worker.resume()
        before = len(epochs())
        command.wait_until(lambda: len(epochs()) > before + 10)  # what waited, and what is new
        told = epochs()
        servers.kill_mlflow()
        document = command.document()
        capfd.readouterr()
        down = main(["sync"])
        refused = capfd.readouterr().err
    finally:
        command.process.kill()
        servers.start_mlflow()
    assert down == 2
    assert refused.startswith("amint: tracking: no MLflow server answers at")
    assert refused.count("\n") == 1
    assert told == list(range(1, len(told) + 1))
    assert command.stderr.count("MLflow takes no records") == 2
    assert command.stderr.count("MLflow takes records again") == 1
    assert "not yet registered" in command.stderr
    assert document["run_id"] == run_id
    assert document["model_uri"] is None
    assert document["load"] is None
    assert document["task"]["accuracy"]["value"] > 0.8
    waiting = Path(document["waiting"])
    assert waiting.parent == record / "spool"
    assert main(["sync", "--help"]) == 0
    assert "amint sync" in capfd.readouterr().out

    assert main(["sync", "--json"]) == 0
    (synced,) = json.loads(capfd.readouterr().out)["runs"]
    assert synced["left"] == 0
    assert synced["models"] == ["models:/amint-digits/1"]
    assert not waiting.exists()
    check_nothing_is_missing_or_doubled(client, run_id)
    check_completeness(client, run_id, document, tmp_path)
    assert main(["sync", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"runs": [], "left": 0}


def steps(client: mlflow.MlflowClient, run_id: str, metric: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, metric)]


def check_nothing_is_missing_or_doubled(client: mlflow.MlflowClient, run_id: str) -> None:
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert steps(client, run_id, "train/task_loss") == list(range(1, EPOCHS + 1))
    within = steps(client, run_id, "step/task_loss")
    assert within == list(range(1, len(within) + 1))
    assert len(within) % EPOCHS == 0
    assert steps(client, run_id, "step/mint_loss") == within
    assert steps(client, run_id, "task.accuracy") == [EPOCHS]
    times = [p.timestamp for p in client.get_metric_history(run_id, "step/task_loss")]
    assert times == sorted(times)


def check_completeness(
    client: mlflow.MlflowClient, run_id: str, document: dict[str, Any], scratch: Path
) -> None:
    run = client.get_run(run_id)
    artifacts = {info.path for info in client.list_artifacts(run_id)}
    assert artifacts >= {
        *("config.yaml", "environment.json", "figures.json", "manifest.parquet"),
        *("scores.parquet", "roc.png", "scores.png", "losses.png", "calibration.png"),
    }
    manifest = pq.read_table(client.download_artifacts(run_id, "manifest.parquet", str(scratch)))
    assert manifest.num_rows == sum(document["counts"].values())
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "digits"
    assert given.dataset.digest == document["manifest_fingerprint"][:32]
    tags = run.data.tags
    assert tags["amint.manifest_fingerprint"] == document["manifest_fingerprint"]
    assert (tags["amint.workers"], tags["amint.ray_nodes"]) == ("1", "1")
    assert tags["amint.ray_job_id"]
    assert run.data.params["train.epochs"] == str(EPOCHS)
    machine = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert len(machine) > 10
    assert all(0 <= point.value <= 100 for point in machine)
    assert "system/system_memory_usage_megabytes" in run.data.metrics
