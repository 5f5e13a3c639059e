"""Checkpoints: weights, the optimiser's state, and a JSON that says what they are.

Where each worker has the whole model, rank 0 writes safetensors and a file of the optimiser's.
Where each has a share of it, each writes that (`train/shards.py`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from amint_ray.config.load import training_fingerprint
from amint_ray.config.schema import Config
from amint_ray.contracts import first_line
from amint_ray.train.objective import Objective
from amint_ray.train.reduce import gather_lists, is_rank_zero, together
from amint_ray.train.update import Update

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
_READ_BYTES = 1 << 20
_OF_THE_CONFIGURATION = ("lr", "initial_lr", "weight_decay")
"""No more of an optimiser's groups: some keep there what moves, such as the number of steps."""


class DamagedCheckpointError(Exception):
    """A checkpoint that is not whole; its text says what is wrong with it."""


def identity_of(config: Config, manifest: str | None) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it.

    Random states need no more than the seeds: all are drawn anew at every step, from the seed, the
    step's number and the rank (`loop._seed`).
    """
    return {
        "config_fingerprint": training_fingerprint(config),
        "manifest_fingerprint": manifest,
        "seeds": {"train": config.train.seed, "split": config.data.split_seed},
    }


@dataclass
class TrainState:
    """Everything that moves during training.

    Attributes:
        model: the bare `AuditedModel`, not DDP around it; FSDP2 works inside of it.
        update: optimiser, schedule and loss scale.
        objective: with its weighting.
        sharded: whether every worker writes a share of a checkpoint.
        epoch: epochs done.
        step: steps done of the epoch that is under way.
        sums: what those steps summed up to, in the order of `train.step.SUMS`.
        history: one entry an epoch, as reported.
        lost: why images could not be read on some rank, by sample id, as far as all know.
    """

    model: nn.Module
    update: Update
    objective: Objective
    sharded: bool = False
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)

    def save(
        self, folder: Path, *, identity: Mapping[str, Any], architecture: str, final: bool = False
    ) -> None:
        """Write a checkpoint beside whatever the folder holds, its description last.

        Where the state is sharded, every worker calls this at the same time; else rank 0 does.

        Args:
            folder: where to.
            identity: `config_fingerprint`, and what else tells which run it is of.
            architecture: of the model, as JSON.
            final: the run ends here; the weights are written whole in any case.

        Raises:
            OSError: the disk is full, for instance; every worker that calls raises it. Where the
                state is sharded, its text begins with the folder and the machine.
        """
        if not self.sharded:
            save_weights(self.model, folder / WEIGHTS)
            _save_optimizer(self.update.optimizer, folder / OPTIMIZER)
            checks = _file_checks(folder)
        else:
            # Most runs need none of it, and every worker waits for its imports.
            from amint_ray.train.shards import save_shards

            save_shards(self.model, self.update.optimizer, folder)
            if final:
                together(lambda: save_weights(self.model, folder / WEIGHTS), where=folder)
            mine = together(lambda: _file_checks(folder), where=folder)
            checks = dict(gather_lists(list(mine.items())))
        description: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "lost": self.lost,
            "objective": self.objective.state_dict(),
            "update": self.update.state_dict(),
            **identity,
            "architecture": json.loads(architecture),
            "files": checks,
        }
        text = json.dumps(description, indent=2)
        self.on_rank_zero(lambda: (folder / STATE).write_text(text), where=folder)

    def on_rank_zero(self, write: Callable[[], Any], *, where: Path) -> None:
        """Write what rank 0 alone does; every worker that calls `save` calls this.

        Args:
            write: may raise OSError.
            where: the folder given to `save`.

        Raises:
            OSError: as from `save`.
        """
        if self.sharded:
            together(lambda: write() if is_rank_zero() else None, where=where)
        else:
            write()

    def load(self, folder: Path, *, identity: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            folder: that `save` filled; under FSDP2 with every worker's files.
            identity: as given to `save`.

        Raises:
            ValueError: it was written under another configuration, or for other roles.
        """
        description = json.loads((folder / STATE).read_text())
        for name, here in identity.items():
            if description[name] != here:
                raise ValueError(
                    f"{folder}: checkpoint with {name} {description[name]}, this run has {here}"
                )
        self._take(folder, description)

    def inherit(
        self, folder: Path, *, manifest: str | None, architecture: str, steps_per_epoch: int
    ) -> None:
        """Go on from another run's checkpoint, under this run's learning rate and weight decay.

        Its moments and loss normalisers are kept: they are of the losses and gradients as they are
        there, which λ and the learning rate do not scale.

        Args:
            folder: as for `load`.
            manifest: fingerprint of this run's roles.
            architecture: of this run's model, as JSON.
            steps_per_epoch: of this run.

        Raises:
            ValueError: it is of other roles or another model, counts its steps otherwise, or has
                another optimiser; as it does where λ₂ or the weight decay is 0 in one alone.
        """
        description = json.loads((folder / STATE).read_text())
        steps = description["epoch"] * steps_per_epoch + description["step"]
        for what, there, here in (
            ("split into roles", description["manifest_fingerprint"], manifest),
            ("architecture", description["architecture"], json.loads(architecture)),
            ("number of steps an epoch", description["update"]["done"], steps),
        ):
            if there != here:
                raise ValueError(f"{folder}: cannot be inherited: its {what} is not this run's")
        try:
            self._take(folder, description, keep=_OF_THE_CONFIGURATION)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{folder}: cannot be inherited: its optimiser or loss weighting is not this run's "
                f"({first_line(error)}); loss.lambda_mint and train.weight_decay may differ, but "
                "not be 0 in one of the two alone"
            ) from error

    def _take(
        self, folder: Path, description: Mapping[str, Any], keep: Collection[str] = ()
    ) -> None:
        """Load all of a checkpoint.

        Args:
            folder: the checkpoint.
            description: what its JSON says.
            keep: settings of the optimiser's groups of parameters that stay as they are here.
        """
        kept = [
            {name: value for name, value in group.items() if name in keep}
            for group in self.update.optimizer.param_groups
        ]
        if self.sharded:
            from amint_ray.train.shards import load_shards

            load_shards(self.model, self.update.optimizer, folder)
        else:
            self.model.load_state_dict(load_file(folder / WEIGHTS))
            moments = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
            self.update.optimizer.load_state_dict(moments)
        for group, settings in zip(self.update.optimizer.param_groups, kept, strict=True):
            group |= settings
        self.update.load_state_dict(description["update"])  # sets the schedule's learning rate
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


def _file_checks(folder: Path) -> dict[str, list[int]]:
    return {file.name: _file_check(file) for file in sorted(folder.iterdir())}


def _save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(optimizer.state_dict(), file)
    except RuntimeError as error:  # of a failed write, or of a GPU that has no memory left
        if isinstance(error.__context__, OSError):
            raise OSError(first_line(error.__context__)) from error
        raise


def save_weights(model: nn.Module, path: Path) -> None:
    """A model's weights and buffers as safetensors, put together from all workers' shares.

    Every worker that has a share must call this; rank 0 writes.

    Raises:
        OSError: it cannot.
    """
    whole = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if is_rank_zero():
            whole[name] = value.detach().cpu().contiguous()
    if is_rank_zero():
        try:
            save_file(whole, path)
        except SafetensorError as error:  # whatever keeps it from writing
            raise OSError(first_line(error)) from error
