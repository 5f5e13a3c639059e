"""The heads' sizes against hand computation."""

from __future__ import annotations

import pytest
import torch
from small_models import CONVNEXT, SWIN, VIT, built
from torch import nn

from amint_ray.config.schema import Mint
from amint_ray.contracts import UserError
from amint_ray.model.mint_head import create_head
from amint_ray.model.taps import Tap


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_conv_heads_weights_by_hand() -> None:
    head = create_head(
        Mint(channels=64, hidden=128),
        [Tap("a", (32, 8, 8), "NCHW"), Tap("b", (4, 4, 96), "NHWC")],
    )
    branch_a = (32 * 9 * 64 + 64) + (64 * 9 * 64 + 64)
    branch_b = (96 * 9 * 64 + 64) + (64 * 9 * 64 + 64)
    assert _weights(head) == branch_a + branch_b + (128 * 128 + 128) + (128 + 1)
    assert head([torch.randn(3, 32, 8, 8), torch.randn(3, 4, 4, 96)]).shape == (3,)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_conv_head_takes_small_maps_by_hand(size: int) -> None:
    """All weights one, no bias, constant positive input: every step is a count of neighbours."""
    head = create_head(Mint(channels=1, hidden=1), [Tap("a", (1, size, size), "NCHW")])
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        logit = head([torch.ones(1, 1, size, size)])
    first = min(size, 3) ** 2  # the best placed pixel's neighbours inside the map
    pooled = -(-size // 2)  # ceil: a map of 1×1 stays one
    # 3×3 pooled maps (size 5 and up) have a centre with nine neighbours.
    cells = min(pooled, 3) ** 2
    counts = {1: [1], 2: [4], 3: [9, 6, 6, 4], 7: [9] * 9}[size]
    assert max(counts) == first
    assert len(counts) == cells
    assert logit.item() == sum(counts)


def test_the_tokens_head_is_one_linear_layer_over_all_tokens() -> None:
    model = built(VIT)
    tokens = (16 // 4) ** 2 + 1
    assert _weights(model.head) == 2 * tokens * 32 + 1
    assert [tap.shape for tap in model.architecture.taps] == [(tokens, 32)] * 2


def test_swins_channels_last_maps_reach_the_convolution_channels_first() -> None:
    model = built(SWIN)
    assert [tap.shape for tap in model.architecture.taps] == [(4, 4, 32), (2, 2, 64)]
    assert [tap.layout for tap in model.architecture.taps] == ["NHWC", "NHWC"]
    firsts = [branch[0] for branch in model.head.branches]
    assert [conv.in_channels for conv in firsts] == [32, 64]
    seen: list[tuple[int, ...]] = []
    for conv in firsts:
        conv.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    model(SWIN.images(3))
    assert seen == [(3, 32, 4, 4), (3, 64, 2, 2)]


def test_one_by_one_maps_of_a_real_backbone() -> None:
    small = CONVNEXT.with_taps("stages.2", "stages.3")
    model = built(small)
    assert model.architecture.taps[-1].shape == (32, 1, 1)
    assert model(small.images(2))[1].shape == (2,)


def test_the_conv_head_is_refused_on_tokens() -> None:
    with pytest.raises(UserError, match=r"'blocks\.2' gives tokens of shape \(17, 32\)"):
        create_head(Mint(), [Tap("blocks.2", (17, 32), "NLC")])
