"""MLflow as it really answers: a server on loopback, a file, and what is neither."""

from __future__ import annotations

import base64
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tracking.documents import a_document

import amint_ray
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.launch.reproduce import fetch
from amint_ray.model.joint import AuditedModel, plan_architecture
from amint_ray.tracking import registry
from amint_ray.tracking.headline import headline_tags
from amint_ray.tracking.run_log import RunLog, check_tracking, tracking_uri, without_password
from amint_ray.tracking.versions import (
    describe_version,
    list_versions,
    mark_challenger,
    promote,
)
from amint_ray.train.state import save_weights


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    uri = f"http://127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", uri.rpartition(":")[2], "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'server.db'}"),
            *("--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_a_run_and_its_model_go_through_a_server(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert tracking_uri() == server
    check_tracking(server)
    config = load_config("digits")
    log = RunLog(server, config, run_name="a run", tags={"amint.manifest_fingerprint": "f"})
    for epoch in (1, 2):
        log.log_epoch({"epoch": epoch, "train/task_loss": 1 / epoch})
    log.log_figures(
        {"task": {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}}, "confidence": 0.95},
        step=2,
    )
    architecture = plan_architecture(config, 10)
    model = AuditedModel(architecture).eval()
    save_weights(model, tmp_path / "w.safetensors")
    calibration = np.linspace(-1, 1, 19)
    for expected in ("1", "2"):
        version = registry.register(
            "amint-digits",
            run_id=log.run_id,
            weights=tmp_path / "w.safetensors",
            architecture=architecture,
            data=config.data,
            class_names=[str(c) for c in range(10)],
            calibration=calibration,
        )
        assert version == expected
    log.end("FINISHED")

    client = mlflow.MlflowClient(server)
    run = client.get_run(log.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {
        "train/task_loss": 0.5,
        "task.accuracy": 0.5,
        "task.accuracy.low": 0.25,
        "task.accuracy.high": 0.75,
    }
    losses = client.get_metric_history(log.run_id, "train/task_loss")
    assert [(point.step, point.value) for point in losses] == [(1, 1.0), (2, 0.5)]
    logged = client.search_logged_models([run.info.experiment_id])
    assert len(logged) == 2  # beside their run, not in the default experiment
    client.set_registered_model_alias("amint-digits", "champion", "2")
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    with torch.inference_mode():
        logits, membership = model((torch.from_numpy(images).float() / 255 - 0.5) / 0.5)
    for uri in ("models:/amint-digits/1", "models:/amint-digits@champion"):
        loaded = amint_ray.load(uri)
        answer = loaded(images)
        torch.testing.assert_close(answer.task_logits, logits)
        torch.testing.assert_close(answer.membership_scores, membership)
        assert loaded.calibration.tolist() == calibration.tolist()
    with pytest.raises(UserError, match="models:/amint-digits/9"):
        amint_ray.load("models:/amint-digits/9")


@pytest.mark.slow
def test_versions_and_a_run_to_reproduce_are_read_from_a_server(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    config = load_config("digits")
    log = RunLog(server, config, run_name="r", tags={"amint.manifest_fingerprint": "f" * 64})
    accuracy = {"value": 0.5, "low": 0.25, "high": 0.75}
    log.log_figures({"task": {"accuracy": accuracy}}, step=1)
    log.end("FINISHED")
    client = mlflow.MlflowClient(server)
    client.create_registered_model("ordered")
    described = headline_tags(a_document())
    for version in ("1", "2"):
        client.create_model_version("ordered", f"runs:/{log.run_id}/model", log.run_id)
        describe_version("ordered", version, tags=described, description="# A card\n")
        assert mark_challenger("ordered", version)
    assert client.get_model_version("ordered", "2").description == "# A card\n"
    assert promote("ordered", "1")["promoted"] and promote("ordered", "2")["promoted"]
    newest, oldest = list_versions("ordered")
    assert newest["aliases"] == ["challenger", "champion"] and oldest["aliases"] == []
    assert newest["figures"]["task_accuracy"] == a_document()["task"]["accuracy"]
    with pytest.raises(UserError, match="no version '9'; there are 2, 1"):
        promote("ordered", "9")
    earlier = fetch(client, log.run_id, ["storage.path=elsewhere"])
    assert earlier.config == load_config("digits", ["storage.path=elsewhere"])
    assert earlier.metrics["task.accuracy"] == 0.5 and earlier.fingerprint == "f" * 64
    with pytest.raises(UserError, match="there is no run"):
        fetch(client, "0" * 32, [])


class _Guarded(http.server.BaseHTTPRequestHandler):
    """Answers like a server that wants a password, and keeps what it was asked for."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.headers["Host"])
        self.send_response(401)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def test_a_server_behind_a_password_counts_as_answering() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Guarded) as guarded:
        threading.Thread(target=guarded.serve_forever, daemon=True).start()
        check_tracking(f"http://someone:secret@127.0.0.1:{guarded.server_port}")
        guarded.shutdown()
        assert _Guarded.seen == [f"127.0.0.1:{guarded.server_port}"]


def test_a_port_where_something_else_answers_is_told_in_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(base64.b64decode("AAECAwQ="))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="no MLflow server answers") as caught:
            check_tracking(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert "\n" not in str(caught.value)


def test_an_address_that_is_none_is_not_shown_for_it_may_hold_a_password() -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is no address") as caught:
        check_tracking("postgresql://me:hunt[er2@host/db")
    assert "er2" not in str(caught.value)


def test_a_database_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("this is no database, and long enough to be read as one" * 40)
    with pytest.raises(UserError, match="takes no run") as caught:
        RunLog(f"sqlite:///{path}", load_config("digits"), run_name="r", tags={})
    assert "\n" not in str(caught.value)


def test_loading_where_nothing_was_trained_says_so_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow, "is_tracking_uri_set", lambda: False)  # as in a new process
    with pytest.raises(UserError, match=r"there is no mlflow\.db"):
        amint_ray.load("models:/amint-digits/1")
    assert list(tmp_path.iterdir()) == []


def test_passwords_are_not_shown() -> None:
    assert without_password("http://u:p%40ss@h:1/x") == "http://u:***@h:1/x"
    assert without_password("sqlite:///a.db") == "sqlite:///a.db"
