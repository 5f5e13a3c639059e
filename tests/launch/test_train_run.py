"""The main job as a user runs it: real Ray, real MLflow, real files."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch.commands import Command
from launch.silent import Silent
from sklearn.datasets import load_digits

import amint_ray
from amint_ray.config.data_schema import Shares
from amint_ray.config.load import load_config
from amint_ray.contracts import Role
from amint_ray.data.roles import Manifest, content_hash, role_of
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import read_scores
from amint_ray.launch.snapshot import mend_snapshot
from amint_ray.storage import locate

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 4
QUICK = ["cluster.workers=1", "data.confounder_check=false"]


class Run:
    """A finished `amint train digits` and what it recorded.

    The same on one worker ran at the same time, in the same folder, which was new, and showed its
    table instead of the document.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder = folder
        self.temporary = temporary
        arguments = ["train", "digits", f"train.epochs={EPOCHS}", "train.checkpoint_every=2"]
        own = {"TMPDIR": str(temporary)}
        self.command = Command(folder, [*arguments, "--json"], environment=own)
        self.other = Command(folder, [*arguments, "cluster.workers=1"], environment=own)
        self.document = self.command.document()
        assert self.other.wait() == 0, self.other.stderr
        self.both = mlflow_runs(folder)
        self.version = self.document["model_uri"].removeprefix("models:/amint-digits/")
        import mlflow

        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        mlflow.set_tracking_uri(self.uri)
        self.client = mlflow.MlflowClient(self.uri)
        self.record = self.client.get_run(self.document["run_id"])

    def artifact(self, name: str) -> Path:
        return Path(self.client.download_artifacts(self.document["run_id"], name))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    # Ray's sockets lie in it, whose paths may not be long.
    with tempfile.TemporaryDirectory(prefix="t-") as temporary:
        yield Run(tmp_path_factory.mktemp("run"), Path(temporary))


