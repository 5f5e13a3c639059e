"""A head trained afterwards: the model stays, and only what a head may be told of is learned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train.training_setup import RESNET, VIT, Backbone, architecture_of, config_of, streams_of

from amint_ray.attacks.passive_mint import train_head
from amint_ray.config.schema import Config, Loss
from amint_ray.contracts import Batch, Role, RunError, Streams
from amint_ray.data.loading import MemoryStreams
from amint_ray.evaluation.scores import score
from amint_ray.model.joint import AuditedModel

CPU = torch.device("cpu")
torch.set_num_threads(1)


def audited(config: Config) -> AuditedModel:
    torch.manual_seed(3)
    model = AuditedModel(architecture_of(config))
    model.train()
    with torch.no_grad():  # BatchNorm's statistics are no longer those of a fresh model
        model.backbone(torch.rand(16, 3, 16, 16))
    return model.eval()


def trained(config: Config, model: AuditedModel, streams: Streams | None = None) -> AuditedModel:
    reads = streams or streams_of(config)
    return train_head(model, reads, config, CPU, progress=lambda event: None)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def keep(seen: dict[str, torch.Tensor], name: str, *call: Any) -> None:
    """A forward hook: note the module's output."""
    seen[name] = call[2]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=tol, atol=tol, msg=name)


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize(
    "data", [{"augment": "none"}, {"augment": "crop_flip"}], ids=["plain", "augmented"]
)
def test_the_head_is_that_of_a_plain_loop_over_frozen_activations(
    backbone: Backbone, data: dict[str, Any]
) -> None:
    config = config_of(backbone, train={"optimizer": "sgd", "lr": 0.05}, data=data)
    model = audited(config)
    before = state(model)
    got = trained(config, model)
    assert_same(state(model), before)
    assert_same(state(got.backbone), state(model.backbone))

    head = copy.deepcopy(trained(config_of(backbone, train={"lr": 1e-30}, data=data), model).head)
    weights = list(head.parameters())
    velocity = [torch.zeros_like(weight) for weight in weights]
    for epoch in range(config.train.epochs):
        for batch in streams_of(config).train_batches(epoch):
            seen: dict[str, torch.Tensor] = {}
            hooks = [
                model.backbone.get_submodule(tap.name).register_forward_hook(
                    functools.partial(keep, seen, tap.name)
                )
                for tap in model.architecture.taps
            ]
            with torch.no_grad():
                model.backbone(batch.images[batch.head_from :])
            for hook in hooks:
                hook.remove()
            logits = head([seen[tap.name] for tap in model.architecture.taps])
            loss = F.binary_cross_entropy_with_logits(
                logits[batch.told], batch.membership[batch.told]
            )
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():  # timm's sgd: Nesterov's momentum of 0.9
                for weight, moving, gradient in zip(weights, velocity, gradients, strict=True):
                    moving.mul_(0.9).add_(gradient)
                    weight.sub_(0.05 * (gradient + 0.9 * moving))
    assert_same(state(got.head), state(head), tol=2e-5)


class Changed(MemoryStreams):
    """The pixels of some rows of the head's are noise."""

    def __init__(self, config: Config, *, told: bool) -> None:
        memory = streams_of(config)
        super().__init__(memory._images, memory._manifest, config, rank=0, world_size=1)
        self._which = told

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for batch in super().train_batches(epoch, first_step):
            images = batch.images.clone()
            images[batch.told == self._which] = 0.123
            yield replace(batch, images=images)


def test_withheld_images_teach_it_nothing() -> None:
    config = config_of(RESNET)
    model = audited(config)
    usual = state(trained(config, model).head)
    assert_same(state(trained(config, model, Changed(config, told=False)).head), usual, tol=1e-6)
    changed = state(trained(config, model, Changed(config, told=True)).head)
    assert any((changed[name] != usual[name]).any() for name in usual)


def test_of_a_model_that_says_codes_it_is_told_of_membership_alone() -> None:
    config = config_of(RESNET, train={"epochs": 1})
    coded = config_of(RESNET, mint={"objective": "keyed", "keyed": {"bits": 6}})
    passive = trained(config, AuditedModel(architecture_of(coded)))
    table = score(passive, streams_of(config).score_batches([Role.TEST]), CPU)
    assert np.isfinite(table.mint_logit).all()
    assert table.code_p is None


def test_it_learns_its_members_and_can_be_asked_like_any_model() -> None:
    config = config_of(RESNET, train={"epochs": 60, "lr": 1e-2})
    model = audited(config)
    events: list[dict[str, Any]] = []
    passive = train_head(
        model, streams_of(config), config, CPU, progress=lambda event: events.append(dict(event))
    )
    assert not passive.training
    told = [Role.MEMBER, Role.EXTERNAL, Role.WITHHELD]
    mine, own = (
        score(each, streams_of(config).score_batches(told), CPU) for each in (passive, model)
    )
    np.testing.assert_array_equal(mine.task_loss, own.task_loss)
    members, external = (mine.of(role).mint_logit for role in (Role.MEMBER, Role.EXTERNAL))
    assert (members[:, None] > external).mean() > 0.95
    losses = [event["train/mint_loss"] for event in events if event["phase"] == "epoch"]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]
    steps = [event["step"] for event in events if event["phase"] == "train"]
    assert steps == list(range(1, 181)) and events[0]["steps"] == 180


def test_it_does_not_start_from_the_models_own_head_and_moves_no_random_state() -> None:
    config = config_of(RESNET, train={"lr": 1e-30, "epochs": 1})
    torch.manual_seed(config.train.seed)
    model = AuditedModel(architecture_of(config)).eval()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again = (trained(config, model).head for _ in range(2))
    torch.testing.assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)
    assert_same(state(first), state(again))
    own = state(model.head)
    assert (state(first)["fc.0.weight"] != own["fc.0.weight"]).any()


def test_batches_without_external_images_are_told_in_one_line() -> None:
    config = config_of(RESNET, loss=Loss(lambda_mint=0.0))
    with pytest.raises(RunError, match="lambda_mint above 0"):
        trained(config, audited(config))


def test_a_loss_that_is_not_finite_stops_it() -> None:
    config = config_of(RESNET)
    model = audited(config)
    with torch.no_grad():
        next(model.backbone.get_submodule("layer2").parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1 "):
        trained(config, model)
