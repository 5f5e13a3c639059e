"""Runs on streamed and damaged data: real Ray, real S3, real MLflow with a password."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from launch.commands import Command
from launch.pictures import SHARES, SMALL, digits, hub_file, png
from mlflow import MlflowClient
from tracking.mlflow_server import MlflowServer

import amint_ray
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.data.keys import codes, image_content, key_fingerprint
from amint_ray.data.roles import Manifest, content_hash, role_of
from amint_ray.evaluation.keyed import matches
from amint_ray.evaluation.scores import read_scores
from amint_ray.tracking.run_log import open_run, run_of
from infra.local.object_store import ObjectStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]


KEY, BITS = bytes(range(100, 132)), 16
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "p@ss word: ü"}


@dataclass
class Streamed:
    """A finished run on 800 digits in an S3 bucket, of which two are damaged; it learns codes, too.

    Attributes:
        command: `amint train`, which is done.
        document: what it printed.
        environment: of whoever may ask the MLflow that it told, which wants a password and keeps
            artifacts in S3 without handing them on.
    """

    command: Command
    document: dict[str, Any]
    environment: dict[str, str]

    @contextlib.contextmanager
    def mlflow(self) -> Iterator[MlflowClient]:
        """MLflow's client, which is let in."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield MlflowClient(self.environment["MLFLOW_TRACKING_URI"])

    def artifact(self, name: str) -> Path:
        with self.mlflow() as client:
            return Path(client.download_artifacts(self.document["run_id"], name))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    config = folder / "auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\n"
        f"database_uri = sqlite:///{folder / 'users.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    started = MlflowServer(
        folder,
        *("--app-name", "basic-auth", "--no-serve-artifacts"),
        *("--default-artifact-root", "s3://direct/artifacts"),
        environment={
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test alone",
        },
    )
    try:
        started.start()
        yield started
    finally:
        started.kill()


