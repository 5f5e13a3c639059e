"""What an audit learns of a model from MLflow, and what MLflow is told of the audit."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from audit.audits import document
from launch.silent import Silent

from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.launch.audit_result import _confounders, _model, _tell_mlflow
from amint_ray.launch.audit_run import _origin, run_audit
from amint_ray.storage import locate
from amint_ray.tracking.registered import RegisteredModel
from amint_ray.tracking.run_log import open_run, run_of

AUC = "confounders.comparisons.member_vs_test.auc"


class Model:
    """A registered model of an earlier version, which keeps nothing of its split."""

    calibration, reference, confounders, registered = np.empty(7), None, None, "1f"

    def fingerprint(self) -> str:
        return "ab"


MODEL: RegisteredModel = Model()  # type: ignore[assignment]


def test_a_folder_has_no_origin() -> None:
    origin = _origin("somewhere/model")
    assert origin.run_id is None
    split = _confounders(MODEL, origin)
    assert (split.clean, split.blind.value) == (None, None)
    assert "no blind classifier's figure" in str(split.blind.note)
    assert _model(MODEL, origin, "somewhere/model")["task_accuracy"]["value"] is None


@pytest.mark.parametrize("name", ["deadbeef", "", "models/1"])
def test_a_name_of_no_model_is_told_what_is_one(name: str, tmp_path: Path) -> None:
    kept = f"audit.folder={tmp_path}"
    with pytest.raises(UserError, match=r": no model; give .* a run's id .* runs:/RUN_ID/model or"):
        run_audit(name, "suspects", [kept], Silent())


def test_a_run_knows_its_split_and_is_told_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tags = {"amint.confounded": "true", "amint.manifest_fingerprint": "fe"}
    run_id = open_run(uri, run_of(load_config("digits"), run_name="a", tags=tags)).run_id
    client = mlflow.MlflowClient(uri)
    for name, value in ((AUC, 0.7), (f"{AUC}.low", 0.6), (f"{AUC}.high", 0.8)):
        client.log_metric(run_id, name, value)
    client.log_metric(run_id, "task.accuracy", 0.9)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    origin = _origin(f"runs:/{run_id}/model")
    split = _confounders(MODEL, origin)
    assert (split.clean, split.blind.value, split.blind.high) == (False, 0.7, 0.8)
    told = _model(MODEL, origin, "it")
    assert (told["run_id"], told["manifest_fingerprint"]) == (run_id, "fe")
    assert (told["digest"], told["calibration_images"]) == ("ab", 7)
    assert told["task_accuracy"]["value"] == 0.9

    made, watcher = tmp_path / "made", Silent()
    made.mkdir()
    (made / "report.html").write_text("<p>")
    for settings in ("11111111", "22222222"):
        place = locate(str(tmp_path / "0123456789abcdef"), "test").below(settings)
        assert _tell_mlflow(place, made, run_id, document(), watcher)
    audits = Path(urlsplit(client.get_run(run_id).info.artifact_uri).path) / "audits"
    assert sorted(p.name for p in audits.iterdir()) == ["01234567-11111111", "01234567-22222222"]
    with pytest.raises(UserError, match="cannot be read"):
        _origin(f"runs:/{'0' * 32}/model")
