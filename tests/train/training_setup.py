"""A small data set with all five roles, and contexts for the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amint_ray.config.schema import Config, Data, Evaluation, Loss, Mint, Model, Train
from amint_ray.contracts import Role
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.roles import Manifest
from amint_ray.model.joint import Architecture, plan_architecture

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


def config_of(
    backbone: Backbone,
    *,
    loss: Loss | None = None,
    train: Mapping[str, Any] | None = None,
    drop_rate: float | None = None,
) -> Config:
    model, mint = backbone
    if drop_rate is not None:
        model = model.model_copy(update={"options": {**model.options, "drop_rate": drop_rate}})
    return Config(
        data=Data(image_size=16, channels=3),
        model=model,
        mint=mint,
        loss=loss or Loss(),
        train=Train.model_validate({"epochs": 2, "batch_size": 9, "lr": 1e-2, **(train or {})}),
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
    return MemoryStreams(*data_set(), config, rank=rank, world_size=world_size)


class RankContext:
    """A `RunContext` for one of several processes; rank 0 writes its last checkpoint."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = torch.device("cpu")
        self._folder = folder

    def progress(self, event: Mapping[str, Any]) -> None:
        pass

    def report(self, metrics: Mapping[str, Any], write_checkpoint: Callable[[Path], None]) -> None:
        if self.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(self._folder)

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield None
