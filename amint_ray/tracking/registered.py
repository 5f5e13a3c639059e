"""An audited model that was registered, and is asked what it knows."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from amint_ray.contracts import UserError, first_line
from amint_ray.evaluation.calibration import p_values
from amint_ray.evaluation.reference import Reference, read_reference
from amint_ray.model.joint import Architecture, AuditedModel
from amint_ray.tracking.folder import (
    ARCHITECTURE,
    CALIBRATION,
    CONFOUNDERS,
    PREPROCESSING,
    REFERENCE,
    SCORES,
    WEIGHTS,
    Confounders,
    Preprocessing,
    digest,
    verify,
)

_PREPROCESSING, _CONFOUNDERS = TypeAdapter(Preprocessing), TypeAdapter(Confounders)


class Answer(NamedTuple):
    """What an audited model says of n images.

    Attributes:
        task_logits: (n, num_classes) float32.
        membership_scores: (n,) float32 logits of the MINT head; larger means "more likely a
            member". What a score is worth says `RegisteredModel.p_values`. NaN where the head says
            codes alone.
        code_logits: (n, bits) float32, what the head says of the images' codes, which only the
            key's holder knows; None where it says none.
    """

    task_logits: torch.Tensor
    membership_scores: torch.Tensor
    code_logits: torch.Tensor | None = None


class RegisteredModel:
    """An audited model with its preprocessing and its calibration scores.

    Attributes:
        model: the `AuditedModel`, in evaluation mode.
        preprocessing: from pixels to the backbone's input, and what its classes are called.
        calibration: (m,) sorted scores of images that were not trained on.
        reference: what it says of images of known roles; None: it was registered without.
        confounders: whether its members can be told without it; None: nobody looked.
        registered: `folder.digest` of all that was registered; None: it is of no folder.
    """

    def __init__(
        self,
        model: AuditedModel,
        preprocessing: Preprocessing,
        calibration: npt.NDArray[np.float64],
        reference: Reference | None = None,
        *,
        confounders: Confounders | None = None,
        registered: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.calibration = calibration
        self.reference = reference
        self.confounders = confounders
        self.registered = registered
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
        return Answer(logits, *self.model.parted(membership))

    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal over architecture and weights."""
        digest = hashlib.sha256(self.model.architecture.to_json().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(name.encode() + values.tobytes())
        return digest.hexdigest()

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
        if self.preprocessing.code is not None and not self.preprocessing.code.membership:
            raise UserError(
                "the MINT head of this model says codes alone (mint.objective = keyed); whoever "
                "has the key asks it with `amint audit --key-file`"
            )
        if len(self.calibration) == 0:
            raise UserError("the MINT head of this model was not trained (loss.lambda_mint = 0)")
        return p_values(membership_scores.double().cpu().numpy(), self.calibration)


def read_model(
    folder: Path, *, where: str | None = None, expected: str | None = None
) -> RegisteredModel:
    """Build the model from its folder; only JSON and safetensors are read.

    Args:
        folder: of the model.
        where: what the user called it; None: the folder.
        expected: its `folder.digest`, where somebody else than the folder knows it.

    Raises:
        UserError: the folder is not as it was registered.
    """
    verify(folder, where=where or str(folder), expected=expected)
    try:
        architecture = Architecture.from_json((folder / ARCHITECTURE).read_text())
        preprocessing = _PREPROCESSING.validate_json((folder / PREPROCESSING).read_text())
        model = _with_weights(architecture, load_file(folder / WEIGHTS))
        calibration = load_file(folder / CALIBRATION)[SCORES].numpy()
        kept = folder / REFERENCE
        reference = read_reference(kept) if kept.is_file() else None
        found = folder / CONFOUNDERS
        return RegisteredModel(
            model,
            preprocessing,
            calibration,
            reference,
            confounders=_CONFOUNDERS.validate_json(found.read_text()) if found.is_file() else None,
            registered=digest(folder),
        )
    except Exception as error:  # whatever files lead to that somebody wrote, hashes and all
        raise UserError(
            f"{where or folder}: not a model that amint_ray registered: {first_line(error)}"
        ) from error


def _with_weights(architecture: Architecture, weights: dict[str, torch.Tensor]) -> AuditedModel:
    """A model that has these weights from the start.

    Drawing random ones first takes longer than all the rest of loading. It must be done where the
    backbone computes tensors that no weights file has, such as the positions of Swin's windows.
    """
    with torch.device("meta"):
        model = AuditedModel(architecture)
    known = model.state_dict()
    if all(known[name].dtype == value.dtype for name, value in weights.items() if name in known):
        # Copies: the file's own pages would follow whatever becomes of the file.
        own = {name: value.clone() for name, value in weights.items()}
        model.load_state_dict(own, assign=True)
        if not any(_on_meta(module) for module in model.modules()):
            return model
    model = AuditedModel(architecture)
    model.load_state_dict(weights)
    return model


def _on_meta(module: torch.nn.Module) -> bool:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    others = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return any(tensor.is_meta for tensor in tensors + others)
