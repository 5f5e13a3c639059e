"""The joint step against the authors' two passes, in float64."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from training_setup import CLASSES, CONVNEXT, VIT, Backbone, architecture_of, config_of

from amint_ray.config.schema import Loss
from amint_ray.contracts import Batch
from amint_ray.model.joint import AuditedModel
from amint_ray.train.objective import Objective
from amint_ray.train.step import SUMS, forward, train_step
from amint_ray.train.update import Update
from amint_ray.train.weighting import create_weighting

LAMBDA_TASK, LAMBDA_MINT, DECAY, ALPHA, RATE = 0.7, 3.0, 0.6, 1.5, 0.2
BACKBONES = pytest.mark.parametrize(
    ("backbone", "behind"), [(VIT, "blocks.3"), (CONVNEXT, "stages.3")], ids=["vit", "convnext"]
)


def _batch(seed: int, n_task: int = 7, n_external: int = 5, withheld: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    n = n_task + n_external
    told = torch.ones(n, dtype=torch.bool)
    told[torch.randperm(n_task, generator=generator)[:withheld]] = False
    return Batch(
        images=torch.randn(n, 3, 16, 16, generator=generator, dtype=torch.float64),
        labels=torch.randint(CLASSES, (n,), generator=generator),
        n_task=n_task,
        head_from=0,
        membership=torch.cat([torch.ones(n_task), torch.zeros(n_external)]),
        told=told,
        sample_id=np.array([f"s{seed}/{i}" for i in range(n)]),
        task_per_worker=float(n_task),
        told_per_worker=float(n - withheld),
    )


class _TwoPasses:
    """The authors' model: D and E go through the whole backbone, one after the other."""

    def __init__(self, model: AuditedModel) -> None:
        architecture = model.architecture
        self.backbone: nn.Module = timm.create_model(
            architecture.backbone, num_classes=CLASSES, in_chans=3, **architecture.options
        ).double()
        self.backbone.load_state_dict(model.backbone.state_dict())
        self.head = copy.deepcopy(model.head)
        self._taps = [tap.name for tap in architecture.taps]
        self._read: dict[str, torch.Tensor] = {}
        for name in self._taps:
            self.backbone.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self._read.__setitem__(name, output)
            )

    def _pass(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.backbone(images)
        activations = [self._read[name] for name in self._taps]
        return logits, self.head(activations), activations[-1]

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        n = batch.n_task
        logits, says_d, at_d = self._pass(batch.images[:n])
        _, says_e, at_e = self._pass(batch.images[n:])
        self._last = (at_d, at_e)
        says_d = says_d[batch.told[:n]]
        said = torch.cat([says_d, says_e])
        truth = torch.cat([torch.ones_like(says_d), torch.zeros_like(says_e)])
        task = F.cross_entropy(logits, batch.labels[:n])
        return task, F.binary_cross_entropy_with_logits(said, truth)

    def norms(self, *losses: torch.Tensor) -> list[float]:
        """Of each loss's gradient at the last tap's output, D's and E's rows together."""
        found = []
        for loss in losses:
            grads = torch.autograd.grad(loss, self._last, retain_graph=True, allow_unused=True)
            found.append(sum(g.square().sum().item() for g in grads if g is not None) ** 0.5)
        return found

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        named = {
            **{f"backbone.{k}": v for k, v in self.backbone.named_parameters()},
            **{f"head.{k}": v for k, v in self.head.named_parameters()},
        }
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


class _Scales:
    """The weightings' equations, in plain floats."""

    def __init__(self, weighting: str) -> None:
        self._weighting = weighting
        self._losses: list[list[float]] = []
        self._mean, self._norm, self._v = [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]

    def of_step(self, losses: list[float]) -> list[float]:
        """With the losses of the batch to come, of which only the first one is looked at."""
        if not self._losses:
            self._mean = losses
        first = (self._losses or [losses])[0]
        if self._weighting == "initial":
            return [1 / x for x in first]
        if self._weighting == "ema":
            return [1 / x for x in self._mean]
        if self._weighting == "uncertainty":
            return [math.exp(-v) for v in self._v]
        if self._weighting == "none" or not self._losses:
            return [1.0, 1.0]
        rates = [mean / a for mean, a in zip(self._mean, first, strict=True)]
        pull = [(r / (sum(rates) / 2)) ** ALPHA / g for r, g in zip(rates, self._norm, strict=True)]
        return [2 * p / sum(pull) for p in pull]

    def done(self, losses: list[float], norms: list[float]) -> None:
        scales = [math.exp(-v) for v in self._v]
        self._v = [
            v - RATE * (0.5 - s * x) for v, s, x in zip(self._v, scales, losses, strict=True)
        ]
        before = self._norm if self._losses else norms
        self._mean = [DECAY * a + (1 - DECAY) * b for a, b in zip(self._mean, losses, strict=True)]
        self._norm = [DECAY * a + (1 - DECAY) * b for a, b in zip(before, norms, strict=True)]
        self._losses.append(losses)


@BACKBONES
@pytest.mark.parametrize("weighting", ["initial", "ema", "none", "uncertainty", "gradnorm"])
@pytest.mark.parametrize(
    ("n_external", "accumulate"), [(5, 1), (2, 3), (28, 2)], ids=["one", "few", "many"]
)
def test_steps_are_those_of_two_passes(
    backbone: Backbone, behind: str, weighting: str, n_external: int, accumulate: int
) -> None:
    torch.manual_seed(0)
    architecture = architecture_of(config_of(backbone))
    assert architecture.early_exit
    model = AuditedModel(architecture).double().train()
    loss = Loss(weighting=weighting, ema_decay=DECAY, gradnorm_alpha=ALPHA, uncertainty_lr=RATE)
    objective = Objective(
        lambda_task=LAMBDA_TASK, lambda_mint=LAMBDA_MINT, weighting=create_weighting(loss)
    )
    if objective.reads_gradients:
        model.watch_gradients(objective.record)
    # A step of the rate 1 is the gradient; the next step starts from where it led.
    update = Update(model, torch.optim.SGD(model.parameters(), lr=1.0), accumulate=accumulate)
    scales, seen = _Scales(weighting), []
    for step in range(3):
        batch = _batch(seed=step, n_external=n_external)
        reference = _TwoPasses(model)
        task, mint = reference.losses(batch)
        now, norms = [task.item(), mint.item()], reference.norms(task, mint)
        s = scales.of_step(now)
        expected = reference.gradients(LAMBDA_TASK * s[0] * task + LAMBDA_MINT * s[1] * mint)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(model, batch, objective, update)
        assert before.keys() == expected.keys()
        for name, parameter in model.named_parameters():
            got = before[name] - parameter
            torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        scales.done(now, norms)
        seen.append(s)
    # The steps must be able to tell the weightings apart.
    still = weighting in ("initial", "none")
    assert (seen[2] == pytest.approx(seen[0], rel=1e-3)) == still


@BACKBONES
def test_external_rows_are_not_computed_behind_the_last_tap(
    backbone: Backbone, behind: str
) -> None:
    model = AuditedModel(architecture_of(config_of(backbone))).double().train()
    rows: dict[str, int] = {}
    for name in (model.architecture.taps[-1].name, behind):
        model.backbone.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: rows.__setitem__(name, len(args[0]))
        )
    model.head.register_forward_pre_hook(
        lambda module, args: rows.__setitem__("head", len(args[0][-1]))
    )
    batch = _batch(seed=0)
    forward(model, batch, Objective())
    assert rows == {model.architecture.taps[-1].name: 12, behind: 7, "head": 12}


