"""Backbones small enough for a test, and the plain timm models they must agree with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from amint_ray.config.schema import Config, Data, Mint, Model
from amint_ray.model.joint import Architecture, AuditedModel, plan_architecture
from amint_ray.model.mint_head import ConvHead
from amint_ray.model.taps import Tap

CLASSES = 5


@dataclass(frozen=True)
class Small:
    """A backbone of a few thousand weights and where its head reads."""

    backbone: str
    options: dict[str, Any]
    taps: tuple[str, ...]
    size: int = 16
    channels: int = 3
    head: str = "conv"
    mint: dict[str, Any] = field(default_factory=lambda: {"channels": 6, "hidden": 10})

    def config(self) -> Config:
        return Config(
            data=Data(image_size=self.size, channels=self.channels),
            model=Model(backbone=self.backbone, options=self.options),
            mint=Mint.model_validate({"taps": self.taps, "head": self.head, **self.mint}),
        )

    def architecture(self) -> Architecture:
        return plan_architecture(self.config(), CLASSES)

    def plain(self) -> nn.Module:
        return timm.create_model(
            self.backbone, num_classes=CLASSES, in_chans=self.channels, **self.options
        )

    def images(self, n: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, self.channels, self.size, self.size, generator=generator)

    def with_taps(self, *taps: str) -> Small:
        return Small(
            self.backbone, self.options, taps, self.size, self.channels, self.head, self.mint
        )


VIT = Small(
    "vit_tiny_patch16_224",
    {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
    ("blocks.1", "blocks.2"),
    head="tokens",
)
# The digits recipe's shape, a quarter as wide.
CONVNEXT = Small(
    "convnext_atto",
    {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "kernel_sizes": 3},
    ("stages.1", "stages.2"),
    size=8,
    channels=1,
)
RESNET = Small(
    "resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}, ("layer2", "layer3")
)
DENSENET = Small(
    "densenet121",
    {"growth_rate": 4, "block_config": [2, 2, 2, 2]},
    ("features.denseblock2", "features.denseblock3"),
    size=32,
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
)


def built(small: Small, seed: int = 0) -> AuditedModel:
    """An `AuditedModel` whose normalisation layers are not at their neutral initial state."""
    torch.manual_seed(seed)
    model = AuditedModel(small.architecture())
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_mean" in name:
                value.normal_(0, 0.3)
            elif "running_var" in name:
                value.uniform_(0.5, 2)
    return model


def twin(small: Small, model: AuditedModel) -> nn.Module:
    """A plain timm model with the same weights."""
    plain = small.plain()
    plain.load_state_dict(model.backbone.state_dict())
    return plain.to(next(model.parameters()).dtype).train(model.training)


def tapped(plain: nn.Module, taps: tuple[Tap, ...], images: torch.Tensor) -> Any:
    """Logits of a full plain pass, and copies of what its tapped modules gave."""
    read: dict[str, torch.Tensor] = {}
    handles = [
        plain.get_submodule(tap.name).register_forward_hook(
            lambda module, args, output, name=tap.name: read.__setitem__(name, output.clone())
        )
        for tap in taps
    ]
    logits = plain(images)
    for handle in handles:
        handle.remove()
    return logits, [read[tap.name] for tap in taps]


def plain_head(head: nn.Module, taps: tuple[Tap, ...], maps: list[torch.Tensor]) -> torch.Tensor:
    """The paper's heads, written out with `torch.nn.functional`."""
    w = dict(head.named_parameters())
    if not isinstance(head, ConvHead):
        return F.linear(torch.cat([m.flatten(1) for m in maps], 1), w["fc.weight"], w["fc.bias"])[
            :, 0
        ]
    joined = []
    for i, (tap, m) in enumerate(zip(taps, maps, strict=True)):
        x = m.movedim(-1, 1) if tap.layout == "NHWC" else m
        x = F.conv2d(x, w[f"branches.{i}.0.weight"], w[f"branches.{i}.0.bias"], padding=1).relu()
        x = F.max_pool2d(x, 2, ceil_mode=True)
        x = F.conv2d(x, w[f"branches.{i}.3.weight"], w[f"branches.{i}.3.bias"], padding=1).relu()
        joined.append(x.amax((2, 3)))
    hidden = F.linear(torch.cat(joined, 1), w["fc.0.weight"], w["fc.0.bias"]).relu()
    return F.linear(hidden, w["fc.2.weight"], w["fc.2.bias"])[:, 0]
