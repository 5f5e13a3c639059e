"""The registered model: safetensors weights, JSON architecture, nothing that is pickled."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError, first_line
from amint_ray.evaluation.calibration import p_values
from amint_ray.model.joint import Architecture, AuditedModel
from amint_ray.tracking.run_log import tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow.models import Model

FLAVOR = "amint_ray"
WEIGHTS, CALIBRATION = "model.safetensors", "calibration.safetensors"
ARCHITECTURE, PREPROCESSING = "architecture.json", "preprocessing.json"


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the backbone's input.

    Attributes:
        mean: subtracted from pixels in [0, 1].
        std: what is left is divided by it.
        class_names: one name a task logit.
        resize: how images of another size were brought to the input size, in words.
    """

    mean: float
    std: float
    class_names: tuple[str, ...]
    resize: str


_PREPROCESSING = TypeAdapter(Preprocessing)


class Answer(NamedTuple):
    """What an audited model says of n images.

    Attributes:
        task_logits: (n, num_classes) float32.
        membership_scores: (n,) float32 logits of the MINT head; larger means "more likely a
            member". What a score is worth says `RegisteredModel.p_values`.
    """

    task_logits: torch.Tensor
    membership_scores: torch.Tensor


class RegisteredModel:
    """An audited model with its preprocessing and its calibration scores.

    Attributes:
        model: the `AuditedModel`, in evaluation mode.
        preprocessing: from pixels to the backbone's input, and what its classes are called.
        calibration: (m,) sorted scores of images that were not trained on.
    """

    def __init__(
        self,
        model: AuditedModel,
        preprocessing: Preprocessing,
        calibration: npt.NDArray[np.float64],
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.calibration = calibration
        # The taps hand over through the model; two passes at once would mix their images up.
        self._one_at_a_time = threading.Lock()

    @torch.inference_mode()
    def __call__(
        self,
        images: torch.Tensor | npt.NDArray[Any],
        labels: torch.Tensor | npt.NDArray[Any] | None = None,
    ) -> Answer:
        """Task logits and membership scores.

        Args:
            images: (n, channels, height, width) pixels at the model's input size, either uint8 from
                0 to 255 or floating point from 0 to 1. Normalisation is the model's business.
            labels: (n,) class indices; needed where `needs_labels`, ignored elsewhere.

        Raises:
            UserError: another shape, type or range, or labels are missing.
        """
        try:
            batch = torch.as_tensor(images)
        except (TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"images are no array: {first_line(error)}") from error
        expected = self.model.architecture.input_shape
        if batch.ndim != 4 or tuple(batch.shape[1:]) != expected:
            raise UserError(
                f"images have shape {tuple(batch.shape)}; this model takes (n, "
                f"{', '.join(map(str, expected))})"
            )
        if batch.dtype == torch.uint8:
            pixels = batch.float() / 255
        elif batch.is_floating_point():
            pixels = batch.float()
            if len(batch) and not (pixels.min() >= 0 and pixels.max() <= 1):
                raise UserError(
                    "floating-point images must hold pixels from 0 to 1, not normalised ones"
                )
        else:
            raise UserError(f"images are {batch.dtype}; give uint8 or floating point")
        pixels = pixels.to(next(self.model.parameters()).device)
        normalised = (pixels - self.preprocessing.mean) / self.preprocessing.std
        classes = self._checked(labels, len(batch)) if self.needs_labels else None
        with self._one_at_a_time:
            logits, membership = self.model(normalised, labels=classes)
        return Answer(logits, membership)

    @property
    def needs_labels(self) -> bool:
        """Whether the MINT head reads the task loss, and so must be told the classes."""
        return "loss" in self.model.architecture.head.inputs

    def _checked(self, labels: torch.Tensor | npt.NDArray[Any] | None, rows: int) -> torch.Tensor:
        """Labels as the head takes them."""
        if labels is None:
            raise UserError(
                "this model's MINT head reads the task loss (mint.inputs): give the labels, (n,) "
                "class indices, beside the images"
            )
        classes = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
        known = self.model.architecture.num_classes
        if classes.shape != (rows,) or classes.dtype.kind not in "iu":
            raise UserError(
                f"labels are {classes.dtype} of shape {classes.shape}; give ({rows},) integers"
            )
        if rows and not (classes.min() >= 0 and classes.max() < known):
            raise UserError(f"labels must be class indices from 0 to {known - 1}")
        device = next(self.model.parameters()).device
        return torch.from_numpy(classes.astype(np.int64)).to(device)

    def p_values(self, membership_scores: torch.Tensor) -> npt.NDArray[np.float64]:
        """Conformal p-value of each score against the stored calibration scores.

        For an image from the same source as the training data that was not trained on, P(p ≤ α) ≤ α
        on average over draws of the calibration set; with few calibration images the rate of a
        given model may lie well above or below. A small p-value says "trained on"; a large one
        says nothing, since training images withheld from the MINT head look like strangers.

        Raises:
            UserError: the model was trained without its head.
        """
        if len(self.calibration) == 0:
            raise UserError("the MINT head of this model was not trained (loss.lambda_mint = 0)")
        return p_values(membership_scores.double().cpu().numpy(), self.calibration)


def write_folder(
    folder: Path,
    *,
    weights: Path,
    architecture: Architecture,
    data: Data,
    class_names: Sequence[str],
    calibration: npt.NDArray[np.float64],
) -> str | None:
    """Write a model folder."""
    shutil.copy(weights, folder / WEIGHTS)
    (folder / ARCHITECTURE).write_text(architecture.to_json())
    side = math.floor(data.image_size / data.crop_pct)
    resize = f"shorter side to {side} pixels (bicubic), then the central {data.image_size}"
    preprocessing = Preprocessing(data.mean, data.std, tuple(class_names), resize)
    (folder / PREPROCESSING).write_bytes(_PREPROCESSING.dump_json(preprocessing, indent=2))
    scores = torch.from_numpy(np.sort(calibration))
    save_file({"membership_scores": scores}, folder / CALIBRATION)
    return None


def save_model(path: str, mlflow_model: Model, *, folder: Path) -> None:
    """Interim."""
    from mlflow import pyfunc

    shutil.copytree(folder, path)
    mlflow_model.add_flavor(FLAVOR, weights=WEIGHTS, architecture=ARCHITECTURE)
    pyfunc.add_to_model(mlflow_model, loader_module="amint_ray.tracking.registry")
    mlflow_model.save(str(Path(path) / "MLmodel"))


def register(
    folder: Path, name: str, *, run_id: str, tags: Mapping[str, str], description: str
) -> str:
    """Interim."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    info = Model.log(
        artifact_path=None, name="model", flavor=sys.modules[__name__], run_id=run_id, folder=folder
    )
    client = MlflowClient()
    with contextlib.suppress(MlflowException):
        client.create_registered_model(name)
    version = client.create_model_version(
        name,
        source=info.model_uri,
        run_id=run_id,
        model_id=info.model_id,
        tags=dict(tags),
        description=description,
    )
    return str(version.version)


def load(uri: str) -> RegisteredModel:
    """Load a model that `amint train` registered.

    Args:
        uri: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `runs:/RUN_ID/model`, or a local folder.

    Raises:
        UserError: there is no such model, or it is not one of ours.
    """
    if Path(uri).is_dir():
        return read_model(Path(uri))
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI") and not mlflow.is_tracking_uri_set():
        if not Path("mlflow.db").is_file():
            raise UserError(
                f"{uri}: there is no mlflow.db in {Path.cwd()}; work where the model was trained, "
                "or set MLFLOW_TRACKING_URI (sqlite:////absolute/path/mlflow.db, http://…)"
            )
        mlflow.set_tracking_uri(tracking_uri())
    try:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=uri)
    except Exception as error:  # MLflow's, the network's, a URI that is none
        where = without_password(mlflow.get_tracking_uri())
        raise UserError(f"{uri}: cannot be loaded from {where}: {first_line(error)}") from error
    return read_model(Path(folder))


def read_model(folder: Path) -> RegisteredModel:
    """Build the model from its folder; only JSON and safetensors are read.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    try:
        architecture = Architecture.from_json((folder / ARCHITECTURE).read_text())
        preprocessing = _PREPROCESSING.validate_json((folder / PREPROCESSING).read_text())
        model = AuditedModel(architecture)
        model.load_state_dict(load_file(folder / WEIGHTS))
        calibration = load_file(folder / CALIBRATION)["membership_scores"].numpy()
        return RegisteredModel(model, preprocessing, calibration)
    except Exception as error:  # whatever a damaged or altered file leads to
        raise UserError(
            f"{folder}: not a model that amint_ray registered: {first_line(error)}"
        ) from error


class _PyFunc:
    """What `mlflow.pyfunc.load_model` calls."""

    def __init__(self, model: RegisteredModel) -> None:
        self._model = model

    def predict(
        self,
        model_input: npt.NDArray[np.uint8] | dict[str, npt.NDArray[Any]],
        params: dict[str, Any] | None = None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Both outputs by name. The signature names its inputs, so MLflow may pass a dict."""
        named = model_input if isinstance(model_input, dict) else {"images": model_input}
        answer = self._model(named["images"], named.get("labels"))
        return {name: value.cpu().numpy() for name, value in answer._asdict().items()}


def _load_pyfunc(path: str) -> _PyFunc:
    return _PyFunc(read_model(Path(path)))
