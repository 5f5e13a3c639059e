"""The repeated blocks, computing them twice, and passes that leave BatchNorm alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import ATTENTION, CONVNEXT, DENSENET, RESNET, SWIN, VIT, Small, built
from torch import nn

from amint_ray.model.blocks import blocks, checkpoint_blocks, frozen_statistics
from amint_ray.model.joint import AuditedModel

DEEP_RESNET = RESNET.with_options(layers=[2, 1, 2, 2])
DEEP_CONVNEXT = CONVNEXT.with_options(depths=[2, 1, 2, 1])


@pytest.mark.parametrize(
    ("small", "expected"),
    [
        (VIT, [f"blocks.{i}" for i in range(4)]),
        (replace(VIT, backbone="beit_base_patch16_224"), [f"blocks.{i}" for i in range(4)]),
        # A stage of one block repeats nothing.
        (DEEP_RESNET, [f"layer{i}.{j}" for i in (1, 3, 4) for j in (0, 1)]),
        # … and is the block itself, where the stages stand in a row.
        (
            DEEP_CONVNEXT,
            ["stages.1", "stages.3", *(f"stages.{i}.blocks.{j}" for i in (0, 2) for j in (0, 1))],
        ),
        (
            SWIN.with_options(depths=[2, 2, 2, 2]),
            [f"layers.{i}.blocks.{j}" for i in range(4) for j in (0, 1)],
        ),
    ],
    ids=lambda v: v.backbone if isinstance(v, Small) else "",
)
def test_blocks_are_what_is_repeated(small: Small, expected: list[str]) -> None:
    with torch.device("meta"):
        assert sorted(blocks(small.plain())) == sorted(expected)


def test_of_a_densenet_the_dense_layers_are_blocks() -> None:
    with torch.device("meta"):
        found = blocks(DENSENET.plain())
    expected = [f"features.denseblock{i}.denselayer{j}" for i in (1, 2, 3, 4) for j in (1, 2)]
    assert [name for name in found if "dense" in name] == expected


CHECKPOINTED = [
    VIT,
    VIT.with_options(proj_drop_rate=0.3, drop_path_rate=0.3),
    DEEP_RESNET.with_taps("layer1.0", "layer3.0"),
    DEEP_RESNET,
    DEEP_CONVNEXT.with_taps("stages.0.blocks.1", "stages.2.blocks.0"),
    DENSENET,
    # No early exit: the dense layers behind it read what came before it, too.
    DENSENET.with_taps("features.denseblock1", "features.denseblock2.denselayer1"),
    replace(RESNET.with_options(layers=[2, 2, 2, 2]), detach=True),
]


def _step(model: AuditedModel, small: Small) -> torch.Tensor:
    torch.manual_seed(3)
    logits, membership = model(small.images(6), n_task=4)
    assert len(logits) == 4
    loss = F.cross_entropy(logits, torch.arange(4)) + 3 * membership.square().mean()
    loss.backward()
    return loss.detach()


def _runs(model: AuditedModel) -> Counter[str]:
    """Counts how often the first layer within each block runs."""
    runs: Counter[str] = Counter()
    for name in blocks(model.backbone):
        first = next(m for m in model.backbone.get_submodule(name).modules() if not [*m.children()])
        first.register_forward_pre_hook(lambda module, args, name=name: runs.update([name]))
    return runs


@pytest.mark.parametrize("small", CHECKPOINTED, ids=lambda s: f"{s.backbone}-{s.taps[-1]}")
def test_computing_blocks_twice_changes_nothing(small: Small) -> None:
    small = replace(small, head=ATTENTION)
    plain, thrifty = built(small).train(), built(small).train()
    checkpoint_blocks(thrifty.backbone)
    once, twice = _runs(plain), _runs(thrifty)
    for _ in range(2):  # the second step sees the first one's statistics
        assert torch.equal(_step(plain, small), _step(thrifty, small))
    # Twice in training; the pass without gradients of a detached head needs no second one.
    assert once
    assert all(twice[name] > once[name] for name in once)
    for (name, p), q in zip(plain.named_parameters(), thrifty.named_parameters(), strict=True):
        assert name == q[0]
        assert (p.grad is None) is (q[1].grad is None), name
        assert p.grad is None or torch.equal(p.grad, q[1].grad), name
    assert plain.state_dict().keys() == thrifty.state_dict().keys()
    for (name, p), q in zip(plain.named_buffers(), thrifty.buffers(), strict=True):
        assert torch.equal(p, q), name
    # In evaluation nothing is run again.
    before = twice.copy()
    thrifty.eval()(small.images(2))[0].sum().backward()
    assert (twice - before).total() == len(twice)
    with torch.no_grad():
        for a, b in zip(plain.eval()(small.images(2)), thrifty(small.images(2)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("small", [RESNET, DENSENET], ids=lambda s: s.backbone)
def test_frozen_statistics_stay_bit_for_bit(small: Small) -> None:
    model, free = built(small).train(), built(small).train()
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    with frozen_statistics(model):
        logits, membership = model(small.images(4))
    expected = free(small.images(4))
    assert torch.equal(logits, expected[0])
    assert torch.equal(membership, expected[1])
    assert not torch.equal(next(free.buffers()), next(iter(before.values())))
    for name, value in model.named_buffers():
        assert value is buffers[name], name
        assert torch.equal(value, before[name]), name
    with pytest.raises(ZeroDivisionError), frozen_statistics(model):
        model(small.images(4))
        raise ZeroDivisionError
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_frozen_statistics_leave_a_norm_without_any_alone() -> None:
    norm = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    with frozen_statistics(norm):
        norm(torch.randn(4, 3))
    assert norm[0].running_mean is None
    assert int(norm[1].num_batches_tracked) == 0
