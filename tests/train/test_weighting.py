"""The weightings, by hand, in plain floats."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from amint_ray.config.schema import Loss
from amint_ray.train.objective import Objective
from amint_ray.train.weighting import create_weighting

Pairs = Sequence[tuple[float, float]]

ALL = pytest.mark.parametrize("weighting", ["initial", "ema", "none", "uncertainty", "gradnorm"])
LAMBDA_TASK, LAMBDA_MINT = 2.0, 10.0
LOSSES: Pairs = [(2.0, 0.5), (1.0, 0.25), (3.0, 1.0), (4.0, 4.0)]
NORMS: Pairs = [(4.0, 1.0), (2.0, 2.0), (1.0, 3.0), (5.0, 5.0)]
OPTIONS = {"ema_decay": 0.5, "uncertainty_lr": 0.1, "gradnorm_alpha": 1.5}


def objective_of(weighting: str, **options: Any) -> Objective:
    loss = Loss.model_validate({"weighting": weighting, **OPTIONS, **options})
    return Objective(
        lambda_task=LAMBDA_TASK, lambda_mint=LAMBDA_MINT, weighting=create_weighting(loss)
    )


def drive(objective: Objective, losses: Pairs = LOSSES, norms: Pairs = NORMS) -> list[list[float]]:
    """Do as the joint step does; the weights λ·s that each step had."""
    weights = []
    for step, loss in enumerate(losses):
        now = torch.tensor(loss)
        if objective.wants_first_losses:
            objective.start(now)
        weight = objective.weights().double()
        weights.append(weight.tolist())
        # What arrives in the backward pass belongs to the weighted losses.
        arrived = torch.tensor(norms[step], dtype=torch.float64) * weight
        objective.update(now, arrived.square())
    return weights


def uncertainty_by_hand() -> list[tuple[float, float]]:
    v, scales = [0.0, 0.0], []
    for losses in LOSSES:
        scales.append((math.exp(-v[0]), math.exp(-v[1])))
        # v ← v − η·∂/∂v (exp(−v)·ℓ + v/2)
        v = [x - 0.1 * (0.5 - math.exp(-x) * loss) for x, loss in zip(v, losses, strict=True)]
    return scales


def normalised(a: float, b: float) -> tuple[float, float]:
    return 2 * a / (a + b), 2 * b / (a + b)


EXPECTED: dict[str, Pairs] = {
    "initial": [(1 / 2, 1 / 0.5)] * 4,
    # m = (2, ½), (2, ½), (1.5, 0.375), (2.25, 0.6875): each step's loss counts from the next on.
    "ema": [
        (1 / 2, 1 / 0.5),
        (1 / 2, 1 / 0.5),
        (1 / 1.5, 1 / 0.375),
        (1 / 2.25, 1 / 0.6875),
    ],
    "none": [(1.0, 1.0)] * 4,
    "uncertainty": uncertainty_by_hand(),
    # Running means of the losses as above, of the norms (4, 1), (3, 1.5), (2, 2.25). Relative
    # rates: (1, 1), (1, 1), and after the third step (1.125, 1.375)/1.25 = (0.9, 1.1).
    "gradnorm": [
        (1.0, 1.0),
        normalised(1 / 4, 1 / 1),
        normalised(1 / 3, 1 / 1.5),
        normalised(0.9**1.5 / 2, 1.1**1.5 / 2.25),
    ],
}


@ALL
def test_four_steps_by_hand(weighting: str) -> None:
    got = drive(objective_of(weighting))
    for weights, (task, mint) in zip(got, EXPECTED[weighting], strict=True):
        assert weights == pytest.approx([LAMBDA_TASK * task, LAMBDA_MINT * mint], rel=1e-6)


@ALL
def test_scales_are_constants_to_the_gradient(weighting: str) -> None:
    objective = objective_of(weighting)
    drive(objective, LOSSES[:3])
    task, mint = (torch.tensor(v, requires_grad=True) for v in LOSSES[3])
    loss = objective(task, mint)
    loss.backward()
    expected = [LAMBDA_TASK * EXPECTED[weighting][3][0], LAMBDA_MINT * EXPECTED[weighting][3][1]]
    assert [task.grad.item(), mint.grad.item()] == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(expected[0] * 4.0 + expected[1] * 4.0, rel=1e-6)


@ALL
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_state_dict_goes_on_identically(weighting: str, after: int) -> None:
    losses = [(2.1, 0.51), (1.7, 0.3), (0.9, 0.7), (0.8, 0.1), (0.3, 0.2)]
    norms = [(0.3, 0.1), (0.7, 0.2), (1.1, 0.9), (0.1, 0.7), (0.9, 0.3)]
    straight = drive(objective_of(weighting), losses, norms)
    first = objective_of(weighting)
    drive(first, losses[:after], norms[:after])
    second = objective_of(weighting)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drive(second, losses[after:], norms[after:]) == straight[after:]


@ALL
def test_a_state_dict_goes_on_on_the_device_of_the_losses(weighting: str) -> None:
    """It is read on the CPU; the meta device, where there is no GPU, is as far from that as one."""
    meta = torch.ones(2, device="meta")
    first, second, fresh = (objective_of(weighting) for _ in range(3))
    drive(first, LOSSES[:2], NORMS[:2])
    second.load_state_dict(first.state_dict())
    fresh.start(meta)
    for objective in (second, fresh):
        for _ in range(2):
            assert objective(*meta).device.type == "meta"
            objective.update(meta, meta.double())


@ALL
def test_a_first_loss_of_zero_gives_finite_steps(weighting: str) -> None:
    losses = [(2.0, 0.0), (1.0, 0.0), (1.0, 0.5), (0.0, 0.5)]
    norms = [(1.0, 0.0), (1.0, 0.0), (1.0, 0.5), (0.0, 0.5)]
    weights = drive(objective_of(weighting), losses, norms)
    assert all(math.isfinite(w) and w >= 0 for pair in weights for w in pair), weights
    if weighting in ("initial", "ema"):  # nothing to be divided by
        assert weights[0] == [LAMBDA_TASK / 2, LAMBDA_MINT]


def test_uncertainty_comes_to_rest_where_each_loss_weighs_a_half() -> None:
    objective = objective_of("uncertainty")
    drive(objective, [(4.0, 0.1)] * 2000, [(1.0, 1.0)] * 2000)
    task, mint = objective.weights().tolist()
    assert [4.0 * task / LAMBDA_TASK, 0.1 * mint / LAMBDA_MINT] == pytest.approx(
        [0.5, 0.5], rel=1e-4
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_gradnorm_balances_the_gradients_by_the_training_rates(alpha: float) -> None:
    objective = objective_of("gradnorm", gradnorm_alpha=alpha, ema_decay=0.0)
    drive(objective, [(2.0, 0.5), (1.0, 0.4)], [(3.0, 7.0), (0.2, 5.0)])
    task, mint = objective.weights().tolist()
    scales = (task / LAMBDA_TASK, mint / LAMBDA_MINT)
    assert sum(scales) == pytest.approx(2, rel=1e-6)
    # Without memory: the last step's norms, and losses at 1/2 and 4/5 of the first ones.
    assert scales[0] * 0.2 / (scales[1] * 5) == pytest.approx((0.5 / 0.8) ** alpha, rel=1e-5)


def test_gradnorm_survives_gradients_that_overflow() -> None:
    """As they do under float16 until the loss scale has been found."""
    objective = objective_of("gradnorm")
    drive(objective, LOSSES[:2], [(math.inf, 1.0), (math.inf, math.inf)])
    weights = drive(objective, LOSSES[2:], NORMS[2:])
    assert all(math.isfinite(w) and w > 0 for pair in weights for w in pair), weights
    assert objective.weights().isfinite().all()
