"""MLflow as it really answers: a server on loopback, a file, and what is neither."""

from __future__ import annotations

import base64
import http.server
import socket
import threading
from pathlib import Path
from typing import ClassVar

import pytest

import amint_ray
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError, first_line, leaves
from amint_ray.tracking.run_log import (
    EPOCH_METRIC,
    STEP_METRIC,
    check_tracking,
    open_run,
    run_of,
    without_password,
)


def test_a_run_is_opened_in_a_file_and_found_again(tmp_path: Path) -> None:
    import mlflow
    from mlflow.entities import Metric

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = load_config("digits")
    search = open_run(uri, run_of(config, run_name="a search", tags={}))
    below = load_config("digits", [f"tracking.parent_run={search.run_id}"])
    opened = open_run(
        uri, run_of(below, run_name="a run", tags={"amint.manifest_fingerprint": "f"})
    )
    assert (opened.resumed, opened.epochs, opened.last_step, opened.attempt) == (False, set(), 0, 1)
    client = mlflow.MlflowClient(uri)
    run = client.get_run(opened.run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "a run"
    assert run.data.tags["amint.manifest_fingerprint"] == "f"
    assert run.data.tags["mlflow.parentRunId"] == search.run_id
    assert run.data.params["loss.lambda_mint"] == str(config.loss.lambda_mint)
    shown = client.search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{search.run_id}'"
    )
    assert [each.info.run_id for each in shown] == [opened.run_id]
    points = [Metric(EPOCH_METRIC, 0.5, 1, 3), Metric(STEP_METRIC, 0.5, 1, 24)]
    client.log_batch(opened.run_id, metrics=points)
    again = open_run(uri, run_of(below, run_name="a run", tags={}), resume=opened.run_id)
    assert (again.run_id, again.resumed) == (opened.run_id, True)
    assert (again.epochs, again.last_step, again.attempt) == ({3}, 24, 2)
    assert again.metrics == {EPOCH_METRIC: 0.5, STEP_METRIC: 0.5}
    client.delete_run(opened.run_id)
    said: list[str] = []
    new = open_run(
        uri, run_of(config, run_name="a run", tags={}), resume=opened.run_id, notice=said.append
    )
    assert new.run_id != opened.run_id
    assert said == [f"MLflow run {opened.run_id} is gone; a new one takes its place"]


def test_a_run_below_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = load_config("digits", ["tracking.parent_run=" + "a" * 32])
    with pytest.raises(UserError, match="takes no run: .*" + "a" * 32):
        open_run(uri, run_of(config, run_name="a run", tags={}))


def test_the_leaves_of_a_document() -> None:
    document = {
        "task": {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}},
        "membership": {"member": {"auc": {"value": None, "low": None, "high": None}}},
        "confidence": 0.95,
    }
    assert leaves(document) == {
        "task.accuracy": 0.5,
        "task.accuracy.low": 0.25,
        "task.accuracy.high": 0.75,
    }


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
        open_run(f"sqlite:///{path}", run_of(load_config("digits"), run_name="r", tags={}))
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
    text = "API request to http://me:hunter2@127.0.0.1:9/api/2.0 failed"
    assert first_line(OSError(text)) == text.replace("hunter2", "***")
    assert without_password("http://u:p%40ss@h:1/x") == "http://u:***@h:1/x"
    assert without_password("sqlite:///a.db") == "sqlite:///a.db"
