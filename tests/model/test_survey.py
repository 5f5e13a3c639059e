"""What the survey says of a module's output, and that each head reads it so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import (
    ATTENTION,
    CLASSES,
    CONVNEXT,
    DENSENET,
    MLP,
    RESNET,
    SWIN,
    TOKENS,
    VIT,
    Small,
    built,
    plain_head,
    tapped,
    twin,
)
from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.mint_head import HeadSpec, MintHead
from amint_ray.model.survey import Layout, Site, modes_agree, survey

# convnext_atto has convolutions for linear layers; this one turns channels last within its blocks.
CHANNELS_LAST_WITHIN = replace(CONVNEXT, backbone="convnext_tiny")
DEIT = replace(VIT, backbone="deit_tiny_distilled_patch16_224")
REGISTERS = replace(VIT, backbone="vit_small_patch14_reg4_dinov2")
NO_CLASS_TOKEN = VIT.with_options(class_token=False, global_pool="avg")
MAMBAOUT = Small("mambaout_femto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, size=32)
SAM = Small("samvit_base_patch16_224", {**VIT.options, "img_size": 32}, size=32)

KINDS: list[tuple[Small, str, Layout, int, tuple[int, ...]]] = [
    (RESNET, "layer2", "NCHW", 0, (16, 2, 2)),
    (DENSENET, "features.denseblock1", "NCHW", 0, (16, 8, 8)),
    (SWIN, "layers.1", "NHWC", 0, (4, 4, 32)),
    (SAM, "blocks.1", "NHWC", 0, (8, 8, 32)),
    (NO_CLASS_TOKEN, "blocks.1", "NLC", 0, (16, 32)),
    (VIT, "blocks.1", "NLC", 1, (17, 32)),
    (VIT, "patch_embed", "NLC", 0, (16, 32)),
    (DEIT, "blocks.1", "NLC", 2, (18, 32)),
    (REGISTERS, "blocks.1", "NLC", 5, (21, 32)),
    # Channels last in a network that is channels first otherwise, and back again behind it.
    (CHANNELS_LAST_WITHIN, "stages.1.blocks.0.norm", "NHWC", 0, (4, 4, 16)),
    (CHANNELS_LAST_WITHIN, "stages.1.blocks.0", "NCHW", 0, (16, 4, 4)),
    (CONVNEXT, "stages.1.blocks.0.norm", "NCHW", 0, (16, 4, 4)),
    # As many channels as pixels a side.
    (CONVNEXT, "stages.0", "NCHW", 0, (8, 8, 8)),
    (CHANNELS_LAST_WITHIN, "stages.0.blocks.0.conv_dw", "NCHW", 0, (8, 8, 8)),
    (CHANNELS_LAST_WITHIN, "stages.0.blocks.0.norm", "NHWC", 0, (8, 8, 8)),
    (CHANNELS_LAST_WITHIN, "stages.0.blocks.0.mlp.fc2", "NHWC", 0, (8, 8, 8)),
    (CONVNEXT, "stages.0.blocks.0.norm", "NCHW", 0, (8, 8, 8)),
    (MAMBAOUT, "stages.0", "NHWC", 0, (8, 8, 8)),
]
_WIDE = HeadSpec("conv", channels=16, hidden=32, pool=None)
HEADS = [
    MLP,
    replace(MLP, pool=2),
    ATTENTION,
    replace(ATTENTION, pool=2),
    _WIDE,
    replace(_WIDE, pool=2),
    TOKENS,
]


def _sites(small: Small) -> dict[str, Site]:
    with torch.device("meta"):
        sites = survey(small.plain(), (small.channels, small.size, small.size))
    return {site.name: site for site in sites}


@pytest.mark.parametrize(("small", "tap", "layout", "prefix", "shape"), KINDS)
def test_each_head_reads_each_layout(
    small: Small, tap: str, layout: Layout, prefix: int, shape: tuple[int, ...]
) -> None:
    model = built(small.with_taps(tap)).eval()
    (found,) = model.architecture.taps
    assert (found.layout, found.prefix, found.shape) == (layout, prefix, shape)
    images = small.images(4)
    with torch.no_grad():
        _, maps = tapped(twin(small, model), [found], images)
        for spec in HEADS:
            head = MintHead(spec, [found], CLASSES)
            told = plain_head(head, spec, [(layout, prefix)], maps)
            torch.testing.assert_close(head(maps), told, rtol=1e-4, atol=1e-5)
            assert told.std() > 0
        torch.testing.assert_close(
            model(images)[1],
            plain_head(model.head, small.head, [(layout, prefix)], maps),
            rtol=1e-4,
            atol=1e-5,
        )


class _Layouts(nn.Module):
    """One map of as many channels as pixels a side, handed on in both layouts, and as tokens."""

    num_prefix_tokens = 5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.LayerNorm(4)
        self.tokens, self.odd = nn.Flatten(1, 2), nn.ZeroPad2d((0, 0, 0, 1))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.tokens(self.last(self.first(images).permute(0, 2, 3, 1)))
        x = torch.cat([x.new_zeros(len(x), 5, 4), x], 1)
        return self.head(self.odd(nn.Identity()(x)).mean(1))


def test_a_layer_that_works_on_the_last_dimension_says_so() -> None:
    sites = {site.name: site for site in survey(_Layouts(), (3, 4, 4))}
    assert (sites["first"].shape, sites["first"].layout) == ((4, 4, 4), "NCHW")
    assert (sites["last"].shape, sites["last"].layout) == ((4, 4, 4), "NHWC")
    assert (sites["tokens"].shape, sites["tokens"].layout) == ((16, 4), "NLC")
    assert sites["tokens"].prefix == 0  # 16 − 5 tokens would be no square
    assert (sites["odd"].shape, sites["odd"].prefix) == ((22, 4), 0)


def test_depth_is_the_share_of_the_work_by_hand() -> None:
    sites = _sites(VIT)
    tokens, width = 17, 32
    patches = 16 * (3 * 4 * 4) * width
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    block = attention + 2 * tokens * width * 4 * width
    total = patches + 4 * block + width * CLASSES
    assert sites["patch_embed"].depth == pytest.approx(patches / total)
    assert sites["blocks.0.attn"].depth == pytest.approx((patches + attention) / total)
    for i in range(4):
        assert sites[f"blocks.{i}"].depth == pytest.approx((patches + (i + 1) * block) / total)
    assert sites["head"].depth == 1


DROPS = [{"proj_drop_rate": 0.1}, {"drop_path_rate": 0.1}, {"drop_rate": 0.1}]


@pytest.mark.parametrize(
    ("small", "agree"),
    [(VIT, True), (CONVNEXT, True), (RESNET, False), (DENSENET, False)]
    + [(VIT.with_options(**drop), False) for drop in DROPS]
    + [(VIT.with_options(pos_drop_rate=0.0), True)],
)
def test_modes_agree_where_training_computes_what_evaluation_does(
    small: Small, agree: bool
) -> None:
    model, images = built(small).eval(), small.images(5)
    assert model.architecture.modes_agree is agree
    torch.manual_seed(1)
    with torch.no_grad():
        same = torch.equal(model(images)[0], model.train()(images)[0])
    assert same is agree


class _Scaled(nn.Module):
    """The same operations in both modes, with another number in training."""

    def __init__(self, in_training: float) -> None:
        super().__init__()
        self.conv, self.in_training = nn.Conv2d(3, CLASSES, 4), in_training

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).flatten(1) * (self.in_training if self.training else 1.0)


@pytest.mark.parametrize(("in_training", "agree"), [(1.0, True), (2.0, False)])
def test_modes_that_differ_in_a_number_alone_do_not_agree(in_training: float, agree: bool) -> None:
    assert modes_agree(_Scaled(in_training), (3, 4, 4)) is agree


def test_surveying_leaves_a_real_backbone_as_it_was() -> None:
    backbone = RESNET.plain().train()
    reference = RESNET.plain()
    reference.load_state_dict(backbone.state_dict())
    random = torch.get_rng_state()
    survey(backbone, (3, 16, 16))
    modes_agree(backbone, (3, 16, 16))
    assert backbone.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize("small", [VIT, CONVNEXT], ids=lambda s: s.backbone)
def test_a_backbone_without_class_logits_is_told(small: Small) -> None:
    small = small.with_options(global_pool="")
    with pytest.raises(UserError, match="the backbone gives no class logits"):
        small.architecture()


def test_an_image_size_that_a_vit_cannot_take_is_told() -> None:
    with pytest.raises(UserError) as raised:
        replace(VIT, size=20).architecture()
    line = str(raised.value)
    assert line.startswith("data.image_size = 20: the backbone cannot take such images")
    assert "16" in line.split(": ", 2)[2]  # timm's own words name the size that it takes
    assert "\n" not in line