@BACKBONES
def test_external_rows_have_no_task_gradient(backbone: Backbone, behind: str) -> None:
    """With the MINT loss all but off, what E shows changes nothing."""
    model = AuditedModel(architecture_of(config_of(backbone))).double().train()
    gradients = []
    for seed in (1, 2):
        batch = _batch(seed=0)
        batch.images[batch.n_task :] = _batch(seed=seed).images[batch.n_task :]
        model.zero_grad()
        forward(model, batch, Objective(lambda_mint=1e-30))[0].backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    assert all(g.abs().max() > 1e-6 for g in gradients[0][-2:])


def test_withheld_rows_do_not_reach_the_head() -> None:
    model = AuditedModel(architecture_of(config_of(VIT))).double().train()
    batch = _batch(seed=0, n_external=0, withheld=7)
    loss, sums = forward(model, batch, Objective())
    loss.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.head.parameters())
    assert dict(zip(SUMS, sums.tolist(), strict=True))["mint_loss"] == 0


def test_fewer_told_rows_than_workers_are_still_a_mean_over_the_global_batch() -> None:
    """Four workers, two told rows in all, both here: this rank's share is their sum over 2/4."""
    torch.manual_seed(1)
    model = AuditedModel(architecture_of(config_of(CONVNEXT))).double().train()
    batch = _batch(seed=3, n_task=1, n_external=1, withheld=0)
    task, mint = _TwoPasses(model).losses(batch)
    shared = dataclasses.replace(batch, task_per_worker=1 / 4, told_per_worker=2 / 4)
    loss, _ = forward(model, shared, Objective())
    torch.testing.assert_close(loss, (4 * task + 4 * mint).float())


def test_the_sums_are_those_of_the_rows() -> None:
    torch.manual_seed(1)
    model = AuditedModel(architecture_of(config_of(CONVNEXT))).double().train()
    batch = _batch(seed=3)
    task, mint = _TwoPasses(model).losses(batch)
    logits = model.backbone(batch.images)[: batch.n_task]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update = Update(model, torch.optim.SGD(model.parameters(), lr=0.1))
    sums = train_step(model, batch, Objective(), update)
    assert sums.dtype == torch.float64
    expected = {
        "task_loss": 7 * task.item(),
        "task_correct": int((logits.argmax(1) == batch.labels[:7]).sum()),
        "task_rows": 7,
        "mint_loss": 10 * mint.item(),
        "told_rows": 10,
        "code_matches": 0,
        "code_bits": 0,
    }
    assert dict(zip(SUMS, sums.tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)
    assert update.done == 1
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
