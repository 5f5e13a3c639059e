"""MINT heads: from the tapped activations to a membership logit an image, or to its code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.taps import Tap

HeadKind = Literal["mlp", "attention", "conv", "tokens"]
HeadInput = Literal["logits", "loss"]
CodeHead = Literal["learned", "fixed"]


@dataclass(frozen=True)
class HeadSpec:
    """What a MINT head is built from; `config.mint_schema` explains each field.

    Attributes:
        membership: whether it gives the membership logit.
        bits: logits of an image's code that come after it; 0: none.
        code: what gives these.
    """

    kind: HeadKind = "mlp"
    channels: int = 64
    queries: int = 8
    hidden: int = 128
    pool: int | None = 4
    inputs: tuple[HeadInput, ...] = ()
    membership: bool = True
    bits: int = 0
    code: CodeHead = "learned"

    @property
    def fixed(self) -> bool:
        """Whether a code is read off the classifier's own features."""
        return self.bits > 0 and self.code == "fixed"

    @property
    def learned(self) -> int:
        """Logits that learned layers give."""
        return int(self.membership) + (0 if self.fixed else self.bits)


class MintHead(nn.Module):
    """A body that reads the taps, extra inputs where asked for, and its logits.

    Args:
        spec: kind and sizes.
        taps: what the body reads.
        num_classes: task logits, where they are an extra input.
        features: width of what the classifier's last layer reads, where a fixed code is read off
            it.

    Raises:
        UserError: the head does not fit what a tap gives.
    """

    def __init__(
        self, spec: HeadSpec, taps: Sequence[Tap], num_classes: int, features: int = 0
    ) -> None:
        super().__init__()
        self._inputs, self._spec = spec.inputs, spec
        self.code = FixedCode(features, spec.bits) if spec.fixed else None
        if spec.learned == 0:
            return
        extra = num_classes * ("logits" in spec.inputs) + ("loss" in spec.inputs)
        if spec.kind == "tokens":
            self.branches = nn.ModuleList(nn.Flatten() for _ in taps)
            width = sum(math.prod(tap.shape) for tap in taps) + extra
            self.fc: nn.Module = nn.Linear(width, spec.learned)
            return
        if spec.kind == "mlp":
            branches = [PositionsBranch(tap, spec.pool) for tap in taps]
            self.branches = nn.ModuleList(branches)
            width = sum(branch.width for branch in branches) + extra
        elif spec.kind == "conv":
            self.branches = nn.ModuleList(ConvBranch(tap, spec.channels, spec.pool) for tap in taps)
            width = spec.channels * len(taps) + extra
        else:
            self.branches = nn.ModuleList(
                AttentionBranch(tap, spec.channels, spec.queries, spec.pool) for tap in taps
            )
            width = spec.channels * spec.queries * len(taps) + extra
        self.fc = nn.Sequential(
            nn.Linear(width, spec.hidden), nn.ReLU(), nn.Linear(spec.hidden, spec.learned)
        )

    def forward(
        self,
        activations: Sequence[torch.Tensor],
        logits: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Membership logits, the code's, or both.

        Args:
            activations: of each tap, (n, …).
            logits: (n, num_classes) of the task, where `logits` or `loss` is an extra input. No
                gradient goes back through them: E must not train the task's own layers.
            labels: (n,) class indices, where `loss` is one.
            features: (n, …) what the classifier's last layer reads, where the code is fixed.

        Returns:
            (n,) float logits where membership alone is asked for; larger means "more likely a
            member". Where a code is, too: (n, membership + bits), the code's last; a positive one
            means "this bit is 1".
        """
        if self.code is None:
            return self._learned(activations, logits, labels)
        assert features is not None
        code: torch.Tensor = self.code(features)
        if not self._spec.membership:
            return code
        membership = self._learned(activations, logits, labels)
        return torch.cat([membership[:, None], code.to(membership)], dim=1)

    def _learned(
        self,
        activations: Sequence[torch.Tensor],
        logits: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """(n,) or (n, bits)."""
        evidence = [branch(a) for branch, a in zip(self.branches, activations, strict=True)]
        if self._inputs:
            assert logits is not None
            told = logits.detach().float()
            if "logits" in self._inputs:
                evidence.append(told)
            if "loss" in self._inputs:
                assert labels is not None
                evidence.append(F.cross_entropy(told, labels, reduction="none")[:, None])
        found: torch.Tensor = self.fc(torch.cat(evidence, dim=1))
        return found if self._spec.bits and not self._spec.fixed else found.squeeze(1)


_SHARPNESS = 4.0
"""Logits of unit-length features' random projections have this standard deviation
(docs/benchmarks.md)."""


class FixedCode(nn.Module):
    """A code read off the classifier's features by random directions that nobody learns.

    Features are brought to mean 0 and unit length first: only the code, and no scale that it could
    be bought with, moves the backbone. The directions are the same for all models of one width.
    """

    directions: torch.Tensor

    def __init__(self, features: int, bits: int) -> None:
        super().__init__()
        drawn = np.random.default_rng(bits).standard_normal((bits, features))
        self.register_buffer("directions", torch.from_numpy(drawn.astype(np.float32)).to(_here()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, …) features → (n, bits)."""
        flat = features.flatten(1).to(self.directions.dtype)
        flat = F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
        return _SHARPNESS * flat @ self.directions.T


def _here() -> torch.device:
    """The device that is being built on, `meta` where sizes alone are asked for."""
    return torch.empty(0).device


_GAIN = 4.0
"""Initial gain of a normalised map; at 1 the head learned more slowly (docs/benchmarks.md)."""


class PositionsBranch(nn.Module):
    """All that a tap gives, on a coarse grid; the hidden layer weighs each position and channel.

    A weight that is used once costs one multiplication an image, where a convolution's costs one at
    each position: for the same arithmetic the head can tell more images apart. Larger maps, and the
    square of a sequence's own tokens, are averaged to `pool`×`pool` first; class and register
    tokens stay as they are. What a map gives is normalised over the whole image, since its scale
    can be anything; tokens come off a residual stream and are taken as they are (normalised, they
    taught the head less).
    """

    def __init__(self, tap: Tap, pool: int | None) -> None:
        super().__init__()
        self._tap = tap
        own = tap.shape[0] - tap.prefix if tap.layout == "NLC" else 0
        square = tap.layout != "NLC" or math.isqrt(own) ** 2 == own
        self._pool = _pool_to(tap, pool) if square else None
        positions = (
            tap.prefix + self._pool**2 if self._pool else math.prod(tap.shape) // tap.channels
        )
        self.width = positions * tap.channels
        self.norm = nn.Identity() if tap.layout == "NLC" else nn.LayerNorm(self.width)
        if isinstance(self.norm, nn.LayerNorm):
            nn.init.constant_(self.norm.weight, _GAIN)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(n, …) activation → (n, width)."""
        parts = [activation]
        if self._pool is not None:
            parts = [_pooled(_maps(activation, self._tap), self._pool)]
            if self._tap.prefix:
                parts.insert(0, activation[:, : self._tap.prefix])
        flat = [part.flatten(1) for part in parts]
        evidence: torch.Tensor = self.norm(flat[0] if len(flat) == 1 else torch.cat(flat, dim=1))
        return evidence


class ConvBranch(nn.Module):
    """The paper's branch for CNNs (DeAlcala et al., ICCV 2025).

    3×3 convolution, pooling, 3×3 convolution, global max-pooling. Larger maps are averaged to
    `pool`×`pool` first: on large maps the paper's own form costs more than many a backbone. Of
    tokens it reads the image's own, laid out as the square that they are.
    """

    def __init__(self, tap: Tap, channels: int, pool: int | None) -> None:
        super().__init__()
        if tap.layout == "NLC" and math.isqrt(tap.shape[0] - tap.prefix) ** 2 != (
            tap.shape[0] - tap.prefix
        ):
            raise UserError(
                f"mint.head = 'conv' reads maps, and the {tap.shape[0]} tokens of {tap.name!r} are "
                "no square; use mint.head=attention or tokens"
            )
        self._tap = tap
        self._pool = _pool_to(tap, pool)
        self.layers = nn.Sequential(
            nn.Conv2d(tap.channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),  # ceil: a map of 1×1 stays one
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(n, …) activation → (n, channels)."""
        evidence: torch.Tensor = self.layers(_pooled(_maps(activation, self._tap), self._pool))
        return evidence


class AttentionBranch(nn.Module):
    """Attention pooling with learned queries over positions or tokens.

    Each position is normalised and projected to `channels` features; each query takes a weighted
    mean of them, with weights of its own (the Set Transformer's pooling by multi-head attention,
    Lee et al. 2019, arXiv 1810.00825, without its feed-forward layers). A learned offset tells the
    positions apart, class and register tokens among them. Larger maps are averaged to `pool`×`pool`
    first.
    """

    def __init__(self, tap: Tap, channels: int, queries: int, pool: int | None) -> None:
        super().__init__()
        self._tap = tap
        self._pool = _pool_to(tap, pool) if tap.layout != "NLC" else None
        positions = self._pool**2 if self._pool else math.prod(tap.shape) // tap.channels
        self.norm = nn.LayerNorm(tap.channels)
        self.project = nn.Linear(tap.channels, channels)
        self.position = nn.Parameter(torch.randn(positions, channels) * 0.02)
        self.score = nn.Linear(channels, queries)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """(n, …) activation → (n, queries · channels)."""
        tokens = activation
        if self._tap.layout != "NLC":
            tokens = _pooled(_maps(activation, self._tap), self._pool).flatten(2).transpose(1, 2)
        features = self.project(self.norm(tokens)) + self.position
        weights = self.score(F.relu(features)).softmax(dim=1)
        evidence: torch.Tensor = weights.transpose(1, 2) @ features
        return evidence.flatten(1)


def _maps(activation: torch.Tensor, tap: Tap) -> torch.Tensor:
    """Any tap's activation as maps, (n, channels, height, width); class and register tokens go."""
    if tap.layout == "NCHW":
        return activation
    if tap.layout == "NHWC":
        return activation.permute(0, 3, 1, 2)
    own = activation[:, tap.prefix :]
    side = math.isqrt(own.shape[1])
    # Not `len(own)`, which would tie an exported program to the rows it was exported with.
    return own.transpose(1, 2).reshape(own.shape[0], -1, side, side)


def _pool_to(tap: Tap, pool: int | None) -> int | None:
    """Positions a side that a tap's maps are averaged to; None: as many as they have."""
    if tap.layout == "NLC":
        side = math.isqrt(tap.shape[0] - tap.prefix)
    else:
        side = tap.shape[1] if tap.layout == "NCHW" else tap.shape[0]
    return pool if pool is not None and pool < side else None


def _pooled(maps: torch.Tensor, side: int | None) -> torch.Tensor:
    return maps if side is None else F.adaptive_avg_pool2d(maps, side)
