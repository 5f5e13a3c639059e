"""The loss weighting, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from amint_ray.config.schema import Loss
from amint_ray.train.objective import Objective

LOSSES = [(2.0, 0.5), (1.0, 0.25), (3.0, 1.0)]


def _values(objective: Objective, losses: list[tuple[float, float]] = LOSSES) -> list[float]:
    return [objective(torch.tensor(t), torch.tensor(m)).item() for t, m in losses]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        # λ₁·t/2 + λ₂·m/0.5 with λ₁ = 2, λ₂ = 10
        ("initial", [2 + 10, 1 + 5, 3 + 20]),
        # β = 0.75: m_task = 2, 1.75, 2.0625; m_mint = 0.5, 0.4375, 0.578125
        ("ema", [2 + 10, 2 / 1.75 + 2.5 / 0.4375, 6 / 2.0625 + 10 / 0.578125]),
        ("none", [4 + 5, 2 + 2.5, 6 + 10]),
    ],
)
def test_three_steps_by_hand(weighting: str, expected: list[float]) -> None:
    objective = Objective(
        Loss(lambda_task=2.0, lambda_mint=10.0, weighting=weighting, ema_decay=0.75)
    )
    assert _values(objective) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weighting", ["initial", "ema", "none"])
def test_normalisers_are_constants_to_the_gradient(weighting: str) -> None:
    objective = Objective(
        Loss(lambda_task=2.0, lambda_mint=10.0, weighting=weighting, ema_decay=0.5)
    )
    _values(objective, LOSSES[:1])
    task, mint = (torch.tensor(v, requires_grad=True) for v in (1.0, 0.25))
    objective(task, mint).backward()
    norms = {"initial": (2.0, 0.5), "ema": (1.5, 0.375), "none": (1.0, 1.0)}[weighting]
    assert task.grad.item() == pytest.approx(2 / norms[0], rel=1e-6)
    assert mint.grad.item() == pytest.approx(10 / norms[1], rel=1e-6)


@pytest.mark.parametrize("weighting", ["initial", "ema", "none"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_state_dict_goes_on_identically(weighting: str, after: int) -> None:
    config = Loss(weighting=weighting, ema_decay=0.9)
    losses = [(2.1, 0.51), (1.7, 0.3), (0.9, 0.7)]
    straight = _values(Objective(config), losses)
    first = Objective(config)
    _values(first, losses[:after])
    second = Objective(config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert _values(second, losses[after:]) == straight[after:]


def test_without_mint_the_objective_is_the_task_loss_itself() -> None:
    objective = Objective(Loss(lambda_task=5.0, lambda_mint=0.0))
    loss = torch.tensor(0.3, requires_grad=True)
    assert not objective.uses_mint
    assert objective(loss, None) is loss
    assert objective.state_dict() == {"norms": None}
    assert Objective(Loss(lambda_mint=1e-9)).uses_mint


@pytest.mark.parametrize(
    "weighting",
    [
        "initial",
        "ema",
    ],
)
def test_a_first_loss_of_zero_gives_finite_steps(weighting: str) -> None:
    objective = Objective(Loss(weighting=weighting))
    values = _values(objective, [(2.0, 0.0), (1.0, 0.0), (1.0, 0.5)])
    assert all(math.isfinite(value) for value in values), values
