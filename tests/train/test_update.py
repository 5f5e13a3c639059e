"""Optimisers are timm's, schedules are their formulas, float16 leaves out what overflows."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from amint_ray.config.schema import Train
from amint_ray.contracts import UserError
from amint_ray.train.update import Update, create_update

STEPS = 4  # an epoch


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step))
    loss: torch.Tensor = model(x).square().mean()
    return loss


def update_of(model: nn.Module, **train: Any) -> Update:
    return create_update(model, Train.model_validate({"epochs": 10, "lr": 0.1, **train}), STEPS)


def advance(model: nn.Module, update: Update, steps: range) -> list[float]:
    """Do these steps; the learning rate of each."""
    rates = []
    for step in steps:
        rates.append(update.optimizer.param_groups[0]["lr"])
        update.backward(loss_of(model, step))
        update.step()
    return rates


# --- optimisers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {}),
        ("momentum", {"momentum": 0.5}),
        ("adam", {"betas": [0.8, 0.9]}),
        ("adamw", {"eps": 1e-3}),
        ("nadamw", {}),
        ("lamb", {"trust_clip": True}),
        ("lion", {}),
        ("adopt", {}),
        ("rmsproptf", {"alpha": 0.7}),
        ("muon", {}),
    ],
)
def test_any_optimizer_is_the_one_that_timm_builds(name: str, options: dict[str, Any]) -> None:
    model, plain = net(), net()
    update = update_of(model, optimizer=name, optimizer_options=options, lr=0.01, weight_decay=0.1)
    optimizer = create_optimizer_v2(plain, opt=name, lr=0.01, weight_decay=0.1, **options)
    assert type(update.optimizer) is type(optimizer)
    assert len(update.optimizer.param_groups) == len(optimizer.param_groups)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
    advance(model, update, range(4))
    for name_of, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name_of], value), name_of


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adamww", r"near names: .*\badamw\b"),
        ("lammb", r"near names: .*\blamb\b"),
        ("SGD ", r"it has .*\bnadam\b.*\bsgd\b"),
    ],
)
def test_an_unknown_optimizer_is_refused_with_near_names(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=r"train\.optimizer") as caught:
        update_of(net(), optimizer=name)
    text = str(caught.value)
    assert repr(name) in text
    assert re.search(hint, text)
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "options", [{"bettas": [0.9, 0.9]}, {"betas": [2.0, 0.9]}, {"betas": "high"}]
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"train\.optimizer = 'adamw' with options") as caught:
        update_of(net(), optimizer="adamw", optimizer_options=options)
    assert next(iter(options)) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "says"),
    [("lr", "stands in `train` itself"), ("layer_decay", "would have no effect here")],
)
def test_options_that_are_not_the_optimisers_are_refused(option: str, says: str) -> None:
    with pytest.raises(UserError, match=f"train.optimizer_options: {option} {says}"):
        update_of(net(), optimizer="adamw", optimizer_options={option: 0.5})


# --- schedules ------------------------------------------------------------------------------------

PEAK, LEAST, TOTAL = 0.1, 0.002, 40


def cosine(t: int) -> float:
    return LEAST + (PEAK - LEAST) * (1 + math.cos(math.pi * t / TOTAL)) / 2


def tanh(t: int) -> float:
    part = t / TOTAL
    return LEAST + (PEAK - LEAST) * (1 - math.tanh(-7 * (1 - part) + 3 * part)) / 2


FORMULAS = {
    "constant": lambda t: PEAK,
    "cosine": cosine,
    "tanh": tanh,
    "poly": lambda t: LEAST + (PEAK - LEAST) * (1 - t / TOTAL),
    "step": lambda t: PEAK * 0.5 ** (t // 10),  # every two and a half epochs
}


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.5])
def test_learning_rates_are_the_formulas(schedule: str, warmup_epochs: float) -> None:
    model, warm, formula = net(), round(STEPS * warmup_epochs), FORMULAS[schedule]
    update = update_of(
        model,
        optimizer="sgd",
        schedule=schedule,
        min_lr=LEAST,
        warmup_epochs=warmup_epochs,
        decay_epochs=2.5,
        decay_rate=1.0 if schedule == "poly" else 0.5,
    )
    rates = advance(model, update, range(TOTAL))
    first, top = PEAK / 1000, formula(warm) if schedule == "tanh" else PEAK
    expected = [first + (top - first) * t / warm if t < warm else formula(t) for t in range(TOTAL)]
    assert rates == pytest.approx(expected, rel=1e-6)
    if schedule in ("cosine", "tanh", "poly"):  # where it stays if anything went on
        assert update.optimizer.param_groups[0]["lr"] == pytest.approx(LEAST)


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_stored_update_goes_on_as_if_nothing_had_been(schedule: str, precision: str) -> None:
    options = {
        "optimizer": "nadamw",
        "schedule": schedule,
        "warmup_epochs": 1.0,
        "decay_epochs": 1.5,
        "precision": precision,
    }
    straight, first = net(), net()
    rates = advance(straight, update_of(straight, **options), range(9))
    half = update_of(first, **options)
    advance(first, half, range(5))
    stored = io.BytesIO()
    torch.save([first.state_dict(), half.optimizer.state_dict(), half.state_dict()], stored)
    stored.seek(0)
    weights, moments, state = torch.load(stored, weights_only=True)
    second = net(seed=1)
    second.load_state_dict(weights)
    resumed = update_of(second, **options)
    resumed.optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    assert resumed.done == 5
    assert advance(second, resumed, range(5, 9)) == rates[5:]
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


# --- float16 --------------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_a_step_that_overflows_is_left_out_and_the_scale_falls(clip_grad: float | None) -> None:
    model = net()
    update = update_of(model, optimizer="adamw", precision="float16", clip_grad=clip_grad)
    scale = update.state_dict()["scaler"]["scale"]
    advance(model, update, range(1))
    good = weights_of(model)
    for step in range(1, 4):
        update.backward(loss_of(model, step) * (math.inf if step % 2 else math.nan))
        update.step()
        assert same(weights_of(model), good)
        assert all(p.grad is None for p in model.parameters())
        assert update.state_dict()["scaler"]["scale"] == scale / 2**step
    advance(model, update, range(1))
    assert not same(weights_of(model), good)
    assert update.done == 5
    assert all(w.isfinite().all() for w in weights_of(model))


def test_the_loss_scale_is_stored() -> None:
    model = net()
    update = update_of(model, precision="float16")
    for step in range(3):
        update.backward(loss_of(model, step) * math.inf)
        update.step()
    other = update_of(net(), precision="float16")
    before = other.state_dict()["scaler"]["scale"]
    other.load_state_dict(update.state_dict())
    assert other.state_dict()["scaler"] == update.state_dict()["scaler"]
    assert other.state_dict()["scaler"]["scale"] == before / 8


def test_gradients_that_overflow_for_ever_stop_the_run() -> None:
    model = net()
    update = update_of(model, precision="float16")
    with pytest.raises(FloatingPointError, match=r"float16 overflow.*bfloat16") as caught:
        for step in range(100):
            update.backward(loss_of(model, step) * math.inf)
            update.step()
    assert f"step {update.done}:" in str(caught.value)
    assert update.done < 50
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_float16_the_loss_is_not_scaled(precision: str) -> None:
    model, plain = net(), net()
    update_of(model, precision=precision).backward(loss_of(model, 0))
    loss_of(plain, 0).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
