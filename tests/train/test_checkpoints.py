"""A run that was interrupted ends where the straight one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_setup import (
    CONVNEXT,
    RESNET,
    Backbone,
    architecture_of,
    config_of,
    data_set,
    streams_of,
)

from amint_ray.config.load import fingerprint
from amint_ray.config.schema import Config, Loss
from amint_ray.contracts import Batch
from amint_ray.data.loading import MemoryStreams
from amint_ray.evaluation.scores import read_scores
from amint_ray.train.loop import SCORES, LocalContext, Trained, create_state, train

RATE = "train/steps_per_second"


class _Interrupted(LocalContext):
    """Dies in the middle of the third epoch."""

    def progress(self, event: Mapping[str, Any]) -> None:
        super().progress(event)
        if event.get("epoch") == 3 and event.get("step") == 8:
            raise ConnectionError("the worker died")


def _run(config: Config, context: LocalContext) -> Trained:
    return train(config, architecture_of(config), streams_of(config), context)


def _history(trained: Trained) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != RATE} for entry in trained.history]


@pytest.mark.parametrize(
    ("backbone", "weighting", "optimizer", "lambda_mint"),
    [
        (RESNET, "ema", "adamw", 1.0),
        (CONVNEXT, "initial", "sgd", 1.0),
        (CONVNEXT, "initial", "adamw", 0.0),
    ],
    ids=["resnet-ema-adamw", "convnext-initial-sgd", "plain"],
)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(
    backbone: Backbone, weighting: str, optimizer: str, lambda_mint: float, tmp_path: Path
) -> None:
    config = config_of(
        backbone,
        loss=Loss(weighting=weighting, lambda_mint=lambda_mint, ema_decay=0.7),
        train={
            "epochs": 4,
            "checkpoint_every": 2,
            "optimizer": optimizer,
            "schedule": "cosine",
            "lr": 3e-3,
            "weight_decay": 0.01,
        },
        drop_rate=0.3,
    )
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    straight = _run(config, LocalContext(tmp_path / "straight"))

    broken = tmp_path / "broken"
    with pytest.raises(ConnectionError):
        _run(config, _Interrupted(broken))
    torch.rand(17)  # what else the process drew must not matter
    context = LocalContext(broken)
    resumed = _run(config, context)

    steps = [event["step"] for event in context.events if event["phase"] == "train"]
    assert steps == [7, 8, 9, 10, 11, 12]  # three steps an epoch, two epochs were done
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert _history(resumed) == _history(straight)
    assert [entry["epoch"] for entry in resumed.history] == [1, 2, 3, 4]
    for name, column in vars(straight.scores).items():
        assert np.array_equal(getattr(resumed.scores, name), column), name


def test_the_last_checkpoint_is_the_trained_model_and_its_scores(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"epochs": 3, "checkpoint_every": 1})
    context = LocalContext(tmp_path)
    trained = _run(config, context)
    assert len(list(tmp_path.iterdir())) == 3
    with context.latest_checkpoint() as last:
        pass
    assert last is not None
    state = create_state(config, architecture_of(config), 3, torch.device("cpu"))
    state.load(last, config_fingerprint=fingerprint(config))
    assert state.epoch == 3
    assert state.history == trained.history
    for name, value in trained.model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], value), name
    stored = read_scores(last / SCORES)
    for name, column in vars(trained.scores).items():
        assert np.array_equal(getattr(stored, name), column), name
    # A run that is already done only scores again.
    again = LocalContext(tmp_path)
    assert _history(_run(config, again)) == _history(trained)
    assert [event["phase"] for event in again.events] == ["evaluate"]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"epochs": 1})
    _run(config, LocalContext(tmp_path))
    other = config_of(CONVNEXT, train={"epochs": 1, "lr": 2e-2})
    with pytest.raises(ValueError, match=fingerprint(config)) as raised:
        _run(other, LocalContext(tmp_path))
    assert fingerprint(other) in str(raised.value)


class _Poisoned(MemoryStreams):
    """One image of the second epoch is not finite."""

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().train_batches(epoch)):
            if (epoch, step) == (1, 2):
                images = batch.images.clone()
                images[0] = float("nan")
                yield dataclasses.replace(batch, images=images)
            else:
                yield batch


@pytest.mark.parametrize("lambda_mint", [0.0, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_epoch(
    lambda_mint: float, tmp_path: Path
) -> None:
    config = config_of(
        CONVNEXT, loss=Loss(lambda_mint=lambda_mint), train={"epochs": 3, "checkpoint_every": 1}
    )
    streams = _Poisoned(*data_set(), config, rank=0, world_size=1)
    context = LocalContext(tmp_path)
    with pytest.raises(FloatingPointError, match="epoch 2"):
        train(config, architecture_of(config), streams, context)
    # The checkpoint before it is still there, and whole.
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_000001"]


def test_a_learning_rate_that_blows_up_stops_the_run(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"optimizer": "sgd", "lr": 1e30})
    with pytest.raises(FloatingPointError, match=r"train/task_loss.* not finite in epoch 1"):
        _run(config, LocalContext(tmp_path))
