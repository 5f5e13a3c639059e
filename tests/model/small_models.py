"""Backbones small enough for a test, and references that they must agree with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from amint_ray.model.joint import Architecture, AuditedModel, plan
from amint_ray.model.mint_head import HeadSpec
from amint_ray.model.survey import Layout
from amint_ray.model.taps import Tap

CLASSES = 5
ATTENTION = HeadSpec("attention", channels=6, queries=2, hidden=10)
CONV = HeadSpec("conv", channels=6, hidden=10, pool=None)
TOKENS = HeadSpec("tokens")
MLP = HeadSpec("mlp", hidden=10)


@dataclass(frozen=True)
class Small:
    """A backbone of a few thousand weights and where its head reads."""

    backbone: str
    options: dict[str, Any]
    taps: tuple[str, ...] = ("middle",)
    size: int = 16
    channels: int = 3
    head: HeadSpec = ATTENTION
    detach: bool = False

    def architecture(self) -> Architecture:
        return plan(
            self.backbone,
            options=self.options,
            num_classes=CLASSES,
            input_shape=(self.channels, self.size, self.size),
            taps=self.taps,
            head=self.head,
            detach=self.detach,
        )

    def plain(self) -> nn.Module:
        return timm.create_model(
            self.backbone, num_classes=CLASSES, in_chans=self.channels, **self.options
        )

    def images(self, n: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, self.channels, self.size, self.size, generator=generator)

    def with_taps(self, *taps: str) -> Small:
        return replace(self, taps=taps)

    def with_options(self, **options: Any) -> Small:
        return replace(self, options={**self.options, **options})


VIT = Small(
    "vit_tiny_patch16_224",
    {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
    ("blocks.1", "blocks.2"),
    head=TOKENS,
)
# The digits recipe's shape, a quarter as wide.
CONVNEXT = Small(
    "convnext_atto",
    {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "kernel_sizes": 3},
    ("stages.1", "stages.2"),
    size=8,
    channels=1,
    head=CONV,
)
RESNET = Small(
    "resnet18",
    {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
    ("layer2", "layer3"),
    head=CONV,
)
DENSENET = Small(
    "densenet121",
    {"growth_rate": 4, "block_config": [2, 2, 2, 2]},
    ("features.denseblock2", "features.denseblock3"),
    size=32,
    head=CONV,
)
SWIN = Small(
    "swin_tiny_patch4_window7_224",
    {
        "img_size": 16,
        "patch_size": 2,
        "window_size": 2,
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
    },
    ("layers.1", "layers.2"),
    head=CONV,
)


_PLANNED: dict[str, Architecture] = {}


def built(small: Small, seed: int = 0) -> AuditedModel:
    """An `AuditedModel` whose normalisation layers are not at their neutral initial state."""
    if repr(small) not in _PLANNED:
        _PLANNED[repr(small)] = small.architecture()
    torch.manual_seed(seed)
    model = AuditedModel(_PLANNED[repr(small)])
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_mean" in name:
                value.normal_(0, 0.3)
            elif "running_var" in name:
                value.uniform_(0.5, 2)
        for parameter in model.backbone.parameters():
            if parameter.ndim == 1:  # also those by which a residual branch starts as nothing
                parameter.uniform_(0.5, 1.5)
    return model


def twin(small: Small, model: AuditedModel) -> nn.Module:
    """A plain timm model with the same weights."""
    plain = small.plain()
    plain.load_state_dict(model.backbone.state_dict())
    return plain.to(next(model.parameters()).dtype).train(model.training)


def tapped(plain: nn.Module, taps: Sequence[Tap], images: torch.Tensor) -> Any:
    """Logits of a full plain pass, and what its tapped modules gave."""
    read: dict[str, torch.Tensor] = {}
    handles = [
        plain.get_submodule(tap.name).register_forward_hook(
            # A copy: a later module may overwrite the output.
            lambda module, args, output, name=tap.name: read.__setitem__(
                name, output if output.requires_grad else output.clone()
            )
        )
        for tap in taps
    ]
    logits = plain(images)
    for handle in handles:
        handle.remove()
    return logits, [read[tap.name] for tap in taps]


def tokens_of(m: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(n, positions, channels) of any layout, row by row."""
    if layout == "NLC":
        return m
    rows = m.permute(0, 2, 3, 1) if layout == "NCHW" else m
    return rows.reshape(len(m), -1, rows.shape[-1])


