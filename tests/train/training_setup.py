"""A small data set with all five roles, and contexts for the loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amint_ray.config.data_schema import Data
from amint_ray.config.schema import Config, Evaluation, Loss, Mint, Model, Train
from amint_ray.contracts import Batch, Role
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.roles import Manifest
from amint_ray.model.joint import Architecture, plan_architecture
from amint_ray.train.loop import create_state
from amint_ray.train.state import TrainState
from amint_ray.train.step import SUMS, train_step

Backbone = tuple[Model, Mint]
CLASSES = 4
COUNTS = {
    Role.MEMBER: 20,
    Role.WITHHELD: 8,
    Role.EXTERNAL: 17,
    Role.CALIBRATION: 11,
    Role.TEST: 9,
}

VIT = (
    Model(
        backbone="vit_tiny_patch16_224",
        options={"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
    ),
    Mint(taps=("blocks.1", "blocks.2"), head="tokens"),
)
# The digits recipe's shape, a quarter as wide.
CONVNEXT = (
    Model(
        backbone="convnext_atto",
        options={
            "patch_size": 1,
            "depths": [1, 1, 1, 1],
            "dims": [8, 16, 24, 32],
            "kernel_sizes": 3,
        },
    ),
    Mint(taps=("stages.1", "stages.2"), channels=6, hidden=10),
)
RESNET = (
    Model(
        backbone="resnet18",
        options={"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
    ),
    Mint(taps=("layer2", "layer3"), channels=6, hidden=10),
)

# Secret codes of the images below, for heads that learn them.
CODES = np.random.default_rng(3).integers(0, 2, (sum(COUNTS.values()), 64)).astype(np.uint8)


def config_of(
    backbone: Backbone,
    *,
    loss: Loss | None = None,
    train: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    mint: Mapping[str, Any] | None = None,
    drop_rate: float | None = None,
) -> Config:
    model, reads = backbone
    if drop_rate is not None:
        model = model.model_copy(update={"options": {**model.options, "drop_rate": drop_rate}})
    return Config(
        data=Data.model_validate({"image_size": 16, "channels": 3, **(data or {})}),
        model=model,
        mint=Mint.model_validate({**reads.model_dump(), **(mint or {})}),
        loss=loss or Loss(),
        # 28 images of D: three steps of 9, 9 and 10.
        train=Train.model_validate({"epochs": 2, "batch_size": 10, "lr": 1e-2, **(train or {})}),
        evaluation=Evaluation(batch_size=4),
    )


def architecture_of(config: Config) -> Architecture:
    return plan_architecture(config, CLASSES)


def data_set() -> tuple[np.ndarray, Manifest]:
    """Distinct images with random labels, roles scattered over the positions."""
    rng = np.random.default_rng(7)
    roles = np.array([role.value for role, n in COUNTS.items() for _ in range(n)])
    rng.shuffle(roles)
    n = len(roles)
    images = rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
    ids = np.array([f"s/{i:03d}" for i in rng.permutation(n)])
    label = rng.integers(0, CLASSES, n).astype(np.int64)
    return images, Manifest(sample_id=ids, content=ids, label=label, role=roles)


def streams_of(config: Config, *, rank: int = 0, world_size: int = 1) -> MemoryStreams:
    return MemoryStreams(*data_set(), config, rank=rank, world_size=world_size, codes=CODES)


class Poisoned(MemoryStreams):
    """Images of one global step (counted from 1) hold a value that is not finite."""

    def __init__(
        self,
        config: Config,
        step: int,
        value: float,
        *,
        row: int = 0,
        bad_rank: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(*data_set(), config, rank=rank, world_size=world_size)
        self._bad_step, self._value, self._row = step, value, row
        self._is_bad = rank == bad_rank

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        first = epoch * self.steps_per_epoch + first_step + 1
        for step, batch in enumerate(super().train_batches(epoch, first_step), start=first):
            if step == self._bad_step and self._is_bad:
                images = batch.images.clone()
                images[self._row, 0, 3, 3] = self._value
                batch = dataclasses.replace(batch, images=images)
            yield batch


def ids_of_step(config: Config, step: int) -> set[str]:
    streams = streams_of(config)
    epoch, number = divmod(step - 1, streams.steps_per_epoch)
    return set(list(streams.train_batches(epoch))[number].sample_id.tolist())


@dataclass
class Stepped:
    """Some steps outside of the loop: each one's `SUMS`, and the weights before the first."""

    start: dict[str, torch.Tensor]
    sums: torch.Tensor
    state: TrainState
    batches: list[Batch]

    @property
    def losses(self) -> torch.Tensor:
        """(steps, 2) mean task and MINT loss."""
        of = dict(zip(SUMS, self.sums.T, strict=True))
        return torch.stack(
            [of["task_loss"] / of["task_rows"], of["mint_loss"] / of["told_rows"]], dim=1
        )

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.state.model.state_dict()


def fresh_state(config: Config) -> TrainState:
    steps = streams_of(config).steps_per_epoch
    return create_state(config, architecture_of(config), steps, torch.device("cpu"))


def take_steps(config: Config, prepare: Callable[[TrainState], object] | None = None) -> Stepped:
    """The steps of the first epoch, after `prepare` has had a look at the fresh state."""
    batches = list(streams_of(config).train_batches(0))
    state = fresh_state(config)
    if prepare is not None:
        prepare(state)
    state.model.train()
    start = {name: value.clone() for name, value in state.model.state_dict().items()}
    sums = [train_step(state.model, b, state.objective, state.update) for b in batches]
    return Stepped(start, torch.stack(sums), state, batches)


def assert_same_weights(
    got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tol: float = 0.0
) -> None:
    """Equal, bit for bit where no tolerance is given."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tol, atol=tol, msg=name)


class RankContext:
    """A `RunContext` for one of several processes; rank 0 writes its last checkpoint."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = torch.device("cpu")
        self._folder = folder

    def progress(self, event: Mapping[str, Any]) -> None:
        pass

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        if self.rank == 0 or everywhere:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(self._folder)
        return True

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield None
