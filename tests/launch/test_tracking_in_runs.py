"""Runs and their MLflow, which dies, comes back, or is not wanted: real servers and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
from launch.commands import Command
from tracking.mlflow_server import MlflowServer

import amint_ray
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.tracking.run_log import open_run, run_of
from infra.local.object_store import ObjectStore
from infra.local.stack import LocalStack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 150
SECONDS_AWAY = 60.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """MLflow on PostgreSQL, its artifacts in S3."""
    with LocalStack(tmp_path_factory.mktemp("servers"), ray=False) as stack:
        yield stack


def amint(folder: Path, uri: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "amint_ray.cli", *arguments],
        cwd=folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_mlflow_is_away_for_a_minute_and_then_for_good(servers: LocalStack, tmp_path: Path) -> None:
    uri = servers.environment["MLFLOW_TRACKING_URI"]
    client = mlflow.MlflowClient(uri)
    command = Command(
        tmp_path,
        [
            *("train", "digits", f"train.epochs={EPOCHS}", "train.checkpoint_every=50"),
            *("cluster.workers=1", "data.confounder_check=false", "tracking.wait_seconds=3"),
            *("tracking.system_seconds=2", "--json"),
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
        command.wait_until(lambda: time.monotonic() > killed + SECONDS_AWAY - 2)
        worker.resume()
        command.wait_until(lambda: time.monotonic() > killed + SECONDS_AWAY)
        servers.start_mlflow()
        before = len(epochs())
        command.wait_until(lambda: len(epochs()) > before + 10)  # what waited, and what is new
        told = epochs()
        servers.kill_mlflow()
        document = command.document()
        down = amint(tmp_path, uri, "sync")
    finally:
        command.process.kill()
        servers.start_mlflow()
    assert down.returncode == 2
    assert down.stderr.startswith("amint: tracking: no MLflow server answers at")
    assert down.stderr.count("\n") == 1
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
    assert "amint sync" in amint(tmp_path, uri, "sync", "--help").stdout

    done = amint(tmp_path, uri, "sync", "--json")
    assert done.returncode == 0, done.stderr
    (synced,) = json.loads(done.stdout)["runs"]
    assert synced["left"] == 0
    assert synced["models"] == ["models:/amint-digits/1"]
    assert not waiting.exists()
    check_nothing_is_missing_or_doubled(client, run_id)
    check_completeness(client, run_id, document, tmp_path)
    again = amint(tmp_path, uri, "sync", "--json")
    assert json.loads(again.stdout) == {"runs": [], "left": 0}


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


def test_with_a_password_and_artifacts_that_go_to_s3_directly(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.make_bucket("direct")
    admin = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "p@ss word: ü"}
    config = tmp_path / "auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\n"
        f"database_uri = sqlite:///{tmp_path / 'users.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server = MlflowServer(
        tmp_path,
        *("--app-name", "basic-auth", "--no-serve-artifacts"),
        *("--default-artifact-root", "s3://direct/artifacts"),
        environment={
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": admin["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test alone",
        },
    )
    server.start()
    # Without its head, too: a model that has none is registered under another name.
    arguments = ["train", "digits", "train.epochs=1", "cluster.workers=1", "loss.lambda_mint=0"]
    arguments += ["data.confounder_check=false", "--json"]
    environment = {"MLFLOW_TRACKING_URI": server.uri, **object_store.environment}
    try:
        with pytest.raises(UserError, match="takes no run") as refused:
            open_run(server.uri, run_of(load_config("digits"), run_name="nobody", tags={}))
        assert "\n" not in str(refused.value)
        someone = Command(tmp_path, arguments, environment={**environment, **admin})
        document = someone.document()
        assert document["model_uri"] == "models:/amint-digits-plain/1"
        member = document["membership"]["member"]
        assert member["auc"]["value"] is None
        assert "lambda_mint" in member["auc"]["note"]
        assert document["loss_threshold"]["member"]["auc"]["value"] is not None
        assert admin["MLFLOW_TRACKING_PASSWORD"] not in someone.stderr + someone.stdout
        for name, value in {**environment, **admin}.items():
            monkeypatch.setenv(name, value)
        client = mlflow.MlflowClient(server.uri)
        run = client.get_run(document["run_id"])
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("s3://direct/artifacts/")
        assert list((object_store.folder / "buckets/direct/artifacts").rglob("scores.parquet"))
        mlflow.set_tracking_uri(server.uri)
        model = amint_ray.load(document["model_uri"])
        assert len(model.preprocessing.class_names) == 10
    finally:
        server.kill()


def test_without_mlflow_the_model_lies_beside_the_checkpoints(tmp_path: Path) -> None:
    command = Command(
        tmp_path,
        [
            *("train", "digits", "train.epochs=2", "cluster.workers=1", "tracking.enabled=false"),
            *("data.confounder_check=false", "--json"),
        ],
        # Nobody would answer there.
        environment={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
    )
    document = command.document()
    assert document["run_id"] is None
    assert document["model_uri"] is None
    assert document["waiting"] is None
    folder = tmp_path / "amint_runs" / document["run_name"]
    assert {path.name for path in (folder / "files").iterdir()} >= {"roc.png", "scores.parquet"}
    model = amint_ray.load(str(folder / "model"))
    assert document["load"] == f'amint_ray.load("{folder / "model"}")'
    assert len(model.preprocessing.class_names) == 10
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()
    assert not (tmp_path / "amint_runs" / "spool").exists()
