"""The folder of a registered model: what lies in it, written whole and read only as it was written.

`docs/registered_model.md` describes it. Nothing here imports torch, but for `write_folder`, when
it exports the model's program.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from amint_ray.contracts import UserError, first_line
from amint_ray.evaluation.metrics import Interval

if TYPE_CHECKING:
    from amint_ray.config.data_schema import Data
    from amint_ray.model.joint import Architecture

FORMAT = 2
"""Of the folder. The first had no `hashes.json`."""
FLAVOR = "amint_ray"
MLMODEL, HASHES = "MLmodel", "hashes.json"
WEIGHTS, CALIBRATION = "model.safetensors", "calibration.safetensors"
REFERENCE = "reference.safetensors"
"""What the model says of images of known roles; a model may have none."""
CONFOUNDERS = "confounders.json"
"""Whether the model's members can be told without it; missing where nobody looked."""
ARCHITECTURE, PREPROCESSING = "architecture.json", "preprocessing.json"
PROGRAM, CODE = "program.pt2", "predict.py"
REQUIREMENTS, CONDA, PYTHON_ENV = "requirements.txt", "conda.yaml", "python_env.yaml"
SCORES = "membership_scores"

_PYFUNC = "python_function"
_CODE_LOADER = "mlflow.pyfunc.loaders.code_model"
_NOT_HASHED = {
    MLMODEL,  # gets the id that MLflow gives the model; what it says is looked at instead
    HASHES,
    "registered_model_meta",  # which MLflow writes beside a downloaded model; nobody here reads it
}


