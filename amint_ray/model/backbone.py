"""Backbones: `timm.create_model` behind one function."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from amint_ray.contracts import RESERVED_OPTIONS, UserError, first_line


def create_backbone(
    name: str,
    *,
    num_classes: int,
    channels: int,
    options: Mapping[str, Any],
    pretrained: bool = False,
) -> nn.Module:
    """A timm classifier.

    Args:
        name: as `timm.list_models()` names it.
        num_classes: outputs of the classifier.
        channels: input channels.
        options: further arguments of `timm.create_model`.
        pretrained: start from timm's published weights.

    Raises:
        UserError: timm has no such model, or it does not take these options.
    """
    if reserved := RESERVED_OPTIONS & options.keys():  # an architecture need not come from a Config
        raise UserError(f"model.options: {', '.join(sorted(reserved))} must not be set")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise UserError(f"model.backbone = {name!r}: timm has no such model{hint}")
    try:
        backbone: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **options
        )
    except Exception as error:  # whatever a constructor makes of the user's options
        raise UserError(
            f"model: timm cannot build {name!r} with options {dict(options)}"
            f"{' and pretrained weights' if pretrained else ''}: {first_line(error)}"
        ) from error
    return backbone
