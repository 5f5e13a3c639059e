"""The registered folder: outputs, refusals, and no pickle in it."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_models import CLASSES, CONVNEXT, RESNET, SWIN, VIT, Small, built
from timm.models import register_model
from torch import nn

import amint_ray
from amint_ray import RegisteredModel
from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.evaluation.metrics import Interval
from amint_ray.evaluation.outputs import Outputs
from amint_ray.evaluation.reference import Reference, write_reference
from amint_ray.model.joint import AuditedModel
from amint_ray.model.mint_head import HeadSpec
from amint_ray.tracking.folder import Confounders, digest, verify, write_folder
from amint_ray.tracking.predict import refuse_pickles, tensors_of
from amint_ray.train.state import save_weights

SMALL = CONVNEXT
CALIBRATION = np.array([0.3, -1.0, 0.1, 2.0])
MEAN, STD = 0.4, 0.25
FILES = {
    *("MLmodel", "hashes.json", "model.safetensors", "calibration.safetensors"),
    *("reference.safetensors", "confounders.json", "architecture.json", "preprocessing.json"),
    *("program.pt2", "predict.py"),
    *("requirements.txt", "conda.yaml", "python_env.yaml"),
}


CONFOUNDERS = Confounders(clean=True, blind=Interval(0.51, 0.48, 0.54))


def _write(
    folder: Path,
    model: AuditedModel,
    scratch: Path,
    calibration: np.ndarray = CALIBRATION,
    reference: Path | None = None,
) -> str | None:
    save_weights(model, scratch / "trained.safetensors")
    channels, side, _ = model.architecture.input_shape
    return write_folder(
        folder,
        weights=scratch / "trained.safetensors",
        architecture=model.architecture,
        data=Data(image_size=side, channels=channels, mean=MEAN, std=STD),
        class_names=[f"c{i}" for i in range(CLASSES)],
        calibration=calibration,
        reference=reference,
        confounders=None if reference is None else CONFOUNDERS,
    )


def _reference() -> Reference:
    random = np.random.default_rng(5)
    outputs = Outputs(*random.normal(size=(5, 6, 4)).astype(np.float32))
    return Reference(
        role=np.array(["calibration", "member", "withheld", "member"]),
        label=np.arange(4),
        prediction=np.array([0, 1, 3, 3]),
        mint_logit=random.normal(size=4),
        told=outputs,
        untold=outputs,
        taps=random.normal(size=(4, 3)).astype(np.float32),
        projection=np.eye(3, dtype=np.float32),
    )


@pytest.fixture(scope="module")
def trained() -> AuditedModel:
    return built(SMALL, seed=4).eval()


@pytest.fixture(scope="module")
def written(trained: AuditedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("written")
    write_reference(_reference(), scratch / "looked.safetensors")
    kept = scratch / "looked.safetensors"
    assert _write(scratch / "model", trained, scratch, reference=kept) is None
    return scratch / "model"


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture
def loaded(folder: Path) -> RegisteredModel:
    return amint_ray.load(str(folder))


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)


def test_outputs_are_the_trained_models(
    trained: AuditedModel, folder: Path, loaded: RegisteredModel, pixels: np.ndarray
) -> None:
    scaled = torch.from_numpy(pixels).float() / 255
    with torch.no_grad():
        logits, membership = trained((scaled - MEAN) / STD)
    for given in (pixels, torch.from_numpy(pixels), scaled, scaled.double().numpy()):
        answer = loaded(given)
        torch.testing.assert_close(answer.task_logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer.membership_scores, membership, rtol=1e-5, atol=1e-5)
    assert torch.equal(loaded(pixels).task_logits, logits)
    assert loaded.reference is not None
    np.testing.assert_array_equal(loaded.reference.mint_logit, _reference().mint_logit)
    assert loaded.preprocessing.class_names == ("c0", "c1", "c2", "c3", "c4")
    assert not loaded.model.training
    assert loaded.registered == digest(folder)
    assert loaded.confounders == CONFOUNDERS


def test_mlflows_pyfunc_gives_the_same(
    folder: Path, loaded: RegisteredModel, pixels: np.ndarray
) -> None:
    from mlflow import pyfunc

    before = digest(folder)
    predict = pyfunc.load_model(str(folder)).predict
    for images in (pixels, pixels[:1], pixels[:0]):
        _equal(predict(images), loaded, images)
    assert {file.name for file in folder.iterdir()} == FILES  # no compiled copy of the code
    assert digest(folder) == before


def _equal(
    answer: dict[str, np.ndarray],
    loaded: RegisteredModel,
    pixels: np.ndarray,
    labels: np.ndarray | None = None,
) -> None:
    ours = loaded(pixels, labels)
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(answer["class_probabilities"], ours.task_logits.softmax(1), **near)
    np.testing.assert_allclose(answer["membership_score"], ours.membership_scores, **near)
    np.testing.assert_allclose(answer["p_value"], loaded.p_values(ours.membership_scores), **near)


READS_LOSS = HeadSpec("mlp", hidden=10, inputs=("logits", "loss"))


@pytest.mark.parametrize(
    "small",
    [
        pytest.param(replace(VIT, head=HeadSpec("conv", channels=6, pool=2)), id="vit"),
        pytest.param(replace(RESNET, head=READS_LOSS, channels=1), id="resnet, told the labels"),
        pytest.param(SWIN, id="swin"),
    ],
)
def test_other_backbones_answer_by_their_program(small: Small, tmp_path: Path) -> None:
    """Any number of images, batch normalisation, buffers that no weights file has, labels."""
    from mlflow import pyfunc

    model = built(small, seed=1).eval()
    assert _write(tmp_path / "model", model, tmp_path) is None
    loaded = amint_ray.load(str(tmp_path / "model"))
    predict = pyfunc.load_model(str(tmp_path / "model")).predict
    shape = model.architecture.input_shape
    pixels = np.random.default_rng(1).integers(0, 256, (7, *shape), dtype=np.uint8)
    labels = np.arange(7) % CLASSES if loaded.needs_labels else None
    for n in (1, 7):
        told = None if labels is None else labels[:n]
        asked = pixels[:n] if told is None else {"images": pixels[:n], "labels": told}
        _equal(predict(asked), loaded, pixels[:n], told)
    for label in (-100, -1, CLASSES) if loaded.needs_labels else ():  # torch ignores -100
        with pytest.raises(ValueError, match=f"class indices from 0 to {CLASSES - 1}"):
            predict({"images": pixels[:1], "labels": np.array([label])})


def test_a_model_without_a_trained_head_has_no_p_values(
    trained: AuditedModel, tmp_path: Path, pixels: np.ndarray
) -> None:
    from mlflow import pyfunc

    assert _write(tmp_path / "model", trained, tmp_path, np.empty(0)) is None
    model = pyfunc.load_model(str(tmp_path / "model"))
    assert set(model.predict(pixels)) == {"class_probabilities", "membership_score"}
    assert "p_value" not in str(model.metadata.signature.outputs)


class _LooksAtPixels(nn.Module):
    """What no trace can follow."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, num_classes)
        self.num_classes = num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        if not x.is_meta and x.mean().item() > 0:
            x = x.relu()
        logits: torch.Tensor = self.fc(self.body(x).mean((2, 3)))
        return logits