@dataclass(frozen=True)
class Code:
    """What the codes are that a keyed head learned; enough to ask it, for whoever has the key.

    Attributes:
        fingerprint: SHA-256 of the key, in hexadecimal.
        code_from: `content` or `perceptual`, what of an image a code is the HMAC of.
        bits: of a code.
        membership: whether a membership logit comes before the code's in the model's second output.
    """

    fingerprint: str
    code_from: Literal["content", "perceptual"]
    bits: int
    membership: bool


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the backbone's input.

    Attributes:
        mean: subtracted from pixels in [0, 1].
        std: what is left is divided by it.
        class_names: one name a task logit.
        resize: how images of another size were brought to the input size, in words.
        crop_pct: the input size in units of the shorter side after resizing; None: not known, an
            earlier version registered the model.
        code: of a head that says codes.
    """

    mean: float
    std: float
    class_names: tuple[str, ...]
    resize: str
    crop_pct: float | None = None
    code: Code | None = None


@dataclass(frozen=True)
class Confounders:
    """Whether images that were trained on can be told from others without the model.

    Attributes:
        clean: whether no classifier that never saw the model could; None: it could not be tested.
        blind: AUC of `member` against `test` by the best of those classifiers.
    """

    clean: bool | None
    blind: Interval


def write_folder(
    folder: Path,
    *,
    weights: Path,
    architecture: Architecture,
    data: Data,
    class_names: Sequence[str],
    calibration: npt.NDArray[np.float64],
    reference: Path | None = None,
    code: Code | None = None,
    confounders: Confounders | None = None,
) -> str | None:
    """Write all that is registered of a model; `registry.register` then only has to send it.

    Args:
        folder: to make, whole or not at all; what was there is replaced.
        weights: safetensors file of the `AuditedModel`.
        architecture: of the model.
        data: tells the preprocessing.
        class_names: one a class.
        calibration: (m,) membership scores of the `calibration` images; none where the head was not
            trained.
        reference: file that `evaluation.reference.write_reference` wrote.
        code: of a head that says codes.
        confounders: what was found of the split; None: nobody looked.

    Returns:
        Why the model has no program, and so cannot be used without amint_ray; None: it has one.

    Raises:
        OSError: the disk is full, for instance.
    """
    from safetensors.numpy import save_file

    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    shutil.copyfile(weights, draft / WEIGHTS)
    save_file({SCORES: np.sort(calibration).astype(np.float64)}, draft / CALIBRATION)
    if reference is not None:
        shutil.copyfile(reference, draft / REFERENCE)
    if confounders is not None:
        (draft / CONFOUNDERS).write_text(json.dumps(asdict(confounders), indent=2))
    (draft / ARCHITECTURE).write_text(architecture.to_json())
    side = math.floor(data.image_size / data.crop_pct)
    resize = f"shorter side to {side} pixels (bicubic), then the central {data.image_size}"
    preprocessing = Preprocessing(
        *(data.mean, data.std, tuple(class_names), resize, data.crop_pct), code=code
    )
    (draft / PREPROCESSING).write_text(json.dumps(asdict(preprocessing), indent=2))
    no_program = _add_program(draft, architecture, preprocessing)
    hashes = {file.name: _sha256(file) for file in sorted(draft.iterdir())}
    (draft / HASHES).write_text(json.dumps({"format": FORMAT, "sha256": hashes}, indent=2))
    calibrated = len(calibration) > 0
    _write_mlmodel(draft, architecture, code, calibrated=calibrated, runs=no_program is None)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    return no_program


def _add_program(
    folder: Path, architecture: Architecture, preprocessing: Preprocessing
) -> str | None:
    """The program, the code that runs it, and what this needs; or why there is none."""
    from amint_ray.tracking.program import NoProgramError, write_program

    try:
        write_program(
            folder / PROGRAM,
            weights=folder / WEIGHTS,
            architecture=architecture,
            mean=preprocessing.mean,
            std=preprocessing.std,
        )
    except NoProgramError as error:
        return str(error)
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
    needed = [
        f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
        for package in ("mlflow", "numpy", "torch")
    ]
    (folder / REQUIREMENTS).write_text("\n".join([*needed, ""]))
    python = platform.python_version()
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": needed}],
    }
    (folder / CONDA).write_text(yaml.safe_dump(conda, sort_keys=False))
    own = {"python": python, "build_dependencies": ["pip"]}
    own["dependencies"] = [f"-r {REQUIREMENTS}"]
    (folder / PYTHON_ENV).write_text(yaml.safe_dump(own, sort_keys=False))
    return None


def _write_mlmodel(
    folder: Path, architecture: Architecture, code: Code | None, *, calibrated: bool, runs: bool
) -> None:
    """MLflow's description: what goes in and comes out, and who can load it."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = (-1, *architecture.input_shape)
    if "loss" in architecture.head.inputs:
        inputs = [TensorSpec(np.dtype("uint8"), images, "images")]
        inputs.append(TensorSpec(np.dtype("int64"), (-1,), "labels"))
    else:  # without a name MLflow takes the array itself
        inputs = [TensorSpec(np.dtype("uint8"), images)]
    classes = (-1, architecture.num_classes)
    outputs = [
        TensorSpec(np.dtype("float32"), classes, "class_probabilities"),
    ]
    if code is None or code.membership:
        outputs.append(TensorSpec(np.dtype("float32"), (-1,), "membership_score"))
    if code is not None:
        outputs.append(TensorSpec(np.dtype("float32"), (-1, code.bits), "code_logits"))
    if calibrated:
        outputs.append(TensorSpec(np.dtype("float64"), (-1,), "p_value"))
    described = Model(signature=ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs)))
    described.add_flavor(FLAVOR, format=FORMAT, weights=WEIGHTS, architecture=ARCHITECTURE)
    if runs:
        pyfunc.add_to_model(
            described,
            loader_module=_CODE_LOADER,
            conda_env=CONDA,
            python_env=PYTHON_ENV,
            model_code_path=CODE,
        )
    described.model_size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    described.save(str(folder / MLMODEL))


def digest(folder: Path) -> str:
    """One SHA-256 that stands for all of a folder but its `MLmodel`.

    Raises:
        OSError: there is no such folder.
    """
    return _sha256(folder / HASHES)


