"""Checkpoints: safetensors weights, an optimiser file, and a JSON that says what they are."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from amint_ray.contracts import first_line
from amint_ray.train.objective import Objective
from amint_ray.train.update import Update

WEIGHTS, UPDATE, STATE = "model.safetensors", "update.pt", "state.json"
_READ_BYTES = 1 << 20


class DamagedCheckpointError(Exception):
    """A checkpoint that is not whole; its text says what is wrong with it."""


@dataclass
class TrainState:
    """Everything that moves during training.

    Attributes:
        model: the bare `AuditedModel`, not DDP around it.
        update: optimiser, schedule and loss scale.
        objective: with its weighting.
        epoch: epochs done.
        step: steps done of the epoch that is under way.
        sums: what those steps summed up to, in the order of `train.step.SUMS`.
        history: one entry an epoch, as reported.
        lost: why images could not be read on some rank, by sample id, as far as all know.
    """

    model: nn.Module
    update: Update
    objective: Objective
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path, *, identity: Mapping[str, Any], architecture: str) -> None:
        """Write a checkpoint beside whatever the folder holds, its description last.

        Args:
            folder: where to.
            identity: `config_fingerprint`, and what else tells which run it is of.
            architecture: of the model, as JSON.

        Raises:
            OSError: the disk is full, for instance.
        """
        try:
            save_weights(self.model, folder / WEIGHTS)
            torch.save(self.update.state_dict(), folder / UPDATE)
        except (RuntimeError, SafetensorError) as error:  # what the two make of a failed write
            raise OSError(f"{folder} cannot be written to: {first_line(error)}") from error
        description: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "lost": self.lost,
            "objective": self.objective.state_dict(),
            **identity,
            "architecture": json.loads(architecture),
            "files": {file.name: _file_check(file) for file in sorted(folder.iterdir())},
        }
        (folder / STATE).write_text(json.dumps(description, indent=2))

    def load(self, folder: Path, *, config_fingerprint: str) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it was written under another configuration.
        """
        description = json.loads((folder / STATE).read_text())
        if description["config_fingerprint"] != config_fingerprint:
            raise ValueError(
                f"{folder}: checkpoint of configuration {description['config_fingerprint']}, "
                f"this run has {config_fingerprint}"
            )
        self.model.load_state_dict(load_file(folder / WEIGHTS))
        moving = torch.load(folder / UPDATE, weights_only=True, map_location="cpu")
        self.update.load_state_dict(moving)
        self.objective.load_state_dict(description["objective"])
        self.epoch, self.history = description["epoch"], description["history"]
        self.step, self.sums = description["step"], description["sums"]
        self.lost = description["lost"]


def check_checkpoint(folder: Path) -> None:
    """Whether all files that a checkpoint's description names are there as they were written.

    Raises:
        DamagedCheckpointError: not so.
    """
    try:
        files = json.loads((folder / STATE).read_text())["files"]
        for name, written in files.items():
            if _file_check(folder / name) != written:
                raise DamagedCheckpointError(f"{name} is not as it was written")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{Path(error.filename).name} is missing") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedCheckpointError(f"{STATE} is damaged") from error


def _file_check(file: Path) -> list[int]:
    """A file's bytes and CRC-32, which is enough against accidents and costs little."""
    crc = 0
    with file.open("rb") as opened:
        while piece := opened.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return [file.stat().st_size, crc]


def save_weights(model: nn.Module, path: Path) -> None:
    """A model's weights and buffers as safetensors."""
    save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, path)
