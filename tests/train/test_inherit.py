"""Going on from another run's checkpoint: its weights and moments, but this run's settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_jobs import SHARDED
from training_setup import (
    CONVNEXT,
    RESNET,
    VIT,
    Backbone,
    architecture_of,
    assert_same_weights,
    config_of,
    fresh_state,
    streams_of,
)

from amint_ray.config.schema import Config, Loss
from amint_ray.train.loop import LocalContext, Trained, train
from amint_ray.train.state import OPTIMIZER, STATE, TrainState

RATE = "train/steps_per_second"
DONE = 6  # steps in two epochs


class _Interrupted(LocalContext):
    """Dies in the middle of the third epoch."""

    def progress(self, event: Mapping[str, Any]) -> None:
        super().progress(event)
        if event.get("epoch") == 3 and event.get("step") == 8:
            raise ConnectionError("the worker died")


def run(config: Config, context: LocalContext, **options: Any) -> Trained:
    streams, architecture = streams_of(config), architecture_of(config)
    return train(config, architecture, streams, context, score=False, **options)


def left(config: Config, folder: Path) -> Path:
    """A run's checkpoint after two of its epochs."""
    folder.mkdir()
    with pytest.raises(ConnectionError):
        run(config, _Interrupted(folder))
    (checkpoint,) = folder.iterdir()
    return checkpoint


def empty(folder: Path) -> LocalContext:
    folder.mkdir()
    return LocalContext(folder)


def history(trained: Trained) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != RATE} for entry in trained.history]


def inherited(config: Config, checkpoint: Path) -> TrainState:
    state = fresh_state(config)
    architecture = architecture_of(config).to_json()
    state.inherit(checkpoint, manifest=None, architecture=architecture, steps_per_epoch=3)
    return state


def changed(config: Config, *, loss: dict[str, Any], train: dict[str, Any]) -> Config:
    return config.model_copy(
        update={
            "loss": config.loss.model_copy(update=loss),
            "train": config.train.model_copy(update=train),
        }
    )


CASES: dict[str, tuple[Backbone, dict[str, Any], dict[str, Any]]] = {
    "adamw-cosine": (RESNET, {"weighting": "ema", "ema_decay": 0.7}, {"optimizer": "adamw"}),
    "sgd-constant": (CONVNEXT, {}, {"optimizer": "sgd", "schedule": "constant"}),
    # Its groups of parameters count the steps.
    "lamb-tanh": (
        VIT,
        {"weighting": "gradnorm", "warmup_epochs": 3.0},
        {"optimizer": "lamb", "schedule": "tanh", "warmup_epochs": 2.5, "min_lr": 1e-4},
    ),
}


def of_case(name: str) -> Config:
    backbone, loss, options = CASES[name]
    return config_of(
        backbone,
        loss=Loss.model_validate(loss),
        data={"augment": "crop_flip"},
        train={
            "epochs": 4,
            "checkpoint_every": 2,
            "schedule": "cosine",
            "lr": 3e-3,
            "weight_decay": 0.01,
            **options,
        },
        drop_rate=0.3,
    )


@pytest.mark.parametrize("case", CASES)
def test_with_nothing_changed_it_is_going_on(case: str, tmp_path: Path) -> None:
    """Bit for bit: weights, moments and history."""
    config = of_case(case)
    checkpoint = left(config, tmp_path / "parent")
    child = empty(tmp_path / "child")
    got = run(config, child, inherit=checkpoint)
    expected = run(config, LocalContext(tmp_path / "parent"))
    assert child.events[0]["text"] == "1 worker goes on after epoch 2"
    assert_same_weights(got.model.state_dict(), expected.model.state_dict())
    assert history(got) == history(expected)
    assert [entry["epoch"] for entry in got.history] == [1, 2, 3, 4]
    last = [
        torch.load(max((tmp_path / name).iterdir()) / OPTIMIZER, weights_only=True)
        for name in ("child", "parent")
    ]
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=0)


def in_turn(config: Config, steps: int) -> TrainState:
    """A fresh state whose schedule has come so far step by step."""
    state = fresh_state(config)
    for _ in range(steps):
        state.update.step()
    return state


