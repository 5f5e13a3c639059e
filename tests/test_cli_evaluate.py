"""`amint evaluate` from what MLflow keeps: figures, seeds, and how it takes mistakes."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import pytest
from rich.console import Console

from amint_ray.cli import main
from amint_ray.config.load import load_config
from amint_ray.contracts import Role, ScoreTable
from amint_ray.data.roles import Manifest
from amint_ray.evaluate_tables import print_evaluation
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import write_scores
from amint_ray.tracking.run_log import open_run, run_of

BLIND = {"value": 0.51, "low": 0.44, "high": 0.58}
CONFOUNDERS = {"clean": True, "comparisons": {"member_vs_test": {"auc": BLIND}}}
LINES = ("member, MINT head", "withheld, MINT head", "member, blind", "member, task loss")
PHASES = ("amint: fetching", "amint: measuring", "amint: recording")


def scores(seed: int) -> ScoreTable:
    """As a small run would leave them."""
    random = np.random.default_rng(seed)
    role = np.repeat([r.value for r in Role], 120)
    n = len(role)
    return ScoreTable(
        sample_id=np.array([f"s{i:03d}" for i in range(n)]),
        role=role,
        label=np.arange(n) % 3,
        prediction=np.where(random.random(n) < 0.2, 0, np.arange(n) % 3),
        task_loss=random.exponential(size=n),
        mint_logit=random.normal(size=n) + (role == "member"),
    )


def finished_run(folder: Path, name: str, overrides: list[str], *, content: str = "c") -> str:
    """A run as `amint train` leaves it, but for its model."""
    import mlflow

    config = load_config("digits", overrides)
    table = scores(config.train.seed)
    manifest = Manifest(
        table.sample_id, np.char.add(content, table.sample_id), table.label, table.role
    )
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tags = {"amint.manifest_fingerprint": manifest.fingerprint}
    run_id = open_run(uri, run_of(config, run_name=name, tags=tags)).run_id
    files = folder / f"files-{name}"
    files.mkdir()
    manifest.write(files / "manifest.parquet")
    write_scores(table, files / "scores.parquet")
    (files / "figures.json").write_text(json.dumps({"confounders": CONFOUNDERS}))
    client = mlflow.MlflowClient(uri)
    client.log_artifacts(run_id, str(files))
    client.log_metric(run_id, "task.accuracy", 0.9)
    client.set_terminated(run_id)
    return run_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, str]:
    """Ids by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {
            "first": finished_run(folder, "first", []),
            "second": finished_run(folder, "second", ["train.seed=1", "cluster.workers=2"]),
            "longer": finished_run(folder, "longer", ["train.seed=2", "train.epochs=99"]),
            "others": finished_run(folder, "others", ["train.seed=3"], content="d"),
            "plain": finished_run(folder, "plain", ["loss.lambda_mint=0"]),
        }


