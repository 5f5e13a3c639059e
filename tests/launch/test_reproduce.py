"""What is checked before a run is trained again, and how its metrics are compared."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import pytest
from launch.silent import Silent

from amint_ray.config.load import load_config
from amint_ray.contracts import UserError, leaves
from amint_ray.data.memory import load_memory
from amint_ray.data.roles import Manifest
from amint_ray.data.sources import open_source
from amint_ray.launch.earlier import check_overrides, check_same, differences, fetch
from amint_ray.launch.reproduce import _outcome, compare, compare_code, reproduce, verdict
from amint_ray.tracking.run_log import environment, open_run, run_of

FIGURES = {
    "task": {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}},
    "membership": {"member": {"auc": {"value": 0.7, "low": 0.6, "high": 0.8}}},
}


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Of digits, as a run has it."""
    config = load_config("digits")
    _, index = load_memory(open_source(config.data), config.data, readers=1)
    return index.manifest


class Recorded:
    """An MLflow database with runs as `amint train` leaves them, but for the training."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(self.uri)

    def run(self, folder: Path, manifest: Manifest | None, *, status: str = "FINISHED") -> str:
        tags = {} if manifest is None else {"amint.manifest_fingerprint": manifest.fingerprint}
        run_id = open_run(self.uri, run_of(load_config("digits"), run_name="r", tags=tags)).run_id
        metrics = {"train/task_loss": 0.5, "train/steps_per_second": 9.0}
        if manifest is not None:
            manifest.write(folder / "manifest.parquet")
            self.client.log_artifact(run_id, str(folder / "manifest.parquet"))
            metrics |= leaves(FIGURES)
        for name, value in metrics.items():
            self.client.log_metric(run_id, name, value, step=1)
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id

    def artifact(self, run_id: str, name: str) -> Path:
        """Where it lies, to be spoilt."""
        return Path(urlsplit(self.client.get_run(run_id).info.artifact_uri).path) / name


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("database"))


@pytest.fixture
def recorded(
    database: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorded]:
    """In an empty folder, where artifacts go, with Ray forbidden."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.uri)
    before = {run.info.run_id for run in database.client.search_runs(["1"])}

    def refuse(*args: object, **options: object) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("amint_ray.launch.train_run.connect", refuse)
    yield database
    for run in database.client.search_runs(["1"]):
        if run.info.run_id not in before:
            database.client.delete_run(run.info.run_id)


