"""Runs on streamed, damaged and confounded data: real Ray, real S3, real MLflow."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import boto3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launch.commands import Command
from PIL import Image
from sklearn.datasets import load_digits

from amint_ray.config.data_schema import Shares
from amint_ray.contracts import Role
from amint_ray.data.roles import Manifest, content_hash, role_of
from amint_ray.evaluation.scores import read_scores
from infra.local.object_store import ObjectStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARES = Shares(member=0.3, withheld=0.1, external=0.2, calibration=0.1, test=0.3)
SMALL = ["data.image_size=8", "data.channels=1", "train.batch_size=32"]
SMALL += [f"data.shares={SHARES.model_dump_json()}"]


def hub_file(path: Path, images: list[bytes], labels: list[int]) -> None:
    cells = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"image": cells, "label": labels}), path, row_group_size=100)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def digits() -> tuple[list[npt.NDArray[np.uint8]], list[int]]:
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return list(pixels), found.target.tolist()


def artifact(command: Command, name: str) -> Path:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{command.folder / 'mlflow.db'}")
    return Path(client.download_artifacts(command.document()["run_id"], name))


@pytest.fixture(scope="module")
def streamed(object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A finished run on 800 digits in an S3 bucket, of which two are damaged."""
    folder = tmp_path_factory.mktemp("streamed")
    (folder / "tmp").mkdir()
    pixels, labels = digits()
    images = [png(p) for p in pixels[:800]]
    images[17], images[170] = images[17][:60], b"no picture"
    hub_file(folder / "train-0.parquet", images, labels[:800])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        object_store.make_bucket("digits")
        boto3.session.Session().client("s3").upload_file(
            str(folder / "train-0.parquet"), "digits", "a/train-0.parquet"
        )
        command = Command(
            folder,
            [
                *("train", "digits", "data.source=parquet", "data.path=s3://digits/a"),
                *("data.mode=streamed", "data.max_bad_fraction=0.01", "train.epochs=3"),
                *("train.checkpoint_steps=5", *SMALL, "--json"),
            ],
            # Of its own: other tests kill processes that leave theirs behind. Ray's sockets need a
            # short path.
            environment={"TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": tempfile.gettempdir()},
        )
        command.document()
    return command


def test_streamed_run_ends_as_any_run_does(streamed: Command) -> None:
    document = streamed.document()
    assert document["data"] == {"source": "parquet", "mode": "streamed"}
    assert document["workers"] == 2
    assert sum(document["counts"].values()) == 798
    table = read_scores(artifact(streamed, "scores.parquet"))
    manifest = Manifest.read(artifact(streamed, "manifest.parquet"))
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


def test_what_cannot_be_used_is_listed_with_the_run(streamed: Command) -> None:
    assert streamed.document()["quarantined"] == 2
    rows = pq.read_table(artifact(streamed, "quarantine.parquet")).to_pylist()
    reasons = {row["sample_id"]: row["reason"] for row in rows}
    assert set(reasons) == {"train-0.parquet#17", "train-0.parquet#170"}
    assert "not an image" in reasons["train-0.parquet#170"]
    assert "2 of 800 cannot be used and are quarantined" in streamed.stderr


def test_a_random_split_of_digits_is_not_called_confounded(streamed: Command) -> None:
    found = streamed.document()["confounders"]
    assert found["clean"] is True
    assert set(found["comparisons"]) == {"member_vs_test", "external_vs_test"}
    assert "WARNING" not in streamed.stderr


def test_nothing_is_left_of_a_streamed_run(streamed: Command) -> None:
    assert streamed.leftovers() == []
    left = [path.name for path in (streamed.folder / "tmp").iterdir()]
    assert [name for name in left if name.startswith(("pymp-", "amint-"))] == []


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


def test_a_planted_confounder_is_told_loudly(tmp_path: Path) -> None:
    """Members that are brighter by one grey level; the roles follow from what is stored."""
    kept: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for pixels, label in zip(*digits(), strict=True):
        brighter = np.minimum(pixels.astype(int) + 1, 255).astype(np.uint8)
        for candidate in (brighter, pixels):
            rgb = np.repeat(candidate[:, :, None], 3, axis=2)
            is_member = role_of(content_hash(rgb), SHARES, 0) is Role.MEMBER
            if is_member == (candidate is brighter):
                kept.append(candidate)
                labels.append(label)
                break
    hub_file(tmp_path / "train-0.parquet", [png(p) for p in kept], labels)
    command = Command(
        tmp_path,
        [
            "train",
            "digits",
            "data.source=parquet",
            "data.path=.",
            "train.epochs=1",
            *SMALL,
            "cluster.workers=1",
        ],
    )
    assert command.wait() == 0, command.stderr
    assert "WARNING: the split is confounded" in command.stderr
    assert "member from test" in command.stderr
    assert "CONFOUNDED, trust no membership figure" in command.stdout
    import mlflow

    (run,) = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    assert run.data.tags["amint.confounded"] == "true"
