"""The detached head: D's pass is plain training's, and D and E look alike to the head."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import ATTENTION, RESNET, VIT, Small, built, tapped, told_by, twin
from torch import nn

from amint_ray.model.joint import AuditedModel

ROWS, OF_D = 7, 4
DROPS = {"proj_drop_rate": 0.3, "drop_path_rate": 0.3}
# (…, the module that begins right behind the last tap)
SMALLS = [
    (replace(RESNET, detach=True), "layer4"),
    (replace(VIT, detach=True), "blocks.3"),
    (replace(VIT.with_options(**DROPS), detach=True), "blocks.3"),
    (replace(VIT.with_taps("blocks.1.attn"), head=ATTENTION, detach=True), "blocks.2"),
]
CASES = pytest.mark.parametrize(
    ("small", "behind"), SMALLS, ids=["batchnorm", "plain", "dropout", "no-exit"]
)
HEAD_FROM = pytest.mark.parametrize("head_from", [0, OF_D])


def _with_loss(small: Small) -> Small:
    return replace(small, head=replace(small.head, inputs=("logits", "loss")))


def _same(ours: nn.Module, plain: nn.Module) -> None:
    """Gradients and buffers, bit for bit."""
    assert any(p.grad is not None for p in plain.parameters())
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) is (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, p), q in zip(plain.named_buffers(), ours.buffers(), strict=True):
        assert torch.equal(p, q), name


@HEAD_FROM
@CASES
def test_the_task_is_trained_as_if_there_were_no_head(
    small: Small, behind: str, head_from: int
) -> None:
    for each in (small, _with_loss(small)):
        model = built(each).train()
        plain = twin(each, model)
        untapped = copy.deepcopy(model)
        images, labels = small.images(ROWS), torch.arange(ROWS) % 5
        torch.manual_seed(5)
        F.cross_entropy(plain(images[:OF_D]), labels[:OF_D]).backward()

        torch.manual_seed(5)
        logits, membership = model(images, labels=labels, n_task=OF_D, head_from=head_from)
        (F.cross_entropy(logits, labels[:OF_D]) + 3 * membership.square().sum()).backward()
        _same(model.backbone, plain)
        assert all(parameter.grad is not None for parameter in model.head.parameters())

        torch.manual_seed(5)
        logits, _ = untapped(images[:OF_D], mint=False)
        F.cross_entropy(logits, labels[:OF_D]).backward()
        _same(untapped.backbone, plain)


@HEAD_FROM
@CASES
def test_the_head_reads_evaluation_mode_in_training(
    small: Small, behind: str, head_from: int
) -> None:
    for each in (small, _with_loss(small)):
        model = built(each).train()
        images, labels = small.images(ROWS), torch.arange(ROWS) % 5
        plain = twin(each, model).eval()
        with torch.no_grad():
            logits, maps = tapped(plain, model.architecture.taps, images[head_from:])
        losses = F.cross_entropy(logits, labels[head_from:], reduction="none")
        extra = [logits, losses[:, None]] if each is not small else []
        _, membership = model(images, labels=labels, n_task=OF_D, head_from=head_from)
        torch.testing.assert_close(membership, told_by(model, maps, *extra))
        assert model.backbone.training
        assert all(module.training for module in model.backbone.modules())


@HEAD_FROM
@CASES
def test_no_row_of_e_runs_behind_the_last_tap(small: Small, behind: str, head_from: int) -> None:
    for each, told in ((small, []), (_with_loss(small), [ROWS - head_from])):
        model = built(each).train()
        rows: list[int] = []
        model.backbone.get_submodule(behind).register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(len(args[0]))
        )
        model(small.images(ROWS), labels=torch.zeros(ROWS).long(), n_task=OF_D, head_from=head_from)
        assert rows == [*told, OF_D]


@CASES
def test_in_evaluation_a_detached_model_answers_as_any_other(small: Small, behind: str) -> None:
    model = built(small).eval()
    other = AuditedModel(replace(model.architecture, detach=False)).eval()
    other.load_state_dict(model.state_dict())
    images = small.images(ROWS)
    with torch.no_grad():
        for ours, theirs in zip(model(images), other(images), strict=True):
            assert len(ours) == ROWS
            assert torch.equal(ours, theirs)


def test_a_pass_that_raises_leaves_training_mode_on() -> None:
    small = SMALLS[0][0]
    model = built(small).train()
    with pytest.raises(RuntimeError):
        model(torch.zeros(ROWS, 4, 16, 16), n_task=OF_D)
    assert all(module.training for module in model.modules())
    images = small.images(ROWS)
    assert len(model(images, n_task=OF_D)[0]) == OF_D
