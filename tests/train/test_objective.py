"""The joint loss: λ₂ and its warm-up. The scales are in `test_weighting.py`."""

from __future__ import annotations

import json

import pytest
import torch
from training_setup import CONVNEXT, config_of, fresh_state

from amint_ray.config.schema import Loss
from amint_ray.train.objective import Objective
from amint_ray.train.weighting import RunningMean


def _weights(objective: Objective, steps: int) -> list[list[float]]:
    weights = []
    for _ in range(steps):
        weights.append(objective.weights().tolist())
        objective.update(torch.ones(2), torch.ones(2))
    return weights


def test_the_loss_is_the_weighted_sum() -> None:
    objective = Objective(lambda_task=2.0, lambda_mint=10.0)
    loss = objective(torch.tensor(0.5), torch.tensor(0.25))
    assert loss.item() == pytest.approx(2 * 0.5 + 10 * 0.25)


@pytest.mark.parametrize(
    ("steps", "factors"),
    [
        (0.0, [1, 1, 1, 1, 1]),
        (1.0, [1, 1, 1, 1, 1]),
        (4.0, [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        (2.5, [1 / 2.5, 2 / 2.5, 1, 1, 1]),  # epochs may be given in parts
    ],
)
def test_the_weight_of_the_mint_loss_warms_up(steps: float, factors: list[float]) -> None:
    objective = Objective(lambda_task=2.0, lambda_mint=10.0, warmup_steps=steps)
    expected = [pytest.approx([2.0, 10.0 * factor]) for factor in factors]
    assert _weights(objective, 5) == expected


def test_the_warm_up_goes_on_where_it_was() -> None:
    def fresh() -> Objective:
        return Objective(lambda_mint=0.3, weighting=RunningMean(0.5), warmup_steps=7.0)

    first, second = fresh(), fresh()
    straight = _weights(fresh(), 8)
    _weights(first, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert _weights(second, 5) == straight[3:]


def test_the_warm_up_of_a_run_is_in_epochs() -> None:
    loss = Loss(weighting="none", lambda_mint=4.0, warmup_epochs=1.5)
    objective = fresh_state(config_of(CONVNEXT, loss=loss)).objective  # three steps an epoch
    expected = [4.0 * min(1, (t + 1) / 4.5) for t in range(6)]
    assert [mint for _, mint in _weights(objective, 6)] == pytest.approx(expected)


def test_without_mint_the_objective_is_the_task_loss_itself() -> None:
    objective = Objective(lambda_task=5.0, lambda_mint=0.0, weighting=RunningMean(0.5))
    loss = torch.tensor(0.3, requires_grad=True)
    assert not objective.uses_mint
    assert not objective.wants_first_losses
    assert objective(loss, None) is loss
    assert Objective(lambda_mint=1e-9).uses_mint


def test_the_first_losses_are_wanted_once() -> None:
    objective = Objective(weighting=RunningMean(0.5))
    assert objective.wants_first_losses
    objective.start(torch.tensor([2.0, 4.0]))
    assert objective.weights().tolist() == [0.5, 0.25]
    _weights(objective, 1)
    assert not objective.wants_first_losses
    assert not Objective().wants_first_losses
