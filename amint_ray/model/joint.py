"""The audited model: backbone, taps and MINT head, trained and called as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from amint_ray.config.schema import Config, Mint
from amint_ray.contracts import UserError
from amint_ray.model.backbone import create_backbone
from amint_ray.model.mint_head import create_head
from amint_ray.model.taps import Tap, TapReader, probe_taps


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build an `AuditedModel`, as plain values that JSON holds.

    Attributes:
        backbone: timm's name.
        options: further arguments of `timm.create_model`.
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width).
        taps: in order of execution.
        early_exit: whether E's rows can leave after the last tap.
        mint: the head's configuration.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    backbone: str
    options: dict[str, Any]
    num_classes: int
    input_shape: tuple[int, int, int]
    taps: tuple[Tap, ...]
    early_exit: bool
    mint: Mint

    def to_json(self) -> str:
        """As JSON text."""
        return TypeAdapter(Architecture).dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """From what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        try:
            return TypeAdapter(Architecture).validate_json(text)
        except ValidationError as error:
            faults = "; ".join(f"{list(e['loc'])} {e['msg']}" for e in error.errors())
            raise ValueError(f"not an architecture of amint_ray: {faults}") from error


def plan_architecture(config: Config, num_classes: int) -> Architecture:
    """Check backbone, taps and head against each other, on the meta device: no memory, no time.

    Raises:
        UserError: they do not fit; the text names the key.
    """
    input_shape = (config.data.channels, config.data.image_size, config.data.image_size)
    with torch.device("meta"):
        backbone = create_backbone(
            config.model.backbone,
            num_classes=num_classes,
            channels=config.data.channels,
            options=config.model.options,
        )
        if sum(p.numel() for p in backbone.parameters()) == 0:
            raise UserError(f"model.backbone = {config.model.backbone!r} has no weights to train")
        taps, early_exit = probe_taps(backbone, config.mint.taps, input_shape)
        create_head(config.mint, taps)
    return Architecture(
        backbone=config.model.backbone,
        options=dict(config.model.options),
        num_classes=num_classes,
        input_shape=input_shape,
        taps=taps,
        early_exit=early_exit,
        mint=config.mint,
    )


class AuditedModel(nn.Module):
    """M⁺ = (w, θ): the classifier w and the MINT head θ that reads its taps.

    The head is initialised without advancing torch's random state, so the backbone's weights and
    all that is drawn after them are those of plain training with the same seed.
    """

    def __init__(self, architecture: Architecture, *, pretrained: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = create_backbone(
            architecture.backbone,
            num_classes=architecture.num_classes,
            channels=architecture.input_shape[0],
            options=architecture.options,
            pretrained=pretrained,
        )
        with torch.random.fork_rng(devices=[]):
            self.head = create_head(architecture.mint, architecture.taps)
        self._taps = TapReader(self.backbone, [tap.name for tap in architecture.taps])

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimiser factory leaves undecayed: the backbone's own choice."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in names}

    def forward(
        self, images: torch.Tensor, *, n_task: int | None = None, mint: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Task logits and membership logits in one pass through the shared trunk.

        Args:
            images: (n, channels, height, width).
            n_task: how many leading rows belong to D; the others (E) leave the backbone after the
                last tap and get no task logits. None: all rows get both.
            mint: False leaves the head out, as plain training does.

        Returns:
            (n_task or n, num_classes) task logits and (n,) membership logits (None if not `mint`).
        """
        # Without the head there is no E either, and the backbone runs as if nothing were hooked.
        keep = n_task if mint and self.architecture.early_exit else None
        with self._taps.reading(keep) as activations:
            logits = self.backbone(images)
        membership = self.head(activations) if mint else None
        return logits[:n_task], membership
