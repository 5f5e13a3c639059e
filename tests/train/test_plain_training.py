"""λ₂ = 0 is plain training: bit for bit what a loop around `timm.create_model` gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from training_setup import (
    CLASSES,
    CONVNEXT,
    RESNET,
    VIT,
    Backbone,
    architecture_of,
    config_of,
    data_set,
    streams_of,
)

from amint_ray.config.schema import Config, Loss
from amint_ray.contracts import Batch, Role
from amint_ray.data.loading import MemoryStreams
from amint_ray.train.loop import LocalContext, create_state, train


class _Watched(MemoryStreams):
    """Streams that remember which positions of the data set each batch held."""

    def __init__(self, config: Config) -> None:
        images, manifest = data_set()
        super().__init__(images, manifest, config, rank=0, world_size=1)
        self._position = {image.tobytes(): i for i, image in enumerate(images)}
        self.seen: list[list[int]] = []
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        for batch in super().train_batches(epoch):
            self.seen.append(self._positions(batch))
            self.batches.append((batch.images.clone(), batch.labels.clone()))
            yield batch

    def _positions(self, batch: Batch) -> list[int]:
        pixels = ((batch.images * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()
        return [self._position[image.tobytes()] for image in pixels]


CASES = [
    (CONVNEXT, {"optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "lr": 1e-3}),
    (RESNET, {"optimizer": "sgd", "weight_decay": 1e-3, "schedule": "constant", "lr": 0.05}),
    (RESNET, {"optimizer": "adam", "weight_decay": 0.0, "schedule": "cosine", "lr": 1e-3}),
    (VIT, {"optimizer": "adamw", "weight_decay": 0.5, "schedule": "constant", "lr": 1e-2}),
]


@pytest.mark.parametrize(
    ("backbone", "train_options"), CASES, ids=["convnext", "resnet-sgd", "resnet-adam", "vit"]
)
def test_the_backbone_is_that_of_a_plain_loop(
    backbone: Backbone, train_options: dict[str, object], tmp_path: Path
) -> None:
    config = config_of(
        backbone, loss=Loss(lambda_mint=0.0), train={"seed": 11, "epochs": 3, **train_options}
    )
    streams = _Watched(config)
    trained = train(config, architecture_of(config), streams, LocalContext(tmp_path))
    assert len(streams.batches) == 3 * (28 // 9)

    torch.manual_seed(11)
    plain = timm.create_model(
        config.model.backbone, num_classes=CLASSES, in_chans=3, **config.model.options
    )
    optimizer = create_optimizer_v2(
        plain,
        opt=config.train.optimizer,
        lr=config.train.lr,
        weight_decay=config.train.weight_decay,
        **({"momentum": 0.9} if config.train.optimizer == "sgd" else {}),
    )
    scheduler = None
    if config.train.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    plain.train()
    losses = []
    for images, labels in streams.batches:
        loss = F.cross_entropy(plain(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())

    expected = plain.state_dict()
    got = trained.model.backbone.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    for epoch, entry in enumerate(trained.history):
        assert "train/mint_loss" not in entry
        mean = np.mean(losses[3 * epoch : 3 * epoch + 3])
        assert entry["train/task_loss"] == pytest.approx(mean, rel=1e-6)


def test_the_head_is_not_trained_and_no_external_image_is_read(tmp_path: Path) -> None:
    config = config_of(
        CONVNEXT,
        loss=Loss(lambda_mint=0.0),
        train={"optimizer": "adamw", "weight_decay": 0.5, "epochs": 2},
    )
    streams = _Watched(config)
    architecture = architecture_of(config)
    trained = train(config, architecture, streams, LocalContext(tmp_path))
    fresh = create_state(config, architecture, streams.steps_per_epoch, torch.device("cpu")).model
    for name, value in fresh.head.state_dict().items():
        assert torch.equal(trained.model.head.state_dict()[name], value), name
    assert any(
        not torch.equal(trained.model.backbone.state_dict()[name], value)
        for name, value in fresh.backbone.state_dict().items()
    )
    role = data_set()[1].role
    assert {role[i] for batch in streams.seen for i in batch} == {Role.MEMBER, Role.WITHHELD}
    for epoch in range(2):
        rows = [i for batch in streams.seen[3 * epoch : 3 * epoch + 3] for i in batch]
        assert len(rows) == len(set(rows)) == 27
    assert streams.seen[:3] != streams.seen[3:]


def test_joint_batches_do_hold_external_images() -> None:
    """The watcher above would see one if there were one."""
    streams = _Watched(config_of(CONVNEXT))
    batches = list(streams.train_batches(0))
    role = data_set()[1].role
    for rows, batch in zip(streams.seen, batches, strict=True):
        roles = role[rows].tolist()
        assert roles[9:] == [Role.EXTERNAL] * 9
        assert set(roles[:9]) <= {Role.MEMBER, Role.WITHHELD}
        assert batch.membership.tolist() == [1.0] * 9 + [0.0] * 9
        assert batch.told.tolist() == [r != Role.WITHHELD for r in roles]
        assert batch.told_per_worker == int(batch.told.sum())


def test_the_streams_of_two_runs_are_the_same() -> None:
    config = config_of(CONVNEXT)
    for a, b in zip(
        streams_of(config).train_batches(1), streams_of(config).train_batches(1), strict=True
    ):
        assert torch.equal(a.images, b.images)
