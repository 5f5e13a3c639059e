"""MLflow's registry, a server and a file: sent once, found again, and refused in one line."""

from __future__ import annotations

import http.client
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from tracking.mlflow_server import MlflowServer

import amint_ray
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.model.joint import AuditedModel, plan_architecture
from amint_ray.tracking import registry
from amint_ray.tracking.folder import write_folder
from amint_ray.tracking.run_log import check_tracking, open_run, run_of, tracking_uri
from amint_ray.train.state import save_weights

CALIBRATION = np.linspace(-1, 1, 19)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture(scope="module")
def model() -> AuditedModel:
    return AuditedModel(plan_architecture(load_config("digits"), 10)).eval()


@pytest.fixture(scope="module")
def written(model: AuditedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("written")
    save_weights(model, scratch / "w.safetensors")
    reason = write_folder(
        scratch / "model",
        weights=scratch / "w.safetensors",
        architecture=model.architecture,
        data=load_config("digits").data,
        class_names=[str(c) for c in range(10)],
        calibration=CALIBRATION,
    )
    assert reason is None
    return scratch / "model"


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def use(monkeypatch: pytest.MonkeyPatch, uri: str) -> MlflowClient:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


def new_run(client: MlflowClient) -> str:
    return str(client.create_run("0").info.run_id)


def send(folder: Path, name: str, run_id: str, *, note: str = "") -> str:
    return registry.register(folder, name, run_id=run_id, tags={"note": note}, description=note)


@pytest.mark.slow
def test_a_run_and_its_model_go_through_a_server(
    server: str, folder: Path, model: AuditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = use(monkeypatch, server)
    assert tracking_uri() == server
    check_tracking(server)
    run_id = open_run(server, run_of(load_config("digits"), run_name="a run", tags={})).run_id
    assert send(folder, "amint-digits", run_id, note="first") == "1"
    assert send(folder, "amint-digits", run_id, note="said again") == "1"
    assert send(folder, "amint-digits", new_run(client)) == "2"
    run = client.get_run(run_id)
    (logged,) = client.search_logged_models([run.info.experiment_id])  # beside its run
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    version = client.get_model_version("amint-digits", "1")
    assert (version.run_id, version.source) == (run_id, f"models:/{logged.model_id}")
    assert (version.description, version.tags["note"]) == ("said again", "said again")
    client.set_registered_model_alias("amint-digits", "champion", "2")
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    with torch.inference_mode():
        logits, membership = model((torch.from_numpy(images).float() / 255 - 0.5) / 0.5)
    for uri in (
        *("models:/amint-digits/1", "models:/amint-digits/latest", "models:/amint-digits@champion"),
        *(f"models:/{logged.model_id}", f"runs:/{run_id}/model"),
    ):
        loaded = amint_ray.load(uri)
        answer = loaded(images)
        torch.testing.assert_close(answer.task_logits, logits)
        torch.testing.assert_close(answer.membership_scores, membership)
        assert loaded.calibration.tolist() == CALIBRATION.tolist()


class _Between(http.server.BaseHTTPRequestHandler):
    """Hands requests on to MLflow; of one it loses the answer, or does not even ask."""

    address: ClassVar[str] = ""
    fails: ClassVar[int | None] = None
    after: ClassVar[bool] = False
    count: ClassVar[int] = 0

    def _hand_on(self) -> None:
        cls = type(self)
        # Of the files one stands for all.
        counts = "mlflow-artifacts" not in self.path or self.path.endswith("/program.pt2")
        cls.count += counts
        fails = counts and cls.count == cls.fails
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, content, kind = 500, b"{}", "application/json"
        if not fails or cls.after:
            connection = http.client.HTTPConnection(cls.address, timeout=60)
            headers = {
                name: self.headers[name] for name in ("Content-Type",) if name in self.headers
            }
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content, kind = answer.read(), answer.headers.get("Content-Type", kind)
            status = 500 if fails else answer.status
            connection.close()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _hand_on  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def between(server: str) -> Iterator[str]:
    _Between.address = server.removeprefix("http://")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Between) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()


def _fail(at: int | None, *, after: bool = False) -> None:
    _Between.count, _Between.fails, _Between.after = 0, at, after


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["not asked", "answer lost"])
def test_after_a_failure_at_any_point_there_is_one_version_and_one_model(
    between: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _fail(None)
    client = use(monkeypatch, between)
    at, failed = 0, True
    while failed:
        at += 1
        _fail(None)
        run_id, name = new_run(client), f"shaky-{after}-{at}"
        folder = Path(shutil.copytree(written, tmp_path / str(at)))
        _fail(at, after=after)
        try:
            send(folder, name, run_id, note="n")
            failed = _Between.count >= at  # MLflow itself overlooked the failure
        except Exception:
            _fail(None)
            assert send(folder, name, run_id, note="n") == "1"
        _fail(None)
        (version,) = client.search_model_versions(f"name = '{name}'")
        assert (version.description, version.tags["note"]) == ("n", "n")
        logged = client.search_logged_models(["0"], f"source_run_id = '{run_id}'")
        assert [model.status for model in logged] == [LoggedModelStatus.READY]
        assert version.source == f"models:/{logged[0].model_id}"
        outputs = client.get_run(run_id).outputs.model_outputs
        assert [output.model_id for output in outputs] == [logged[0].model_id]
        shutil.rmtree(folder)
    assert at > 10  # there are as many requests


@pytest.mark.slow
def test_where_mlflow_asks_again_there_is_one_version_too(
    between: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client repeats a request whose answer is lost, and so may create twice."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    _fail(None)
    client = use(monkeypatch, between)
    for at in range(1, 30):
        _fail(None)
        run_id, name = new_run(client), f"repeated-{at}"
        folder = Path(shutil.copytree(written, tmp_path / str(at)))
        _fail(at, after=True)
        assert send(folder, name, run_id) == "1"
        if _Between.count < at:
            break
        _fail(None)
        assert len(client.search_model_versions(f"name = '{name}'")) == 1
        assert len(client.search_logged_models(["0"], f"source_run_id = '{run_id}'")) == 1


@pytest.mark.parametrize("kind", ["server", "file"])
def test_two_runs_at_once_get_a_version_each(
    kind: str,
    request: pytest.FixtureRequest,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "server":
        uri = request.getfixturevalue("server")
    else:
        monkeypatch.chdir(tmp_path)
        uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = use(monkeypatch, uri)
    runs = [new_run(client) for _ in range(4)]
    folders = [Path(shutil.copytree(written, tmp_path / run_id)) for run_id in runs]
    with ThreadPoolExecutor(4) as pool:
        versions = list(
            pool.map(
                lambda both: send(both[0], "at-once", both[1]), zip(folders, runs, strict=True)
            )
        )
    assert sorted(versions) == ["1", "2", "3", "4"]
    for run_id, version in zip(runs, versions, strict=True):
        assert client.get_model_version("at-once", version).run_id == run_id
        assert send(folders[runs.index(run_id)], "at-once", run_id) == version
    amint_ray.load("models:/at-once/3")


@pytest.fixture
def registered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[MlflowClient, str]:
    """Versions 1 to 3 of `m`, of which 2 is gone, and an alias."""
    monkeypatch.chdir(tmp_path)
    client = use(monkeypatch, f"sqlite:///{tmp_path}/mlflow.db")
    run_id = new_run(client)
    send(folder, "m", run_id)
    source = client.get_model_version("m", "1").source
    for _ in range(2):
        client.create_model_version("m", source, run_id)
    client.set_registered_model_alias("m", "champion", "1")
    client.set_registered_model_alias("m", "gone", "2")
    client.delete_model_version("m", "2")
    return client, run_id


def test_what_is_not_there_is_told_with_what_is(
    registered: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id = registered
    for uri, words in {
        "models:/m/2": r"m has no version 2; it has 3, 1$",
        "models:/m/nine": r"m has no version nine; it has 3, 1$",
        "models:/m@challenger": r"m has no alias 'challenger'; it has champion$",
        "models:/m@gone": r"m has no alias 'gone'; it has champion$",
        "models:/other/1": r"no model is registered as 'other'; registered are m$",
        "models:/a/b/1": r"no URI of a model, whose name has no slash",
        "models:/m": r"no URI of a model",
        "models:/": r"no URI of a model",
        "models:/m/1@champion": r"no URI of a model",
        "models:/m-0123456789abcdef0123456789abcdef": "cannot be loaded from sqlite",
        f"runs:/{run_id}/other": "cannot be loaded from",
        "runs:/0/model": "cannot be loaded from",
        "m/1": "neither a model's URI nor a folder",
        "/no/such/folder": "neither a model's URI nor a folder",
    }.items():
        with pytest.raises(UserError, match=words) as raised:
            amint_ray.load(uri)
        assert str(raised.value).startswith(f"{uri}: ")
        assert "\n" not in str(raised.value)
    client.delete_registered_model("m")
    with pytest.raises(UserError, match="registered are none"):
        amint_ray.load("models:/m@champion")


def test_artifacts_that_were_changed_are_found_by_the_registry(
    registered: tuple[MlflowClient, str], tmp_path: Path
) -> None:
    import hashlib
    import json

    amint_ray.load("models:/m/1")
    (stored,) = tmp_path.glob("mlruns/**/artifacts/preprocessing.json")
    stored.write_bytes(stored.read_bytes() + b" ")
    listed = json.loads((stored.parent / "hashes.json").read_text())
    listed["sha256"][stored.name] = hashlib.sha256(stored.read_bytes()).hexdigest()
    (stored.parent / "hashes.json").write_text(json.dumps(listed))
    amint_ray.load(str(stored.parent))
    run_id = registered[0].get_model_version("m", "1").run_id
    for uri in ("models:/m/1", "models:/m@champion", f"runs:/{run_id}/model"):
        with pytest.raises(UserError, match=rf"{uri}: hashes\.json is not what was registered"):
            amint_ray.load(uri)


def test_a_version_that_somebody_made_of_the_same_run_stays(
    registered: tuple[MlflowClient, str], folder: Path
) -> None:
    client = registered[0]
    first = client.get_model_version("m", "1")
    by_hand = client.create_model_version("m", first.source, first.run_id)
    client.set_registered_model_alias("m", "mine", by_hand.version)
    assert send(folder, "m", first.run_id) == "1"
    assert client.get_model_version_by_alias("m", "mine").version == by_hand.version


@pytest.mark.parametrize("name", ["a/b", "a:b", "", " ", ".", "a'b", "a%b"])
def test_a_name_that_mlflow_does_not_take_is_told(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a registered model's name"):
        send(folder, name, "0")


def test_a_folder_that_was_changed_is_not_sent(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = use(monkeypatch, f"sqlite:///{tmp_path}/mlflow.db")
    run_id = new_run(client)
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="is not what was registered"):
        send(folder, "m", run_id)
    assert client.search_registered_models() == []


def test_sending_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'timm', 'ray', 'safetensors']))\n"
        "import amint_ray.tracking.registry, mlflow\n"
        "mlflow.MlflowClient('sqlite://')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
