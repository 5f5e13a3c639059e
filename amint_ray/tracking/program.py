"""The `torch.export` program of a model: what can be run without our code.

The weights are an input of the program and not a part of it, so that they lie in the model's folder
once, as safetensors, and the program's archive has nothing in it that is pickled.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from amint_ray.contracts import first_line
from amint_ray.model.joint import Architecture, AuditedModel
from amint_ray.tracking.predict import open_program

_TOLERANCE = 1e-5
_EXPORTED_WITH = 2
"""Images; with one, torch would take the number for a constant."""
_CHECKED_WITH = (1, 7)


class NoProgramError(Exception):
    """The model cannot be exported; its text says why, in one line."""


class _Whole(nn.Module):
    """From weights, uint8 images and, where the head asks for them, labels to both outputs."""

    def __init__(self, model: AuditedModel, *, mean: float, std: float) -> None:
        super().__init__()
        # In a list: a submodule's weights would become the program's own.
        self._model = [model]
        self._mean, self._std = mean, std

    def forward(
        self,
        weights: dict[str, torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normalised = (images.float() / 255 - self._mean) / self._std
        answer: tuple[torch.Tensor, torch.Tensor] = functional_call(
            self._model[0], weights, (normalised,), {"labels": labels}
        )
        return answer


def write_program(
    path: Path, *, weights: Path, architecture: Architecture, mean: float, std: float
) -> None:
    """Export a model for any number of images, and accept it once it answers as the model does.

    Args:
        path: of the archive, which is either whole and checked or not there.
        weights: safetensors file of the `AuditedModel`.
        architecture: of the model.
        mean: subtracted from pixels in [0, 1].
        std: what is left is divided by it.

    Raises:
        NoProgramError: torch cannot export this model, or what it exports answers otherwise.
    """
    model = AuditedModel(architecture)
    model.load_state_dict(load_file(weights))
    whole = _Whole(model.eval().requires_grad_(False), mean=mean, std=std)
    state = dict(sorted(model.state_dict().items()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about torch
            _export(whole, state, architecture, path)
            program = open_program(bytearray(path.read_bytes()))
            for count in _CHECKED_WITH:
                _compare(program, whole, state, _examples(architecture, count))
    except Exception as error:  # whatever a backbone's own code makes of being traced
        path.unlink(missing_ok=True)
        raise NoProgramError(
            f"{architecture.backbone} cannot be exported: {first_line(error)}"
        ) from error


def _export(
    whole: _Whole, state: dict[str, torch.Tensor], architecture: Architecture, path: Path
) -> None:
    inputs = _examples(architecture, _EXPORTED_WITH)
    count = torch.export.Dim("n", min=1)
    program = torch.export.export(
        whole,
        (state, *inputs),
        dynamic_shapes=(dict.fromkeys(state), *({0: count} for _ in inputs)),
        strict=False,
    )
    if program.state_dict:
        raise ValueError("some of its weights cannot be told from its code")
    program.example_inputs = None  # they would be pickled, the weights with them
    torch.export.save(program, path)


def _examples(architecture: Architecture, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    shape = (count, *architecture.input_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if "loss" not in architecture.head.inputs:
        return [images]
    classes = torch.randint(0, architecture.num_classes, (count,), generator=generator)
    return [images, classes]


@torch.inference_mode()
def _compare(
    program: nn.Module, whole: _Whole, state: dict[str, Any], inputs: list[torch.Tensor]
) -> None:
    for exported, ours in zip(program(state, *inputs), whole(state, *inputs), strict=True):
        if not torch.allclose(exported, ours, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            worst = (exported - ours).abs().max().item()
            raise ValueError(f"the program's answers for {len(ours)} images are off by {worst:.1e}")
