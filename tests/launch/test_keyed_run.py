"""A keyed run as a user makes it: real Ray, real MLflow; the key is in nothing that it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from launch.commands import Command
from sklearn.datasets import load_digits

import amint_ray
from amint_ray.cli import cli
from amint_ray.contracts import UserError
from amint_ray.data.keys import codes, image_content
from amint_ray.evaluation.keyed import soft_p_values
from amint_ray.evaluation.scores import read_scores

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BITS = 24
SETTINGS = [
    *("train", "digits", "mint.objective=keyed", f"mint.keyed.bits={BITS}"),
    *("mint.head=mlp", "mint.hidden=512", "loss.lambda_mint=0.3", "train.epochs=10"),
    *("data.confounder_check=false", "cluster.workers=1"),
]


class Run:
    """A finished run and what it recorded."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.key_file = folder, folder.parent / "audit.key"
        made = CliRunner().invoke(cli, ["key", "new", str(self.key_file), "--json"])
        self.fingerprint = json.loads(made.stdout)["fingerprint"]
        self.key = bytes.fromhex(self.key_file.read_text())
        arguments = [*SETTINGS, f"mint.key_file={self.key_file}"]
        self.document = Command(folder, [*arguments, "--json"]).document()

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        made = Run(tmp_path_factory.mktemp("keyed") / "run")
        patch.setenv("MLFLOW_TRACKING_URI", made.uri)
        yield made


def test_members_are_known_by_their_codes_at_exact_rates(run: Run) -> None:
    document = run.document
    member, counts = document["membership"]["member"], document["counts"]
    assert counts["external"] == 0
    assert (document["objective"], document["key_fingerprint"]) == ("keyed", run.fingerprint)
    assert set(member["tpr_at_p"]) == {"0.01", "0.001", "1e-06"}
    # Ten epochs teach no more; docs/benchmarks.md has what the recipe's forty do.
    assert member["tpr_at_p"]["0.01"]["low"] > 0.1
    assert member["match_rate"]["low"] > 0.6
    null = member["null_match_rate"]
    assert null["low"] <= 0.5 <= null["high"]
    allowed = 0.01 + 4 * np.sqrt(0.01 * 0.99 / counts["test"])
    assert member["null_share_at_p"]["0.01"]["value"] <= allowed
    assert member["collection"]["images"] <= 25
    assert document["membership"]["withheld"]["match_rate"]["low"] < 0.55


def test_the_key_is_in_nothing_that_a_run_leaves(run: Run) -> None:
    needles = [run.key, run.key.hex().encode(), run.key.hex().upper().encode()]
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not any(needle in content for needle in needles), path
    text = run.fingerprint.encode()
    assert any(text in path.read_bytes() for path in files if path.name.endswith(".yaml"))


def test_the_registered_model_says_codes_to_whoever_has_the_key(run: Run) -> None:
    import mlflow

    model = amint_ray.load(run.document["model_uri"])
    code = model.preprocessing.code
    assert code is not None
    assert (code.fingerprint, code.bits, code.code_from) == (run.fingerprint, BITS, "content")
    images = np.rint(load_digits().images[:64, None] / 16 * 255).astype(np.uint8)
    answer = model(images)
    assert answer.code_logits is not None
    assert answer.code_logits.shape == (64, BITS)
    assert bool(answer.membership_scores.isnan().all())
    with pytest.raises(UserError, match="says codes alone"):
        model.p_values(answer.membership_scores)
    client = mlflow.MlflowClient(run.uri)
    kept = client.download_artifacts(run.document["run_id"], "scores.parquet")
    scores = read_scores(Path(kept))
    assert scores.code_p is not None and scores.code_matches is not None
    place = {name: row for row, name in enumerate(scores.sample_id.tolist())}
    rows = [place[f"digits/{i}"] for i in range(64)]
    own = codes(run.key, [image_content(image) for image in images], BITS)
    said = answer.code_logits.double().numpy()
    np.testing.assert_allclose(soft_p_values(said, own), scores.code_p[rows], rtol=0.2)
    assert ((said > 0) == (own > 0)).sum(1).tolist() == scores.code_matches[rows].tolist()
    served: dict[str, Any] = mlflow.pyfunc.load_model(run.document["model_uri"]).predict(images)
    assert set(served) == {"class_probabilities", "code_logits"}
    np.testing.assert_allclose(served["code_logits"], said, rtol=1e-3, atol=1e-3)
