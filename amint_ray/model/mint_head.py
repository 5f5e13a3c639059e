"""MINT heads: from the tapped activations to one membership logit an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from amint_ray.config.schema import Mint
from amint_ray.contracts import UserError
from amint_ray.model.taps import Tap


def create_head(config: Mint, taps: Sequence[Tap]) -> nn.Module:
    """The head that the configuration names, sized for these taps.

    Raises:
        UserError: the head does not fit what a tap gives.
    """
    if config.head == "tokens":
        return TokensHead(taps)
    for tap in taps:
        if tap.layout == "NLC":
            raise UserError(
                f"mint.head = 'conv' reads feature maps, but {tap.name!r} gives tokens of shape "
                f"{tap.shape}; use mint.head=tokens"
            )
    return ConvHead(taps, channels=config.channels, hidden=config.hidden)


class ConvHead(nn.Module):
    """The paper's head for CNNs (DeAlcala et al., ICCV 2025).

    A branch a tap (3×3 convolution, pooling, 3×3 convolution, global max-pooling), the branches
    joined, a hidden layer, one logit.
    """

    def __init__(self, taps: Sequence[Tap], *, channels: int, hidden: int) -> None:
        super().__init__()
        self._channels_last = [tap.layout == "NHWC" for tap in taps]
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(tap.shape[-1 if tap.layout == "NHWC" else 0], channels, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),  # ceil: a map of 1×1 stays one
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.AdaptiveMaxPool2d(1),
                nn.Flatten(),
            )
            for tap in taps
        )
        self.fc = nn.Sequential(
            nn.Linear(channels * len(taps), hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """(n, …) activations of each tap → (n,) logits."""
        maps = [
            a.permute(0, 3, 1, 2) if last else a
            for a, last in zip(activations, self._channels_last, strict=True)
        ]
        joined = torch.cat(
            [branch(m) for branch, m in zip(self.branches, maps, strict=True)], dim=1
        )
        logits: torch.Tensor = self.fc(joined).squeeze(1)
        return logits


class TokensHead(nn.Module):
    """The paper's head for ViTs: all tokens flattened, one linear layer, one logit."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.fc = nn.Linear(sum(math.prod(tap.shape) for tap in taps), 1)

    def forward(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """(n, …) activations of each tap → (n,) logits."""
        joined = torch.cat([a.flatten(1) for a in activations], dim=1)
        logits: torch.Tensor = self.fc(joined).squeeze(1)
        return logits
