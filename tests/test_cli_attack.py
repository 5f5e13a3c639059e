"""`amint attack`: how it takes mistakes, before Ray starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import pytest

from amint_ray.cli import main
from amint_ray.config.load import load_config
from amint_ray.data.memory import load_memory
from amint_ray.data.roles import Manifest
from amint_ray.data.sources import open_source
from amint_ray.tracking.run_log import open_run, run_of

PHASES = ("amint: fetching", "amint: left out: ")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    config = load_config("digits")
    return load_memory(open_source(config.data), config.data, readers=1)[1].manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def run_id(folder: Path, manifest: Manifest) -> str:
    """A finished run of digits as `amint train` leaves it, but for its model."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        tags = {"amint.manifest_fingerprint": manifest.fingerprint}
        found = open_run(uri, run_of(load_config("digits"), run_name="r", tags=tags)).run_id
        client = mlflow.MlflowClient(uri)
        client.log_metric(found, "task.accuracy", 0.9)
        manifest.write(folder / "manifest.parquet")
        client.log_artifact(found, str(folder / "manifest.parquet"))
        client.set_terminated(found)
    return found


@pytest.fixture(autouse=True)
def where_it_was_trained(
    folder: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """With Ray forbidden and this process's signal handlers restored."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refuse(*args: object, **options: object) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("amint_ray.launch.attack_run.connect", refuse)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def complaint(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake ends with; nothing on stdout, nothing left in the folder."""
    before = sorted(Path.cwd().iterdir())
    assert main(["attack", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = (each for each in captured.err.splitlines() if not each.startswith(PHASES))
    assert sorted(Path.cwd().iterdir()) == before
    return line.removeprefix("amint: ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["models:/nobody/1"], ["models:/nobody/1"]),
        (["models:/nobody@champion"], ["models:/nobody@champion"]),
        (["amint-digits"], ["amint-digits", "models:/NAME/VERSION", "id of a run"]),
        (["f" * 32], ["there is no run", "f" * 32]),
        (["RUN", "--methods", "yoem"], ["no attack is called 'yoem'", "did you mean 'yeom'"]),
        (["RUN", "--methods", ","], ["--methods: no name; give all, or some of mint,"]),
        (
            ["RUN", "--methods", "yeom,lira_online", "attack.shadows=0"],
            ["--methods: lira_online needs attack.shadows=16"],
        ),
        (
            ["RUN", "--methods=output_attack_snapshots"],
            ["output_attack_snapshots needs attack.snapshots=true"],
        ),
        (["RUN", "attack.shadows=1"], ["shadows = 1", "give 2 or more, or 0"]),
        (["RUN", "attack.shadow=4"], ["unknown key 'shadow'", "did you mean 'shadows'"]),
        ([""], ["an empty name: not a model", "models:/NAME/VERSION", "runs:/RUN_ID/model"]),
        (["RUN", "attack.shadows=1000000000"], ["shadows = 1000000000: input should be less"]),
        (["RUN", "shadows=4"], ["shadows: unknown key; a run", "attack.*"]),
        (["RUN", "attak.shadows=4"], ["attak.shadows: unknown key, did you mean", "'attack'"]),
        (["RUN", "train.epoch=4"], ["train.epoch: unknown key, did you mean 'train.epochs'"]),
        (["RUN", "data.limit=500"], ["data.limit: a run is attacked with its own settings"]),
        (["RUN", "data.split_seed=1"], ["data.split_seed: a run is attacked with its own"]),
        (["RUN", "train.epochs=2", "data.readers=2"], ["train.epochs: a run is attacked with"]),
        (["RUN", "storage.paht=here"], ["storage.paht", "did you mean"]),
        (["RUN", "cluster.workers"], ["cluster.workers", "key.path=value"]),
    ],
)
def test_a_mistake_gets_one_line(
    capfd: pytest.CaptureFixture[str], run_id: str, arguments: list[str], parts: list[str]
) -> None:
    line = complaint(capfd, *(run_id if each == "RUN" else each for each in arguments))
    for part in parts:
        assert part in line


def test_a_run_whose_recipe_or_model_is_gone(
    capfd: pytest.CaptureFixture[str], run_id: str
) -> None:
    assert f"runs:/{run_id}/model: cannot be loaded" in complaint(capfd, run_id)
    import mlflow

    client = mlflow.MlflowClient()
    file = Path(urlsplit(client.get_run(run_id).info.artifact_uri).path) / "config.yaml"
    text = file.read_text()
    file.unlink()
    try:
        line = complaint(capfd, run_id)
        assert f"run {run_id}: its artifact config.yaml is missing" in line
        assert "it cannot be attacked without" in line
        file.write_text("data: [")
        assert "its config.yaml is none that this version" in complaint(capfd, run_id)
    finally:
        file.write_text(text)


def test_what_cannot_be_done_is_left_out_of_all(
    capfd: pytest.CaptureFixture[str], run_id: str
) -> None:
    assert main(["attack", run_id, "attack.shadows=0"]) == 2  # there is no model
    told = capfd.readouterr().err
    (line,) = (each for each in told.splitlines() if each.startswith("amint: left out: "))
    for name in ("watson", "lira_online", "rmia_offline", "output_attack_reference"):
        assert name in line
    assert "yeom" not in line
    assert line.endswith("(attack.shadows=16, attack.snapshots=true brings them)")