@pytest.fixture(scope="module")
def streamed(
    object_store: ObjectStore, server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Streamed:
    folder = tmp_path_factory.mktemp("streamed")
    (folder / "tmp").mkdir()
    pixels, labels = digits()
    images = [png(p) for p in pixels[:800]]
    images[17], images[170] = images[17][:60], b"no picture"
    hub_file(folder / "train-0.parquet", images, labels[:800])
    environment = {"MLFLOW_TRACKING_URI": server.uri, **object_store.environment, **ADMIN}
    for bucket in ("digits", "direct"):
        object_store.make_bucket(bucket)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        boto3.session.Session().client("s3").upload_file(
            str(folder / "train-0.parquet"), "digits", "a/train-0.parquet"
        )
    command = Command(
        folder,
        [
            *("train", "digits", "data.source=parquet", "data.path=s3://digits/a"),
            *("data.mode=streamed", "data.max_bad_fraction=0.01", "train.epochs=3"),
            *("train.checkpoint_steps=5", *SMALL, "--json"),
            *("mint.objective=both", f"mint.keyed.bits={BITS}", "mint.key_env=AUDIT_KEY"),
        ],
        # A folder of its own: other tests kill processes that leave theirs behind. Ray's sockets
        # need a short path.
        environment={
            **environment,
            "AUDIT_KEY": KEY.hex(),
            "TMPDIR": str(folder / "tmp"),
            "RAY_TMPDIR": tempfile.gettempdir(),
        },
    )
    return Streamed(command, command.document(), environment)


def test_streamed_run_ends_as_any_run_does(streamed: Streamed) -> None:
    document = streamed.document
    assert document["data"] == {"source": "parquet", "mode": "streamed"}
    assert document["workers"] == 2
    assert sum(document["counts"].values()) == 798
    table = read_scores(streamed.artifact("scores.parquet"))
    manifest = Manifest.read(streamed.artifact("manifest.parquet"))
    assert sorted(table.sample_id.tolist()) == sorted(manifest.sample_id.tolist())
    assert manifest.fingerprint == document["manifest_fingerprint"]
    roles = dict(zip(manifest.sample_id.tolist(), manifest.role.tolist(), strict=True))
    assert [roles[name] for name in table.sample_id.tolist()] == table.role.tolist()
    pixels, labels = digits()
    for name, content, label, role in zip(
        *(c.tolist() for c in (manifest.sample_id, manifest.content, manifest.label)),
        manifest.role.tolist(),
        strict=True,
    ):
        row = int(name.removeprefix("train-0.parquet#"))
        rgb = np.repeat(pixels[row][:, :, None], 3, axis=2)
        assert content == content_hash(rgb)
        assert role == role_of(content, SHARES, 0).value
        assert label == labels[row]


def test_what_cannot_be_used_is_listed_with_the_run(streamed: Streamed) -> None:
    assert streamed.document["quarantined"] == 2
    rows = pq.read_table(streamed.artifact("quarantine.parquet")).to_pylist()
    reasons = {row["sample_id"]: row["reason"] for row in rows}
    assert set(reasons) == {"train-0.parquet#17", "train-0.parquet#170"}
    assert "not an image" in reasons["train-0.parquet#170"]
    assert "2 of 800 cannot be used and are quarantined" in streamed.command.stderr


def test_each_image_has_the_code_that_the_key_gives_to_what_the_model_sees(
    streamed: Streamed,
) -> None:
    document, table = streamed.document, read_scores(streamed.artifact("scores.parquet"))
    assert (document["objective"], document["key_fingerprint"]) == ("both", key_fingerprint(KEY))
    assert table.code_matches is not None and table.code_p is not None
    folder = streamed.artifact("model")
    model, served = amint_ray.load(str(folder)), mlflow.pyfunc.load_model(str(folder))
    code = model.preprocessing.code
    assert code is not None
    assert (code.fingerprint, code.bits, code.membership) == (key_fingerprint(KEY), BITS, True)
    rows = [int(name.removeprefix("train-0.parquet#")) for name in table.sample_id.tolist()]
    images = np.stack([digits()[0][row] for row in rows])[:, None]
    answer = model(images)
    assert answer.code_logits is not None
    own = codes(KEY, [image_content(image) for image in images], BITS)
    said = answer.code_logits.double().numpy()
    # What training computed may differ from this in the last bits, and a logit be next to 0.
    assert np.mean(matches(said, own) == table.code_matches) > 0.99
    np.testing.assert_allclose(answer.membership_scores, table.mint_logit, rtol=1e-3, atol=1e-3)
    answered = served.predict(images[:32])
    assert set(answered) == {"class_probabilities", "membership_score", "code_logits", "p_value"}
    np.testing.assert_allclose(answered["code_logits"], said[:32], rtol=1e-3, atol=1e-3)
    member, test = document["membership"]["member"], table.role == "test"
    assert set(member["tpr_at_p"]) == {"0.01", "0.001", "1e-06"}
    assert member["tpr_at_p"]["1e-06"]["note"] == "the smallest p-value of 16 bits is 1.5e-05"
    rate = table.code_matches[test].mean() / BITS
    assert member["null_match_rate"]["value"] == pytest.approx(rate)
    assert member["null_match_rate"]["low"] <= 0.5 <= member["null_match_rate"]["high"]


def test_the_key_is_in_nothing_that_a_run_leaves(
    streamed: Streamed, object_store: ObjectStore
) -> None:
    needles = [KEY, KEY.hex().encode(), KEY.hex().upper().encode()]
    folders = (streamed.command.folder, object_store.folder)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    text, named = key_fingerprint(KEY).encode(), []
    for path in files:
        content = path.read_bytes()
        assert not any(needle in content for needle in needles), path
        named += [path.name] if text in content else []
    assert "preprocessing.json" in "".join(map(str, files))
    assert named  # it is looked for where it would be


def test_a_random_split_of_digits_is_not_called_confounded(streamed: Streamed) -> None:
    found = streamed.document["confounders"]
    assert found["clean"] is True
    assert set(found["comparisons"]) == {"member_vs_test", "external_vs_test"}
    assert "WARNING" not in streamed.command.stderr


def test_nothing_is_left_of_a_streamed_run(streamed: Streamed) -> None:
    assert streamed.command.leftovers() == []
    left = [path.name for path in (streamed.command.folder / "tmp").iterdir()]
    assert [name for name in left if name.startswith(("pymp-", "amint-"))] == []


def test_with_a_password_and_artifacts_that_go_to_s3_directly(
    streamed: Streamed, server: MlflowServer, object_store: ObjectStore
) -> None:
    with pytest.raises(UserError, match="takes no run") as refused:
        open_run(server.uri, run_of(load_config("digits"), run_name="nobody", tags={}))
    assert "\n" not in str(refused.value)
    printed = streamed.command.stderr + streamed.command.stdout
    assert ADMIN["MLFLOW_TRACKING_PASSWORD"] not in printed
    assert list((object_store.folder / "buckets/direct/artifacts").rglob("scores.parquet"))
    with streamed.mlflow() as client:
        run = client.get_run(streamed.document["run_id"])
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("s3://direct/artifacts/")
        mlflow.set_tracking_uri(server.uri)
        model = amint_ray.load(streamed.document["model_uri"])
    assert len(model.preprocessing.class_names) == 10


def test_a_run_that_loses_too_much_ends_once_and_for_all(tmp_path: Path) -> None:
    """Not tried again by Ray, which would begin to count anew."""
    pixels, labels = digits()
    for number, label in enumerate(labels[:600]):
        image = tmp_path / "digits" / str(label) / f"{number:03d}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(png(pixels[number]))
    command = Command(
        tmp_path,
        [
            *("train", "digits", "data.source=folder", "data.path=digits", *SMALL),
            *("data.mode=streamed", "data.max_bad_fraction=0.1", "train.epochs=1000"),
            *("train.checkpoint_steps=5", "cluster.max_failures=3", "--json"),
            *("data.confounder_check=false", "tracking.enabled=false"),
        ],
    )
    command.wait_until(lambda: bool(list(tmp_path.glob("amint_runs/*/checkpoint_*/state.json"))))
    for image in tmp_path.glob("digits/[0-4]/*.png"):
        image.unlink()
    assert command.wait() == 1
    last = command.stderr.splitlines()[-1]
    assert "images can no longer be read, more than data.max_bad_fraction = 0.1" in last
    assert command.stderr.count("starting 2 workers") == 1
    assert "Traceback" not in command.stderr
    assert command.stdout == ""
    assert command.leftovers() == []