@pytest.mark.parametrize("case", CASES)
def test_settings_are_of_the_run_and_what_moved_is_inherited(case: str, tmp_path: Path) -> None:
    config = of_case(case)
    checkpoint = left(config, tmp_path / "parent")
    stored = torch.load(checkpoint / OPTIMIZER, weights_only=True)
    description = json.loads((checkpoint / STATE).read_text())
    other = changed(
        config,
        loss={"lambda_mint": 7.0, "lambda_task": 0.5},
        train={"lr": 2e-2, "weight_decay": 0.3},
    )
    state = inherited(other, checkpoint)
    assert state.update.done == DONE
    groups, fresh = state.update.optimizer.param_groups, in_turn(other, DONE).update.optimizer
    for group, new, old in zip(groups, fresh.param_groups, stored["param_groups"], strict=True):
        for name in ("lr", "initial_lr", "weight_decay"):
            assert group[name] == new[name]
        assert group["lr"] != old["lr"]
        assert group.get("step") == old.get("step")
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    moments = state.update.optimizer.state_dict()["state"]
    torch.testing.assert_close(moments, stored["state"], rtol=0, atol=0)
    assert all(
        any(m.abs().max() > 0 for m in each.values() if m.dim()) for each in moments.values()
    )
    # The scales of the two losses are inherited, λ are not.
    before = fresh_state(config).objective
    before.load_state_dict(description["objective"])
    scaled = before.weights() * torch.tensor([0.5, 7.0])
    torch.testing.assert_close(state.objective.weights(), scaled)

    child = run(other, empty(tmp_path / "child"), inherit=checkpoint)
    assert child.history[:2] == description["history"]
    rates = [entry["train/lr"] for entry in child.history[2:]]
    ends = [in_turn(other, steps).update.optimizer.param_groups[0]["lr"] for steps in (9, 12)]
    assert rates == ends


def test_a_checkpoint_of_the_runs_own_goes_first(tmp_path: Path) -> None:
    """It went on from what it inherited, which may be gone."""
    config = of_case("sgd-constant")
    left(config, tmp_path / "own")
    context = LocalContext(tmp_path / "own")
    trained = run(config, context, inherit=tmp_path / "gone")
    assert [entry["epoch"] for entry in trained.history] == [1, 2, 3, 4]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"epochs": 4, "checkpoint_every": 2})
    checkpoint = left(config, tmp_path / "parent")
    optimizer = "optimiser or loss weighting"
    unfit: list[tuple[str, dict[str, Any]]] = [
        ("architecture", {"mint": {"hidden": 12}}),
        ("number of steps an epoch", {"train": {"batch_size": 7}}),
        ("split into roles", {}),
        (optimizer, {"train": {"weight_decay": 0.1}}),
        (optimizer, {"loss": Loss(lambda_mint=0.0)}),
        (optimizer, {"loss": Loss(weighting="uncertainty")}),
    ]
    for number, (what, options) in enumerate(unfit):
        manifest = "others" if what == "split into roles" else None
        child = empty(tmp_path / str(number))
        with pytest.raises(ValueError, match=f"cannot be inherited: its {what} is not this run's"):
            run(config_of(CONVNEXT, **options), child, inherit=checkpoint, manifest=manifest)


def test_shares_of_a_model_are_inherited_alike(tmp_path: Path) -> None:
    """Written and read by `torch.distributed.checkpoint`, which has its own way with settings."""
    sharded = changed(SHARDED, loss={}, train={"weight_decay": 0.01})
    checkpoint = left(sharded, tmp_path / "parent")
    shutil.copytree(tmp_path / "parent", tmp_path / "copy")
    expected = run(sharded, LocalContext(tmp_path / "copy"))
    got = run(sharded, empty(tmp_path / "child"), inherit=checkpoint)
    assert_same_weights(got.model.state_dict(), expected.model.state_dict())
    assert history(got) == history(expected)
    other = changed(sharded, loss={}, train={"lr": 2e-2, "weight_decay": 0.3})
    state, old = inherited(other, checkpoint), inherited(sharded, checkpoint)
    groups, fresh = state.update.optimizer.param_groups, in_turn(other, DONE).update.optimizer
    for group, new in zip(groups, fresh.param_groups, strict=True):
        for name in ("lr", "initial_lr", "weight_decay"):
            assert group[name] == new[name]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    moments, before = (s.update.optimizer.state_dict()["state"] for s in (state, old))
    torch.testing.assert_close(moments, before, rtol=0, atol=0)
    assert all(moment["exp_avg"].abs().max() > 0 for moment in moments.values())