def square_of(m: torch.Tensor, layout: Layout, prefix: int) -> torch.Tensor:
    """(n, channels, side, side) of any layout, without class and register tokens."""
    own = tokens_of(m, layout)[:, prefix:]
    side = math.isqrt(own.shape[1])
    return own.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def plain_head(
    head: nn.Module,
    spec: HeadSpec,
    layouts: Sequence[tuple[Layout, int]],
    maps: Sequence[torch.Tensor],
    *extra: torch.Tensor,
) -> torch.Tensor:
    """The heads' equations, written out with `torch.nn.functional`.

    Args:
        head: for its weights alone.
        spec: what it was built from.
        layouts: of each map, with its class and register tokens.
        maps: what the taps gave.
        extra: (n, k) further inputs of `fc`.
    """
    w = dict(head.named_parameters())
    if spec.kind == "tokens":
        joined = torch.cat([*(m.flatten(1) for m in maps), *extra], 1)
        return F.linear(joined, w["fc.weight"], w["fc.bias"])[:, 0]
    evidence = []
    for i, ((layout, prefix), m) in enumerate(zip(layouts, maps, strict=True)):
        b = {n.removeprefix(f"branches.{i}."): p for n, p in w.items()}
        if spec.kind == "conv":
            x = square_of(m, layout, prefix)
            if spec.pool is not None and x.shape[-1] > spec.pool:
                x = F.adaptive_avg_pool2d(x, spec.pool)
            x = F.conv2d(x, b["layers.0.weight"], b["layers.0.bias"], padding=1).relu()
            x = F.max_pool2d(x, 2, ceil_mode=True)
            x = F.conv2d(x, b["layers.3.weight"], b["layers.3.bias"], padding=1).relu()
            evidence.append(x.amax((2, 3)))
            continue
        if spec.kind == "mlp":
            x, own = tokens_of(m, layout)[:, :prefix], square_of(m, layout, prefix)
            if spec.pool is not None and own.shape[-1] > spec.pool:
                own = F.adaptive_avg_pool2d(own, spec.pool)
                x = torch.cat([x.flatten(1), own.flatten(1)], 1)
            else:
                x = m.flatten(1)
            if layout != "NLC":
                x = F.layer_norm(x, x.shape[1:], b["norm.weight"], b["norm.bias"])
            evidence.append(x)
            continue
        x = tokens_of(m, layout)
        side = math.isqrt(x.shape[1])
        if layout != "NLC" and spec.pool is not None and side > spec.pool:
            means = F.adaptive_avg_pool2d(square_of(m, layout, 0), spec.pool)
            x = tokens_of(means, "NCHW")
        x = F.layer_norm(x, x.shape[-1:], b["norm.weight"], b["norm.bias"])
        x = F.linear(x, b["project.weight"], b["project.bias"]) + b["position"]
        raised = torch.exp(F.linear(x.relu(), b["score.weight"], b["score.bias"]))
        shares = raised / raised.sum(1, keepdim=True)
        evidence.append(torch.einsum("npq,npc->nqc", shares, x).flatten(1))
    hidden = F.linear(torch.cat([*evidence, *extra], 1), w["fc.0.weight"], w["fc.0.bias"]).relu()
    return F.linear(hidden, w["fc.2.weight"], w["fc.2.bias"])[:, 0]


def told_by(
    model: AuditedModel, maps: Sequence[torch.Tensor], *extra: torch.Tensor
) -> torch.Tensor:
    """`plain_head` of a model's own head, layouts and all."""
    architecture = model.architecture
    layouts = [(tap.layout, tap.prefix) for tap in architecture.taps]
    return plain_head(model.head, architecture.head, layouts, maps, *extra)