def refused(run_id: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        reproduce(run_id, overrides, Silent())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_that_is_kept_of_a_run_is_fetched(
    recorded: Recorded, tmp_path: Path, manifest: Manifest
) -> None:
    run_id = recorded.run(tmp_path, manifest)
    earlier = fetch(recorded.client, run_id, ["data.readers=3", "storage.path=runs"])
    asked = load_config("digits", ["data.readers=3", "storage.path=runs"])
    assert earlier.config == asked
    assert earlier.config_as_it_was
    assert earlier.fingerprint == manifest.fingerprint
    assert earlier.manifest is not None and earlier.manifest.counts == manifest.counts
    assert earlier.metrics["task.accuracy.low"] == 0.8
    watcher = Silent()
    code = compare_code(earlier, watcher)
    assert code["same_versions"] is True and code["versions"] == {}
    assert code["same_commit"] is True
    assert not [notice for notice in watcher.notices if "not committed" not in notice]
    check_same(earlier, manifest)


def test_other_code_and_packages_are_named(
    recorded: Recorded, tmp_path: Path, manifest: Manifest
) -> None:
    run_id = recorded.run(tmp_path, manifest)
    old = environment()
    old["packages"] |= {"torch": "1.0", "numpy": None}
    recorded.artifact(run_id, "environment.json").write_text(json.dumps(old))
    recorded.client.set_tag(run_id, "mlflow.source.git.commit", "f" * 40)
    recorded.client.set_tag(run_id, "amint.config_fingerprint", "0" * 16)
    watcher = Silent()
    code = compare_code(fetch(recorded.client, run_id, []), watcher)
    here = environment()["packages"]
    assert code["same_commit"] is False and code["commit"]["old"] == "f" * 40
    assert code["same_versions"] is False
    assert code["versions"]["torch"] == {"old": "1.0", "new": here["torch"]}
    assert set(code["versions"]) == {"torch", "numpy"}
    told = " ".join(watcher.notices)
    for part in (f"commit {'f' * 40}, here is", f"torch 1.0 (here {here['torch']})", "other keys"):
        assert part in told
    recorded.artifact(run_id, "environment.json").unlink()
    recorded.client.delete_tag(run_id, "mlflow.source.git.commit")
    code = compare_code(fetch(recorded.client, run_id, []), watcher)
    assert code["same_commit"] is None and code["same_versions"] is None
    assert "versions are not known" in watcher.notices[-1]


def test_a_run_that_is_none_or_not_ours_or_not_done(
    recorded: Recorded, tmp_path: Path, manifest: Manifest
) -> None:
    for nonsense in ("0" * 32, "a/b", "..", "digits-20260101-000000-abcdef"):
        assert f"there is no run {nonsense!r}" in refused(nonsense)
    deleted = recorded.run(tmp_path, manifest)
    recorded.client.delete_run(deleted)
    assert f"was deleted; `mlflow runs restore --run-id {deleted}`" in refused(deleted)
    recorded.client.restore_run(deleted)  # what is deleted at the end of the test must not be so
    theirs = recorded.client.create_run("1").info.run_id
    assert "none of amint_ray's" in refused(theirs)
    for status in ("RUNNING", "FAILED", "KILLED"):
        run_id = recorded.run(tmp_path, None, status=status)
        assert f"is {status} and has no figures" in refused(run_id)
    assert "is RUNNING and has figures; only" in refused(
        recorded.run(tmp_path, manifest, status="RUNNING")
    )


def test_artifacts_that_are_missing_or_spoilt(
    recorded: Recorded, tmp_path: Path, manifest: Manifest
) -> None:
    run_id = recorded.run(tmp_path, manifest)
    stored = recorded.artifact(run_id, "manifest.parquet")
    whole = stored.read_bytes()
    stored.write_bytes(b"".join((whole[:200], bytes([whole[200] ^ 1]), whole[201:])))
    assert f"run {run_id}: its manifest cannot be used: " in refused(run_id)
    half = _without(manifest, 900)
    half.write(stored)  # whole, but of another run
    assert "is not the one that the run was trained by" in refused(run_id)
    stored.unlink()
    assert fetch(recorded.client, run_id, []).fingerprint == manifest.fingerprint
    recorded.client.delete_tag(run_id, "amint.manifest_fingerprint")
    assert "neither manifest.parquet nor the tag" in refused(run_id)
    config = recorded.artifact(run_id, "config.yaml")
    config.write_text(config.read_text().replace("lambda_mint:", "lambda_mynt:"))
    line = refused(run_id)
    assert "config.yaml is none that this version" in line and "loss.lambda_mynt" in line
    config.unlink()
    assert "config.yaml is missing" in refused(run_id)
    untracked = refused(recorded.run(tmp_path, manifest), "tracking.enabled=false")
    assert untracked.startswith("tracking.enabled=false")


def test_other_data_are_refused_before_anything_is_trained(
    recorded: Recorded, tmp_path: Path, manifest: Manifest
) -> None:
    content = manifest.content.copy()
    content[5] = "0" * 64
    run_id = recorded.run(tmp_path, dataclasses.replace(_without(manifest, 3), content=content[3:]))
    line = refused(run_id, "data.confounder_check=false")
    assert f"data: not what run {run_id} was trained on: " in line
    assert "3 are new, 1 have another content (manifest " in line
    recorded.artifact(run_id, "manifest.parquet").unlink()
    assert "their names are not known" in refused(run_id)
    assert len(recorded.client.search_runs(["1"])) == 1  # no new one was begun


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.seed=1"], "train.seed:"),
        (["data.path=/a", "train.epochs=3", "evaluation.fprs=[0.1]"], "train.epochs, evaluation."),
        (["data.split_seed=2"], "data.split_seed:"),
        (["data={path: x}"], "data:"),
        (["clusters.workers=1"], "clusters.workers:"),
        (["train.seed"], "train.seed:"),
    ],
)
def test_what_makes_another_run_of_it_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match="with its own settings; given anew may be") as caught:
        check_overrides(overrides)
    assert str(caught.value).startswith(named)
    assert "storage.*" in str(caught.value) and "evaluation," not in str(caught.value)


