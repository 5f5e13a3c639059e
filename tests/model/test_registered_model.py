"""The registered folder: outputs, refusals, and no pickle in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from small_models import CLASSES, CONVNEXT, built

import amint_ray
from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.model.joint import AuditedModel
from amint_ray.tracking.registry import RegisteredModel, save_model
from amint_ray.train.state import save_weights

SMALL = CONVNEXT
CALIBRATION = np.array([0.3, -1.0, 0.1, 2.0])
MEAN, STD = 0.4, 0.25


def _save(folder: Path, model: AuditedModel, scratch: Path) -> Path:
    save_weights(model, scratch / "trained.safetensors")
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, 1, 8, 8), "images")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, CLASSES), "task_logits")]),
    )
    save_model(
        str(folder),
        Model(),
        weights=scratch / "trained.safetensors",
        architecture=model.architecture,
        data=Data(image_size=8, channels=1, mean=MEAN, std=STD),
        class_names=[f"c{i}" for i in range(CLASSES)],
        calibration=CALIBRATION,
        signature=signature,
    )
    return folder


@pytest.fixture(scope="module")
def trained() -> AuditedModel:
    return built(SMALL, seed=4).eval()


@pytest.fixture
def folder(trained: AuditedModel, tmp_path: Path) -> Path:
    return _save(tmp_path / "model", trained, tmp_path)


@pytest.fixture
def loaded(folder: Path) -> RegisteredModel:
    return amint_ray.load(str(folder))


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)


def test_outputs_are_the_trained_models(
    trained: AuditedModel, loaded: RegisteredModel, pixels: np.ndarray
) -> None:
    scaled = torch.from_numpy(pixels).float() / 255
    with torch.no_grad():
        logits, membership = trained((scaled - MEAN) / STD)
    for given in (pixels, torch.from_numpy(pixels), scaled, scaled.double().numpy()):
        answer = loaded(given)
        torch.testing.assert_close(answer.task_logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer.membership_scores, membership, rtol=1e-5, atol=1e-5)
    assert torch.equal(loaded(pixels).task_logits, logits)
    assert loaded.preprocessing.class_names == ("c0", "c1", "c2", "c3", "c4")
    assert not loaded.model.training


def test_mlflows_pyfunc_gives_the_same(
    folder: Path, loaded: RegisteredModel, pixels: np.ndarray
) -> None:
    from mlflow import pyfunc

    answer = pyfunc.load_model(str(folder)).predict({"images": pixels})
    assert np.array_equal(answer["task_logits"], loaded(pixels).task_logits.numpy())
    assert np.array_equal(answer["membership_scores"], loaded(pixels).membership_scores.numpy())


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 3, 8, 8), r"shape \(2, 3, 8, 8\); this model takes \(n, 1, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"shape \(1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 9, dtype=torch.uint8), r"shape \(2, 1, 8, 9\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "torch.int64; give uint8 or floating point"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.bool), "torch.bool"),
        (np.zeros((2, 1, 8, 8), np.uint16), "uint16"),
        (torch.full((2, 1, 8, 8), -0.01), "from 0 to 1, not normalised ones"),
        (torch.full((2, 1, 8, 8), 1.5), "from 0 to 1"),
        (torch.full((2, 1, 8, 8), 200.0), "from 0 to 1"),
        (torch.full((2, 1, 8, 8), float("nan")), "from 0 to 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_images_of_another_kind_are_refused_in_one_line(
    loaded: RegisteredModel, images: torch.Tensor, words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        loaded(images)
    assert "\n" not in str(raised.value)


def test_p_values_come_from_the_stored_calibration(loaded: RegisteredModel) -> None:
    scores = torch.tensor([3.0, 2.0, 0.2, -5.0])
    # (1 + #{calibration ≥ score}) / (4 + 1)
    assert loaded.p_values(scores).tolist() == [0.2, 0.4, 0.6, 1.0]
    assert loaded.calibration.tolist() == sorted(CALIBRATION.tolist())


def test_nothing_in_the_folder_is_pickled(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {
        "MLmodel",
        "model.safetensors",
        "calibration.safetensors",
        "architecture.json",
        "preprocessing.json",
    }
    for file in files:
        assert file.name == "MLmodel" or file.suffix in (".json", ".safetensors"), file
        start = file.read_bytes()[:4]
        assert start[:1] != b"\x80", f"{file} begins like a pickle"
        assert start != b"PK\x03\x04", f"{file} begins like a zip"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x00\x01garbage"),
        ("model.safetensors", b""),
        ("calibration.safetensors", b"garbage and more"),
        ("architecture.json", b"{"),
        ("architecture.json", b"[]"),
        ("architecture.json", b"\xff\xfe\xfa"),
        ("preprocessing.json", b"not json"),
        ("preprocessing.json", b"{}"),
        ("preprocessing.json", b"[]"),
        ("preprocessing.json", b'{"mean": "a", "std": 1, "class_names": ["x"]}'),
    ],
)
def test_a_corrupted_file_is_told_in_one_line(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="not a model that amint_ray registered") as raised:
        amint_ray.load(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "calibration.safetensors", "architecture.json", "preprocessing.json"],
)
def test_a_missing_file_is_told_in_one_line(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        amint_ray.load(str(folder))


def test_weights_of_another_architecture_are_told(folder: Path) -> None:
    values = json.loads((folder / "architecture.json").read_text())
    values["num_classes"] = CLASSES + 1
    (folder / "architecture.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="not a model that amint_ray registered"):
        amint_ray.load(str(folder))


def test_a_truncated_weights_file_is_told(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UserError, match="not a model that amint_ray registered"):
        amint_ray.load(str(folder))