def leaves(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every `{value, low, high}` of a nested document."""
    if "value" in document:
        return [document]
    return [leaf for v in document.values() if isinstance(v, dict) for leaf in leaves(v)]


def test_document_has_the_keys_that_scripts_rely_on(run: Run) -> None:
    document = run.document
    assert document["recipe"] == "digits"
    assert document["model_uri"] in ("models:/amint-digits/1", "models:/amint-digits/2")
    assert document["workers"] == 2
    assert set(document["counts"]) == {role.value for role in Role}
    assert sum(document["counts"].values()) == 1797
    figures = [document["task"]["accuracy"]]
    for role in ("member", "withheld"):
        question = document["membership"][role]
        assert question["compared"]["n_positives"] == document["counts"][role]
        assert question["compared"]["n_negatives"] == document["counts"]["test"]
        figures += [
            question["auc"],
            question["balanced_accuracy"],
            question["balanced_accuracy_at_half"],
            question["tpr_at_fpr"]["0.01"],
        ]
    for figure in figures:
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    for leaf in leaves(document):
        assert leaf["value"] is not None or leaf["note"]


def test_seconds_by_phase_add_up(run: Run) -> None:
    seconds = run.document["seconds"]
    phases = {"import", "data", "ray", "workers", "train", "evaluate", "log"}
    assert set(seconds) == phases | {"total"}
    assert sum(seconds[phase] for phase in phases) == pytest.approx(seconds["total"], rel=0.2)


def test_progress_goes_to_stderr_and_libraries_keep_quiet(run: Run) -> None:
    lines = run.command.stderr.splitlines()
    assert all(line.startswith("amint: ") for line in lines), lines
    assert any("epoch 1 " in line and "task" in line and "mint" in line for line in lines)


def test_nothing_is_left_running(run: Run) -> None:
    assert run.command.leftovers() == []


def test_nothing_is_left_in_the_temporary_folder(run: Run) -> None:
    """Neither a copy of a checkpoint nor of the artifacts."""
    left = [*run.temporary.glob("checkpoint_tmp_*"), *run.temporary.glob("amint-*")]
    assert (run.temporary / "ray").exists()
    assert left == []


def test_a_list_of_checkpoints_that_was_cut_is_made_anew_as_it_was(
    run: Run, tmp_path: Path
) -> None:
    shutil.copytree(run.folder / "amint_runs" / run.document["run_name"], tmp_path / "run")
    snapshot = tmp_path / "run/checkpoint_manager_snapshot.json"
    written = json.loads(snapshot.read_text())
    assert len(written["checkpoint_results"]) == 2
    snapshot.write_text("")
    mend_snapshot(locate(str(tmp_path / "run"), "test"), Silent(), keep_best=None)
    assert json.loads(snapshot.read_text()) == written


def test_every_figure_can_be_computed_again_from_the_stored_scores(run: Run) -> None:
    table = read_scores(run.artifact("scores.parquet"))
    again = evaluate(table, load_config("digits").evaluation)
    for key, value in again.items():
        assert run.document[key] == value
    assert len(table) == 1797


def test_manifest_says_what_each_image_was_used_for(run: Run) -> None:
    manifest = Manifest.read(run.artifact("manifest.parquet"))
    assert manifest.fingerprint == run.document["manifest_fingerprint"]
    assert manifest.counts == run.document["counts"]
    shares = Shares(member=0.16, withheld=0.04, external=0.14, calibration=0.08, test=0.58)
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for i in range(0, 1797, 50):
        row = manifest.sample_id.tolist().index(f"digits/{i}")
        content = content_hash(np.repeat(pixels[i][:, :, None], 3, axis=2))
        assert manifest.content[row] == content
        assert manifest.role[row] == role_of(content, shares, 0).value
        assert manifest.label[row] == digits.target[i]


def test_mlflow_run_is_complete(run: Run) -> None:
    record = run.record
    assert record.info.status == "FINISHED"
    assert record.data.params["train.epochs"] == str(EPOCHS)
    assert record.data.params["loss.lambda_mint"] == "0.03"
    assert record.data.tags["amint.recipe"] == "digits"
    assert record.data.tags["amint.manifest_fingerprint"] == run.document["manifest_fingerprint"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert record.data.tags["mlflow.source.git.commit"] == head.stdout.strip()
    versions = json.loads(run.artifact("environment.json").read_text())["packages"]
    assert versions["ray"] == importlib.metadata.version("ray")
    for name in ("train/task_loss", "train/mint_loss", "calibration/task_accuracy"):
        history = run.client.get_metric_history(record.info.run_id, name)
        assert [point.step for point in history] == list(range(1, EPOCHS + 1))
    auc = run.document["membership"]["member"]["auc"]
    assert record.data.metrics["membership.member.auc"] == auc["value"]
    assert record.data.metrics["membership.member.auc.low"] == auc["low"]
    names = {file.path for file in run.client.list_artifacts(record.info.run_id)}
    assert names >= {
        "config.yaml",
        "environment.json",
        "figures.json",
        "manifest.parquet",
        "roc.png",
        "scores.parquet",
        "scores.png",
    }
    assert load_config(str(run.artifact("config.yaml"))).train.epochs == EPOCHS
    for picture in ("roc.png", "scores.png"):
        assert run.artifact(picture).read_bytes().startswith(b"\x89PNG")


def test_registered_model_answers_as_it_was_measured(run: Run) -> None:
    table = read_scores(run.artifact("scores.parquet"))
    model = amint_ray.load(run.document["model_uri"])
    pixels = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
    rows = [int(name.removeprefix("digits/")) for name in table.sample_id]
    answer = model(pixels[rows])
    np.testing.assert_allclose(answer.membership_scores, table.mint_logit, atol=1e-4)
    np.testing.assert_array_equal(answer.task_logits.argmax(1), table.prediction)
    calibration = table.of(Role.CALIBRATION).mint_logit
    assert sorted(calibration) == pytest.approx(model.calibration.tolist())


def test_registered_model_is_an_mlflow_model_without_pickle(run: Run) -> None:
    import mlflow

    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=run.document["model_uri"]))
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert files >= {"MLmodel", "model.safetensors", "architecture.json", "preprocessing.json"}
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".pth", ".pickle", ".bin"))]
    images = np.zeros((3, 1, 8, 8), dtype=np.uint8)
    model = mlflow.pyfunc.load_model(run.document["model_uri"])
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    answer = model.predict(images)
    ours = amint_ray.load(run.document["model_uri"])
    expected = ours(images)
    np.testing.assert_allclose(
        answer["class_probabilities"], expected.task_logits.softmax(1), atol=1e-5
    )
    np.testing.assert_allclose(answer["membership_score"], expected.membership_scores, atol=1e-5)
    assert answer["p_value"].tolist() == ours.p_values(expected.membership_scores).tolist()
    with pytest.raises(mlflow.MlflowException):
        model.predict(images.astype(np.float64))


def test_registered_version_has_its_figures_and_its_card(run: Run) -> None:
    version = run.client.get_model_version("amint-digits", run.version)
    card = run.artifact("model_card.md").read_text(encoding="utf-8")
    assert version.description == card and len(card) <= 5000
    accuracy = run.document["task"]["accuracy"]
    assert float(version.tags["amint.task_accuracy"]) == accuracy["value"]
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in card
    assert version.tags["amint.manifest_fingerprint"] == run.document["manifest_fingerprint"]
    (load,) = re.findall(r"^model = (amint_ray\.load\(.*?\))", card, re.MULTILINE)
    loaded = eval(load, {"amint_ray": amint_ray})
    assert loaded.calibration.size == run.document["counts"]["calibration"]


def test_a_run_that_is_reproduced_gives_every_metric_to_the_last_bit(
    run: Run, tmp_path: Path
) -> None:
    run_id = run.document["run_id"]
    command = Command(run.folder, ["reproduce", run_id, f"storage.path={tmp_path}", "--json"])
    document = command.document()
    assert "Traceback" not in command.stderr
    assert command.leftovers() == []
    assert document["run_id"] == run_id != document["reproduced_run_id"]
    assert document["same_commit"] and document["same_versions"] and document["same_data"]
    names = set(document["metrics"])
    assert names >= {"task.accuracy", "membership.member.auc", "train/task_loss"}
    assert "train/steps_per_second" not in names
    for name, metric in document["metrics"].items():
        assert metric["difference"] == 0, name
        assert metric["inside_interval"] in (True, None)
    assert document["verdict"] == "equal"
    assert document["workers"] == {"old": "2", "new": "2"}
    again = run.client.get_run(document["reproduced_run_id"])
    assert again.data.tags["amint.reproduces"] == run_id
    assert again.info.status == "FINISHED"
    assert document["model_uri"] == "models:/amint-digits/3"


def test_two_runs_at_once_and_any_number_of_workers_agree(run: Run) -> None:
    """Both have a version and an MLflow run of their own."""
    versions = {"models:/amint-digits/1", "models:/amint-digits/2"}
    shown = {uri for uri in versions if f'amint_ray.load("{uri}")' in run.other.stdout}
    assert shown == versions - {run.document["model_uri"]}
    assert run.other.leftovers() == []
    assert [one.info.status for one in run.both] == ["FINISHED", "FINISHED"]
    (other,) = (one for one in run.both if one.info.run_id != run.document["run_id"])
    found = other.data
    assert found.tags["amint.workers"] == "1"
    assert found.tags["amint.manifest_fingerprint"] == run.document["manifest_fingerprint"]
    # The same batches, summed in another order: float32 drifts apart a little.
    for name in ("task.accuracy", "membership.member.auc", "loss_threshold.withheld.auc"):
        expected = run.record.data.metrics[name]
        assert found.metrics[name] == pytest.approx(expected, abs=0.01)
    shown_accuracy = re.search(r"task accuracy on test +([\d.]+) ", run.other.stdout)
    assert shown_accuracy is not None
    accuracy = run.document["task"]["accuracy"]["value"]
    assert float(shown_accuracy[1]) == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize(
    "signum, moment, recorded",
    [
        (signal.SIGINT, "epoch 1 ", ["KILLED"]),
        (signal.SIGHUP, "starting Ray", []),
    ],
)
def test_a_stopped_run_is_marked_and_leaves_nothing(
    tmp_path: Path, signum: signal.Signals, moment: str, recorded: list[str]
) -> None:
    command = Command(tmp_path, ["train", "digits", "train.epochs=10000", *QUICK, "--json"])
    command.wait_until(lambda: moment in command.stderr)
    command.interrupt(signum)
    assert command.wait() == 128 + signum
    assert command.stdout == ""
    assert "Traceback" not in command.stderr
    assert command.leftovers() == []
    assert statuses(tmp_path) == recorded


def statuses(folder: Path) -> list[str]:
    """Of all MLflow runs in a folder's database."""
    return [found.info.status for found in mlflow_runs(folder)]


def mlflow_runs(folder: Path) -> list[Any]:
    """All in a folder's database."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))