def test_where_it_is_computed_and_kept_may_be_given_anew() -> None:
    check_overrides(
        [
            *("data.path=/a", "data.external.path=/b", "data.readers=3", "storage.path=s3://a/b"),
            *("cluster.workers=1", "tracking.experiment=again", "train.checkpoint_every=3"),
        ]
    )


def _without(manifest: Manifest, first: int) -> Manifest:
    columns = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    return Manifest(**{name: column[first:] for name, column in columns.items()})


def test_manifests_are_told_apart_sample_by_sample(manifest: Manifest) -> None:
    def changed(**columns: Any) -> Manifest:
        return dataclasses.replace(manifest, **columns)

    n = len(manifest.sample_id)
    role, label = manifest.role.copy(), manifest.label.copy()
    role[:2] = "none"
    label[:4] = 99
    assert differences(manifest, changed(role=role, label=label)) == (
        "4 have another label, 2 have another role"
    )
    assert differences(manifest, _without(manifest, 7)) == f"7 of {n:,} samples are missing"
    assert differences(_without(manifest, 7), manifest) == "7 are new"
    renamed = changed(sample_id=np.array([f"x/{i}" for i in range(n)]))
    assert differences(manifest, renamed) == f"{n:,} of {n:,} samples have other names"


def test_metrics_are_compared_with_their_intervals() -> None:
    old = {
        "task.accuracy": 0.9,
        "task.accuracy.low": 0.85,
        "task.accuracy.high": 0.95,
        "train/task_loss": 0.5,
        "train/mint_loss": math.nan,
        "train/steps_per_second": 100.0,
        "system/cpu_utilization_percentage": 3.0,
        "gone": 1.0,
    }
    new = {
        "task.accuracy": 0.875,
        "task.accuracy.low": 0.8,
        "task.accuracy.high": 0.9,
        "train/task_loss": 0.75,
        "train/mint_loss": math.nan,
        "train/steps_per_second": 50.0,
        "extra": 2.0,
    }
    found = compare(old, new)
    assert set(found) == {"task.accuracy", "train/task_loss", "train/mint_loss", "gone", "extra"}
    assert found["task.accuracy"] == {
        "old": 0.9,
        "new": 0.875,
        "difference": 0.875 - 0.9,
        "interval": [0.85, 0.95],
        "inside_interval": True,
    }
    assert found["train/task_loss"]["difference"] == 0.25
    assert found["train/task_loss"]["inside_interval"] is None
    assert found["train/mint_loss"]["difference"] == 0
    assert found["gone"]["difference"] is found["extra"]["difference"] is None


def test_where_mlflow_has_gone_away_the_figures_are_compared(database: Recorded) -> None:
    watcher = Silent()
    again = {**FIGURES, "run_id": "0" * 32, "waiting": "amint_runs/spool/r", "workers": 1}
    for waiting in ("amint_runs/spool/r", None):  # or it forgot the run
        new, workers = _outcome(database.client, again | {"waiting": waiting}, watcher)
        assert new == {
            "task.accuracy": 0.9,
            "task.accuracy.low": 0.8,
            "task.accuracy.high": 0.95,
            "membership.member.auc": 0.7,
            "membership.member.auc.low": 0.6,
            "membership.member.auc.high": 0.8,
        }
        assert workers == "1" and "figures alone" in watcher.notices[-1]
    assert verdict(compare(new | {"train/task_loss": 0.5}, new)) == "inside"


def test_the_verdict_follows_from_all_metrics() -> None:
    old = {"a": 0.5, "a.low": 0.4, "a.high": 0.6, "loss": 1.0}
    assert verdict(compare(old, old)) == "equal"
    assert verdict(compare(old, old | {"more": 1.0})) == "equal"
    assert verdict(compare(old, old | {"loss": 2.0})) == "inside"
    assert verdict(compare(old, old | {"a": 0.6})) == "inside"
    assert verdict(compare(old, old | {"a": 0.601})) == "outside"
    assert verdict(compare(old, {"loss": 1.0})) == "outside"  # a figure that is not there
