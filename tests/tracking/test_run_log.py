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
from amint_ray.contracts import UserError
from amint_ray.tracking.run_log import RunLog, check_tracking, without_password


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