def amint_test_looks_at_pixels(
    pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **_: object
) -> nn.Module:
    return _LooksAtPixels(num_classes)


def test_what_cannot_be_exported_is_registered_without_a_program(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    from mlflow import pyfunc
    from mlflow.exceptions import MlflowException

    register_model(amint_test_looks_at_pixels)
    small = Small(
        "amint_test_looks_at_pixels", {}, ("stem", "body"), size=8, channels=1, head=SMALL.head
    )
    reason = _write(tmp_path / "model", built(small).eval(), tmp_path)
    assert reason is not None
    assert reason.startswith("amint_test_looks_at_pixels cannot be exported: ")
    assert "\n" not in reason
    without = {"program.pt2", "predict.py", "requirements.txt", "conda.yaml", "python_env.yaml"}
    without |= {"reference.safetensors", "confounders.json"}  # it was given none
    assert {file.name for file in (tmp_path / "model").iterdir()} == FILES - without
    assert amint_ray.load(str(tmp_path / "model"))(pixels).task_logits.shape == (6, CLASSES)
    with pytest.raises(MlflowException, match='does not have the "python_function" flavor'):
        pyfunc.load_model(str(tmp_path / "model"))


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
    assert {file.name for file in folder.iterdir()} == FILES
    for file in folder.iterdir():
        content = file.read_bytes()
        assert not content.startswith(b"\x80"), f"{file} begins like a pickle"
        assert zipfile.is_zipfile(file) == (file.name == "program.pt2"), file
    with zipfile.ZipFile(folder / "program.pt2") as archive:
        for entry in archive.infolist():
            content = archive.read(entry)
            assert not content.startswith((b"\x80", b"PK")), entry.filename
        # The weights lie in the folder once.
        assert not [name for name in archive.namelist() if "/weights/weight_" in name]
    stored = tensors_of(bytearray((folder / "model.safetensors").read_bytes()))
    reference = load_file(folder / "model.safetensors")
    assert stored.keys() == reference.keys()
    assert all(torch.equal(stored[name], value) for name, value in reference.items())


def test_written_twice_it_is_the_same(written: Path, trained: AuditedModel, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/left.over").touch()
    kept = written / "reference.safetensors"
    assert _write(tmp_path / "model", trained, tmp_path, reference=kept) is None
    assert digest(tmp_path / "model") == digest(written)
    verify(tmp_path / "model", where="it", expected=digest(written))


class _Planted:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _trace, ("unpickled",)


TRACES: list[str] = []


def _trace(word: str) -> None:
    TRACES.append(word)


@pytest.mark.parametrize(
    "name", ["python_model.pkl", "weights.pt", "model.bin", "x.pth", "data.pkl", "code/sub.py"]
)
def test_a_file_that_somebody_put_there_is_refused_unread(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(_Planted()))
    with pytest.raises(UserError, match=f"{name.partition('/')[0]} does not belong") as raised:
        amint_ray.load(str(folder))
    assert "\n" not in str(raised.value)
    assert TRACES == []
    pickle.loads((folder / name).read_bytes())
    assert TRACES.pop() == "unpickled"  # so it would have told


def test_a_link_in_place_of_a_file_is_refused(folder: Path) -> None:
    weights = (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(weights)
    with pytest.raises(UserError, match=r"model\.safetensors does not belong"):
        amint_ray.load(str(folder))


@pytest.mark.parametrize("name", sorted(FILES - {"MLmodel", "hashes.json"}))
def test_a_flipped_bit_and_a_missing_file_are_told_in_one_line(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not what was registered") as raised:
        amint_ray.load(str(folder))
    assert "\n" not in str(raised.value)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        amint_ray.load(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "program.pt2", "calibration.safetensors"])
def test_mlflows_way_refuses_a_flipped_bit_too(folder: Path, name: str) -> None:
    from mlflow import pyfunc

    content = bytearray((folder / name).read_bytes())
    content[-9] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not what was registered"):
        pyfunc.load_model(str(folder))


def test_hashes_that_were_changed_along_are_found_by_their_digest(folder: Path) -> None:
    known = digest(folder)
    _reseal(folder, "preprocessing.json", (folder / "preprocessing.json").read_bytes() + b" ")
    amint_ray.load(str(folder))  # nobody to tell
    with pytest.raises(UserError, match=r"it: hashes\.json is not what was registered"):
        verify(folder, where="it", expected=known)


def _reseal(folder: Path, name: str, content: bytes) -> None:
    """Change a file and its hash, as somebody would who can write to the folder."""
    (folder / name).write_bytes(content)
    listed = json.loads((folder / "hashes.json").read_text())
    listed["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "hashes.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("hashes.json", b"{", r"hashes\.json cannot be read"),
        ("hashes.json", b"\xff\xfe", r"hashes\.json cannot be read"),
        ("hashes.json", b"[]", r"hashes\.json is not one of amint_ray's"),
        ("hashes.json", b'{"format": 2, "sha256": {}}', "lists other files"),
        ("hashes.json", b'{"format": 3, "sha256": {}}', "format is 3 and this version.* reads 2"),
        ("hashes.json", None, r"hashes\.json is missing: an earlier version"),
        ("MLmodel", b"flavors: [", "MLmodel cannot be read"),
        ("MLmodel", b"!!python/object/apply:os.getcwd []", "MLmodel cannot be read"),
        ("MLmodel", b"a: b", "MLmodel is not one of"),
        ("MLmodel", None, "MLmodel is missing"),
        ("MLmodel", b"flavors: {sklearn: {pickled_model: model.pkl}}", "flavours are sklearn"),
    ],
)
def test_a_description_that_is_none_is_told_in_one_line(
    folder: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        amint_ray.load(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flavor", "change", "words"),
    [
        ("sklearn", {"pickled_model": "model.pkl"}, "does not write: sklearn"),
        ("python_function", {"loader_module": "evil.module"}, "loaded by 'evil.module'"),
        ("python_function", {"model_code_path": "other.py"}, "which amint_ray did not write"),
        ("python_function", {"code": "code"}, "has 'code' for MLflow"),
        ("python_function", {"python_model": "x.pkl"}, "has 'python_model' for MLflow"),
        (
            "python_function",
            {"loader_module": "amint_ray.tracking.registry"},
            "an earlier version of amint_ray registered it",
        ),
    ],
)
def test_another_flavour_is_refused(
    folder: Path, flavor: str, change: dict[str, str], words: str
) -> None:
    described = yaml.safe_load((folder / "MLmodel").read_text())
    described["flavors"].setdefault(flavor, {}).update(change)
    (folder / "MLmodel").write_text(yaml.safe_dump(described))
    with pytest.raises(UserError, match=words):
        amint_ray.load(str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x00\x01garbage"),
        ("model.safetensors", b""),
        ("calibration.safetensors", b"garbage and more"),
        ("reference.safetensors", b"garbage and more"),
        ("confounders.json", b'{"clean": "perhaps"}'),
        ("architecture.json", b"{"),
        ("architecture.json", b"[]"),
        ("architecture.json", b"\xff\xfe\xfa"),
        ("preprocessing.json", b"not json"),
        ("preprocessing.json", b"{}"),
        ("preprocessing.json", b'{"mean": "a", "std": 1, "class_names": ["x"]}'),
    ],
)
def test_nonsense_with_the_right_hash_is_told_in_one_line(
    folder: Path, name: str, content: bytes
) -> None:
    _reseal(folder, name, content)
    with pytest.raises(UserError, match="not a model that amint_ray registered") as raised:
        amint_ray.load(str(folder))
    assert "\n" not in str(raised.value)


def test_weights_of_another_architecture_are_told(folder: Path) -> None:
    values = json.loads((folder / "architecture.json").read_text())
    values["num_classes"] = CLASSES + 1
    _reseal(folder, "architecture.json", json.dumps(values).encode())
    with pytest.raises(UserError, match="not a model that amint_ray registered"):
        amint_ray.load(str(folder))


def _archive(folder: Path, change: Callable[[dict[str, bytes]], object]) -> bytes:
    """The program's archive with other entries."""
    with zipfile.ZipFile(folder / "program.pt2") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


_PICKLE = pickle.dumps(_Planted())
_CONFIG = b'{"config": {"w": {"path_name": "tensor_0", "use_pickle": true}}}'


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        ("data/sample_inputs/model.pt", _PICKLE),
        ("data/weights/model.pt", _PICKLE),
        ("data/weights/weight_0", _PICKLE),
        ("data/constants/model.pt", _PICKLE),
        ("data/constants/custom_obj_0", _PICKLE),
        ("data/constants/opaque_obj_0", _PICKLE),
        ("data/constants/model_constants_config.json", _CONFIG),
        ("data/weights/model_weights_config.json", _CONFIG),
        ("data/aotinductor/model/x.so", b"\x7fELF"),
    ],
)
def test_an_archive_that_torch_would_unpickle_is_refused(
    folder: Path, entry: str, content: bytes
) -> None:
    """Also where the hashes were changed along, by MLflow's way too."""
    from mlflow import pyfunc

    refuse_pickles(_archive(folder, lambda entries: None))
    changed = _archive(folder, lambda entries: entries.update({f"program/{entry}": content}))
    _reseal(folder, "program.pt2", changed)
    with pytest.raises(ValueError, match=r"program\.pt2 is refused"):
        pyfunc.load_model(str(folder))
    assert TRACES == []


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps(1)])
def test_an_archive_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"is no torch\.export archive"):
        refuse_pickles(content)
