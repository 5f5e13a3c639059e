"""Records reach a real MLflow in order and once, whatever happens on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from launch.silent import Silent
from mlflow.entities import Run
from tracking.documents import a_document
from tracking.mlflow_server import MlflowServer, door

from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.launch.earlier import fetch
from amint_ray.tracking.headline import headline_tags
from amint_ray.tracking.run_log import open_run, run_of
from amint_ray.tracking.sending import Delivery, MLflowSender
from amint_ray.tracking.spool import Record, Spool, SpooledRun
from amint_ray.tracking.sync import sync
from amint_ray.tracking.versions import list_versions, mark_challenger, promote

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def new_spool(tmp_path: Path, server: MlflowServer) -> Callable[[], Spool]:
    def make() -> Spool:
        opened = open_run(server.uri, run_of(load_config("digits"), run_name="a-run", tags={}))
        return Spool(tmp_path / "a-run", SpooledRun(opened.run_id, "a-run", server.uri))

    return make


def metric(step: int, name: str = "a") -> Record:
    return {"kind": "metrics", "time": 10**12 + step, "step": step, "values": {name: step / 4}}


def fill(spool: Spool, metrics: int) -> None:
    """Some of every kind but models."""
    for step in range(metrics):
        spool.append(metric(step))
    spool.append({"kind": "tags", "values": {"amint.workers": "2", "amint.ray_cpus": "4"}})
    fields = {"name": "digits", "digest": "d" * 32, "source_type": "code", "source": "{}"}
    spool.append({"kind": "dataset", "fields": {**fields, "profile": '{"images": 7}'}})
    folder = spool.new_folder()
    (folder / "some").mkdir()
    (folder / "some" / "ünlike.txt").write_text("content")
    spool.append({"kind": "files", "folder": folder.name})
    spool.append(metric(metrics, "b"))
    spool.append({"kind": "status", "status": "FINISHED", "time": 4 * 10**12})


def check_run(uri: str, run_id: str, *, metrics: int, scratch: Path) -> None:
    client = mlflow.MlflowClient(uri)
    run: Run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", 4 * 10**12)
    history = client.get_metric_history(run_id, "a")
    assert [(p.step, p.value, p.timestamp) for p in history] == [
        (step, step / 4, 10**12 + step) for step in range(metrics)
    ]
    assert [p.step for p in client.get_metric_history(run_id, "b")] == [metrics]
    assert run.data.tags["amint.workers"] == "2"
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("digits", "d" * 32)
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    path = client.download_artifacts(run_id, "some/ünlike.txt", str(scratch))
    assert Path(path).read_text() == "content"


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_every_kind_arrives_and_twice_is_once(
    server: MlflowServer, new_spool: Callable[[], Spool], tmp_path: Path
) -> None:
    spool = new_spool()
    fill(spool, 1203)
    sender = MLflowSender(server.uri, spool)
    sent = []
    for _ in range(2):  # the second time as if no answer had come
        records = spool.waiting()
        while records:
            count = sender(records)
            sent.append(count)
            records = records[count:]
    assert sum(sent) == 2 * len(spool.waiting())
    assert len(sent) < 20, "metrics go together"
    check_run(server.uri, spool.run.run_id, metrics=1203, scratch=tmp_path)


def test_a_record_of_a_newer_version_is_not_dropped(
    server: MlflowServer, new_spool: Callable[[], Spool]
) -> None:
    spool = new_spool()
    spool.append({"kind": "hologram"})
    with pytest.raises(ValueError, match="hologram"):
        MLflowSender(server.uri, spool)(spool.waiting())


@pytest.mark.parametrize("forwarded", [False, True], ids=["refused", "answer-lost"])
def test_a_server_that_fails_every_third_call(
    server: MlflowServer,
    new_spool: Callable[[], Spool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwarded: bool,
) -> None:
    spool = new_spool()
    # MLflow's own repetition must not hide what ours does.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with door(server.uri, forwarded=forwarded) as uri:
        delivery = Delivery(spool, MLflowSender(uri, spool))
        fill(spool, 40)
        wait_until(lambda: not spool.waiting())
        assert delivery.stop(10)
    news = list(delivery.news())
    assert "takes no records" in news[0]
    assert news[1::2] == ["MLflow takes records again"] * (len(news) // 2)
    check_run(server.uri, spool.run.run_id, metrics=40, scratch=tmp_path)


def test_what_the_server_refuses_stays_and_is_named(
    server: MlflowServer, new_spool: Callable[[], Spool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amint_ray.tracking.sync._PAUSES", ())
    spool = new_spool()
    client = mlflow.MlflowClient(server.uri)
    client.delete_run(spool.run.run_id)
    spool.append(metric(1))
    folder, run_id = spool.folder, spool.run.run_id
    spool.close()
    document: dict[str, Any] = sync([folder], Silent())
    assert document["left"] == 1
    assert run_id in document["runs"][0]["problem"]
    client.restore_run(run_id)
    assert sync([folder], Silent())["left"] == 0
    with pytest.raises(UserError, match="is no folder"):
        sync([folder], Silent())


def test_a_spool_of_a_run_that_went_on_elsewhere_doubles_nothing(
    server: MlflowServer, new_spool: Callable[[], Spool]
) -> None:
    spool = new_spool()
    for step in (1, 2, 3):
        spool.append(metric(step))
    spool.append({"kind": "status", "status": "KILLED", "time": 10**12})
    folder, run_id = spool.folder, spool.run.run_id
    spool.close()
    elsewhere = open_run(
        server.uri, run_of(load_config("digits"), run_name="a-run", tags={}), resume=run_id
    )
    assert elsewhere.attempt == 2
    client = mlflow.MlflowClient(server.uri)
    client.log_metric(run_id, "a", 0.5, timestamp=5, step=2)
    client.set_terminated(run_id, "FINISHED")
    assert sync([folder], Silent())["left"] == 0
    assert [p.step for p in client.get_metric_history(run_id, "a")] == [2, 1, 3]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_run_whose_answer_was_lost_is_there_once(server: MlflowServer) -> None:
    config = load_config("digits", ["tracking.experiment=lost-answers"])
    with door(server.uri, forwarded=True) as uri:
        for number in range(3):
            open_run(uri, run_of(config, run_name=f"run-{number}", tags={}))
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("lost-answers")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["run-0", "run-1", "run-2"]
    assert all(run.data.params for run in runs)


def test_versions_and_a_run_to_reproduce_are_read_from_a_server(
    server: MlflowServer, new_spool: Callable[[], Spool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    spool = new_spool()
    run_id = spool.run.run_id
    spool.append({"kind": "metrics", "time": 1, "step": 1, "values": {"task.accuracy": 0.5}})
    fingerprint = {"amint.manifest_fingerprint": "f" * 64}
    spool.append({"kind": "tags", "values": fingerprint})
    spool.append({"kind": "status", "status": "FINISHED", "time": 4 * 10**12})
    sender = MLflowSender(server.uri, spool)
    for _ in range(3):
        spool.sent(sender(spool.waiting()))
    client = mlflow.MlflowClient(server.uri)
    client.create_registered_model("ordered")
    described = headline_tags(a_document())
    for version in ("1", "2"):
        client.create_model_version(
            "ordered", f"runs:/{run_id}/model", run_id, tags=described, description="# A card\n"
        )
        assert mark_challenger(client, "ordered", version)
    assert promote("ordered", "1")["promoted"] and promote("ordered", "2")["promoted"]
    newest, oldest = list_versions("ordered")
    assert newest["aliases"] == ["challenger", "champion"] and oldest["aliases"] == []
    assert newest["figures"]["task_accuracy"] == a_document()["task"]["accuracy"]
    with pytest.raises(UserError, match="no version '9'; there are 2, 1"):
        promote("ordered", "9")
    earlier = fetch(client, run_id, ["storage.path=elsewhere"])
    assert earlier.config == load_config("digits", ["storage.path=elsewhere"])
    assert earlier.metrics["task.accuracy"] == 0.5 and earlier.fingerprint == "f" * 64
    with pytest.raises(UserError, match="there is no run"):
        fetch(client, "0" * 32, [])
