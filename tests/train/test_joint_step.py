"""The one concatenated pass against the authors' two passes, in float64."""

from __future__ import annotations

import copy
import dataclasses

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

LAMBDA_TASK, LAMBDA_MINT, DECAY = 0.7, 3.0, 0.6
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
        labels=torch.randint(CLASSES, (n_task,), generator=generator),
        membership=torch.cat([torch.ones(n_task), torch.zeros(n_external)]),
        told=told,
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

    def _pass(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.backbone(images)
        return logits, self.head([self._read[name] for name in self._taps])

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(batch.labels)
        logits, says_d = self._pass(batch.images[:n])
        _, says_e = self._pass(batch.images[n:])
        says_d = says_d[batch.told[:n]]
        said = torch.cat([says_d, says_e])
        truth = torch.cat([torch.ones_like(says_d), torch.zeros_like(says_e)])
        task = F.cross_entropy(logits, batch.labels)
        return task, F.binary_cross_entropy_with_logits(said, truth)

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        named = {
            **{f"backbone.{k}": v for k, v in self.backbone.named_parameters()},
            **{f"head.{k}": v for k, v in self.head.named_parameters()},
        }
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@BACKBONES
@pytest.mark.parametrize("weighting", ["initial", "ema", "none"])
def test_gradients_equal_those_of_two_passes(
    backbone: Backbone, behind: str, weighting: str
) -> None:
    torch.manual_seed(0)
    architecture = architecture_of(config_of(backbone))
    assert architecture.early_exit
    model = AuditedModel(architecture).double().train()
    reference = _TwoPasses(model)
    objective = Objective(
        Loss(
            lambda_task=LAMBDA_TASK,
            lambda_mint=LAMBDA_MINT,
            weighting=weighting,
            ema_decay=DECAY,
        )
    )
    first: list[float] = []
    for step in range(2):
        batch = _batch(seed=step)
        task, mint = reference.losses(batch)
        now = [task.item(), mint.item()]
        first = first or now
        norms = {
            "initial": first,
            "ema": [DECAY * a + (1 - DECAY) * b for a, b in zip(first, now, strict=True)],
            "none": [1.0, 1.0],
        }[weighting]
        expected_loss = LAMBDA_TASK * task / norms[0] + LAMBDA_MINT * mint / norms[1]
        expected = reference.gradients(expected_loss)

        model.zero_grad()
        loss, _ = forward(model, batch, objective)
        loss.backward()
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
        got = dict(model.named_parameters())
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert got[name].grad is not None, name
            torch.testing.assert_close(got[name].grad, gradient, rtol=1e-6, atol=1e-9, msg=name)
    # The second step must be able to tell the weightings apart.
    assert abs(now[0] / first[0] - 1) > 1e-3
    assert abs(now[1] / first[1] - 1) > 1e-4


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
    forward(model, batch, Objective(Loss()))
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
        forward(model, batch, Objective(Loss(lambda_mint=1e-30, weighting="none")))[0].backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    assert all(g.abs().max() > 1e-6 for g in gradients[0][-2:])


def test_withheld_rows_do_not_reach_the_head() -> None:
    model = AuditedModel(architecture_of(config_of(VIT))).double().train()
    batch = _batch(seed=0, n_external=0, withheld=7)
    loss, sums = forward(model, batch, Objective(Loss(weighting="none")))
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
    loss, _ = forward(model, shared, Objective(Loss(weighting="none")))
    torch.testing.assert_close(loss, 4 * task + 4 * mint)


def test_the_sums_are_those_of_the_rows() -> None:
    torch.manual_seed(1)
    model = AuditedModel(architecture_of(config_of(CONVNEXT))).double().train()
    batch = _batch(seed=3)
    task, mint = _TwoPasses(model).losses(batch)
    logits = model.backbone(batch.images)[: batch.n_task]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    sums = train_step(model, batch, Objective(Loss()), optimizer, scheduler)
    assert sums.dtype == torch.float64
    expected = {
        "task_loss": 7 * task.item(),
        "task_correct": int((logits.argmax(1) == batch.labels).sum()),
        "task_rows": 7,
        "mint_loss": 10 * mint.item(),
        "told_rows": 10,
    }
    assert dict(zip(SUMS, sums.tolist(), strict=True)) == pytest.approx(expected, rel=1e-9)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