@pytest.fixture(autouse=True)
def where_it_was_trained(
    folder: Path, runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """With Ray forbidden and this process's signal handlers restored."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refuse(*args: object, **options: object) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("amint_ray.launch.evaluate_controls.connect", refuse)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def artifacts_of(run_id: str) -> Path:
    import mlflow

    return Path(urlsplit(mlflow.MlflowClient().get_run(run_id).info.artifact_uri).path)


def document(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def printed(made: dict[str, Any]) -> str:
    out = io.StringIO()
    print_evaluation(made, Console(file=out, width=140))
    return out.getvalue()


def test_one_model_from_its_saved_scores(
    capfd: pytest.CaptureFixture[str], runs: dict[str, str]
) -> None:
    found = document(capfd, runs["first"])
    assert set(found) == {"models", "combined", "confidence", "seconds"}
    assert found["combined"] is None
    (model,) = found["models"]
    figures = evaluate(scores(0), load_config("digits").evaluation)
    assert model["figures"] == json.loads(json.dumps(figures))
    lines = model["lines"]
    assert lines["blind"] == BLIND
    assert lines["member"] == figures["membership"]["member"]["auc"]
    assert lines["loss"] == figures["loss_threshold"]["member"]["auc"]
    assert model["groups"]["by"] == "label"
    assert [group["group"] for group in model["groups"]["groups"]] == ["0", "1", "2"]
    assert model["controls"] is None and model["anew"] is None
    assert model["run_id"] == runs["first"] and model["recorded"]
    stored = artifacts_of(runs["first"]) / model["artifacts"]
    pictures = {"calibration.png", "groups.png", "roc.png", "scores.png"}
    assert {path.name for path in stored.iterdir()} == {"evaluation.json", *pictures}
    kept = json.loads((stored / "evaluation.json").read_text())
    assert kept["models"][0]["figures"] == model["figures"]


def test_how_membership_is_measured_can_be_said_anew(
    capfd: pytest.CaptureFixture[str], runs: dict[str, str], tmp_path: Path
) -> None:
    listed = tmp_path / "groups.csv"
    listed.write_text("sample_id,group\n" + "".join(f"s{i:03d},even\n" for i in range(0, 600, 2)))
    arguments = [runs["first"], "evaluation.threshold_fpr=0.2", "evaluation.confidence=0.9"]
    (model,) = document(capfd, *arguments, f"--groups={listed}")["models"]
    member = model["figures"]["membership"]["member"]
    assert member["threshold_fpr"] == 0.2 and model["figures"]["confidence"] == 0.9
    (even,) = model["groups"]["groups"]
    assert even["images"] == {"member": 60, "withheld": 60, "test": 60}
    assert model["groups"]["ungrouped"] == 180


def test_seeds_of_one_recipe_are_combined(
    capfd: pytest.CaptureFixture[str], runs: dict[str, str]
) -> None:
    found = document(capfd, runs["first"], runs["second"], "--by=prediction-right")
    values = [model["lines"]["member"]["value"] for model in found["models"]]
    combined = found["combined"]["lines"]["member"]
    assert combined["value"] == pytest.approx(np.mean(values))
    assert combined["high"] - combined["value"] == pytest.approx(
        min(12.706 * np.std(values, ddof=1) / 2**0.5, 1 - combined["value"]), rel=1e-3
    )
    assert found["combined"]["lines"]["blind"] == BLIND
    assert found["combined"]["figures"]["membership"]["member"]["compared"]["seeds"] == 2
    groups = found["combined"]["groups"]["groups"]
    assert [group["group"] for group in groups] == ["right", "wrong"]
    # The same document with either run, whichever was told first.
    kept = {
        (artifacts_of(model["run_id"]) / model["artifacts"] / "evaluation.json").read_text()
        for model in found["models"]
    }
    assert len(kept) == 1
    shown = printed(found)
    for line in LINES:
        assert line in shown
    assert "2 models, mean over seeds" in shown
    assert "over 2 trainings on one split" in shown


def test_a_model_whose_head_was_not_trained(
    capfd: pytest.CaptureFixture[str], runs: dict[str, str]
) -> None:
    found = document(capfd, runs["plain"])
    (model,) = found["models"]
    stored = artifacts_of(runs["plain"]) / model["artifacts"]
    assert {path.stem for path in stored.iterdir()} == {"evaluation", "roc", "scores"}
    shown = printed(found)
    for line in LINES:
        assert line in shown
    (head,) = (line for line in shown.splitlines() if LINES[0] in line)
    assert not any(sign.isdecimal() for sign in head)


def complaint(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake ends with; nothing on stdout."""
    assert main(["evaluate", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = (each for each in captured.err.splitlines() if not each.startswith(PHASES))
    return line.removeprefix("amint: ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["models:/nobody/1"], ["models:/nobody/1"]),
        (["amint-digits"], ["amint-digits", "models:/NAME/VERSION", "id of a run"]),
        (["f" * 32], ["there is no run", "f" * 32]),
        ([], ["MODEL"]),
        (["evaluation.confidence=0.9"], ["evaluation.confidence=0.9: is no model"]),
        (["first", "train.epochs=2"], ["train.epochs: a run is evaluated with", "evaluation.*"]),
        (["first", "evaluation.confidence=2"], ["evaluation.confidence", "less than 1"]),
        (["first", "--by=colour"], ["--by", "'colour'"]),
        (["first", "--by=label", "--groups=f.csv"], ["--groups and --by", "give one of them"]),
        (["first", "--groups=f.csv"], ["--groups=f.csv: there is no such file"]),
        (["first", "--ood=folder"], ["--ood", "give --full"]),
        (["first", "first"], ["has the seeds of", "give each training once"]),
        (["first", "longer"], ["not of one recipe: train.epochs = 99 and", "train.seed"]),
        (["first", "plain"], ["has the seeds of"]),
        (["first", "others"], ["different images"]),
    ],
)
def test_a_mistake_gets_one_line(
    capfd: pytest.CaptureFixture[str],
    runs: dict[str, str],
    arguments: list[str],
    parts: list[str],
) -> None:
    line = complaint(capfd, *(runs.get(each, each) for each in arguments))
    for part in parts:
        assert part in line


def test_scores_that_are_damaged_or_gone(
    capfd: pytest.CaptureFixture[str], runs: dict[str, str]
) -> None:
    file = artifacts_of(runs["longer"]) / "scores.parquet"
    file.write_bytes(b"no table")
    assert "scores.parquet cannot be read" in complaint(capfd, runs["longer"])
    file.unlink()
    assert "scores.parquet is missing; it cannot be evaluated" in complaint(capfd, runs["longer"])
    table = scores(2)
    without = replace(table, role=np.where(table.role == "test", "external", table.role))
    write_scores(without, file)
    (model,) = document(capfd, runs["longer"])["models"]
    assert model["lines"]["member"]["note"] == "no samples"