def verify(folder: Path, *, where: str, expected: str | None = None) -> None:
    """See that a folder holds what was registered, and nothing else, before any of it is used.

    Args:
        folder: of the model.
        where: what the user called it.
        expected: its `digest`, from a source other than the folder; None: there is none.

    Raises:
        UserError: it does not.
    """
    try:
        _verify(folder, expected)
    except ValueError as error:
        raise UserError(f"{where}: {error}; nothing of it was loaded") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {first_line(error)}") from error


def _verify(folder: Path, expected: str | None) -> None:
    if not (folder / MLMODEL).is_file():
        raise ValueError(f"not a model of MLflow's: {MLMODEL} is missing")
    runs = _check_flavors(_mapping(yaml.safe_load, folder / MLMODEL)["flavors"])
    if not (folder / HASHES).is_file():
        raise ValueError(
            f"{HASHES} is missing: an earlier version of amint_ray registered it, which can load "
            "it, or somebody took the file away"
        )
    if expected is not None and digest(folder) != expected:
        raise ValueError(f"{HASHES} is not what was registered: its SHA-256 is another")
    listed = _mapping(json.loads, folder / HASHES)
    if listed.get("format") != FORMAT:
        raise ValueError(
            f"its format is {listed.get('format')!r} and this version of amint_ray reads {FORMAT}; "
            "install the version that registered it, or a newer one"
        )
    hashes: dict[str, str] = listed["sha256"]
    _check_names(folder, hashes, runs=runs)
    for name, known in hashes.items():
        if _sha256(folder / name) != known:
            raise ValueError(f"{name} is not what was registered: its SHA-256 is another")


def _check_flavors(flavors: Mapping[str, Any]) -> bool:
    """Whether MLflow can run the model, which must be in our way and in no other.

    Raises:
        ValueError: it has another flavour.
    """
    if FLAVOR not in flavors:
        raise ValueError(
            f"not a model that amint_ray registered; its flavours are {', '.join(sorted(flavors))}"
        )
    if unknown := flavors.keys() - {FLAVOR, _PYFUNC}:
        raise ValueError(f"it has a flavour that amint_ray does not write: {min(unknown)}")
    if _PYFUNC not in flavors:
        return False
    conf = dict(flavors[_PYFUNC])
    loader = conf.pop("loader_module", None)
    if loader == "amint_ray.tracking.registry":
        raise ValueError("an earlier version of amint_ray registered it, which can load it")
    if loader != _CODE_LOADER or conf.pop("model_code_path", None) != CODE:
        raise ValueError(f"{MLMODEL} has it loaded by {loader!r}, which amint_ray did not write")
    if more := conf.keys() - {"python_version", "env"}:
        raise ValueError(f"{MLMODEL} has {min(more)!r} for MLflow, which amint_ray did not write")
    return True


def _check_names(folder: Path, hashes: Mapping[str, str], *, runs: bool) -> None:
    """See that the files are those of a model, all of them.

    Raises:
        ValueError: one is missing, or one too many.
    """
    own = {WEIGHTS, CALIBRATION, ARCHITECTURE, PREPROCESSING}
    if runs:
        own |= {PROGRAM, CODE, REQUIREMENTS, CONDA, PYTHON_ENV}
    own |= hashes.keys() & {REFERENCE, CONFOUNDERS}
    if hashes.keys() != own:
        raise ValueError(f"{HASHES} is not one of amint_ray's: it lists other files")
    for file in sorted(folder.iterdir()):
        if file.name not in own | _NOT_HASHED or file.is_symlink() or not file.is_file():
            raise ValueError(
                f"{file.name} does not belong to the model; a file that somebody put there may be "
                "a pickle or code"
            )
    for name in sorted(own):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")


def _mapping(read: Any, file: Path) -> dict[str, Any]:
    """A file's JSON or YAML, which must be a mapping with the entry that is asked for next."""
    try:
        found = read(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and any(
            isinstance(found.get(key), dict) for key in ("flavors", "sha256")
        ):
            return found
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file.name} cannot be read: {first_line(error)}") from error
    raise ValueError(f"{file.name} is not one of amint_ray's")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
