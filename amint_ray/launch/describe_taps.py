"""What `amint taps` says: the modules of a backbone as places to read from."""

from __future__ import annotations

from typing import Any

import timm
import torch

from amint_ray.config.schema import Config
from amint_ray.model.backbone import create_backbone
from amint_ray.model.blocks import blocks
from amint_ray.model.joint import head_spec, plan
from amint_ray.model.placement import PLACEMENTS, landmarks
from amint_ray.model.survey import survey
from amint_ray.train.flops import count_flops

_ROWS = 16


def describe_taps(config: Config, *, every: bool, own_size: bool) -> dict[str, Any]:
    """A document about `model.backbone`.

    Args:
        config: tells backbone, options, input and head.
        every: list all modules that can be tapped, not only stages, blocks and what placements
            pick.
        own_size: take timm's input size for this backbone instead of the configuration's.

    Returns:
        `backbone`, `input_shape`, `modules` (each with `name`, `class`, `shape`, `layout`,
        `prefix_tokens`, `depth` and `placements`), `external_ratio`, and `placements` (each with
        `taps`, `early_exit` and the joint step's `flop_ratio` to the audited-only step).

    Raises:
        UserError: the backbone, its options or the size do not fit.
    """
    backbone, options = config.model.backbone, config.model.options
    size = config.data.image_size
    with torch.device("meta"):
        model = create_backbone(
            backbone, num_classes=2, channels=config.data.channels, options=options
        )
        if own_size and (known := timm.get_pretrained_cfg(backbone)) is not None:
            own = options.get("img_size", known.input_size[-1])
            size = own if isinstance(own, int) else own[-1]
        shape = (config.data.channels, size, size)
        sites = survey(model, shape)
    placements = {name: _cost(config, name, shape) for name in PLACEMENTS}
    listed = {site.name for site in landmarks(model, sites)} | set(blocks(model))
    listed |= {tap for placement in placements.values() for tap in placement["taps"]}
    return {
        "backbone": backbone,
        "input_shape": list(shape),
        "modules": [
            {
                "name": site.name,
                "class": site.kind,
                "shape": list(site.shape),
                "layout": site.layout,
                "prefix_tokens": site.prefix,
                "depth": site.depth,
                "placements": [
                    name for name, cost in placements.items() if site.name in cost["taps"]
                ],
            }
            for site in sites
            if not site.fault and (every or site.name in listed)
        ],
        "external_ratio": config.train.external_ratio,
        "placements": placements,
    }


def _cost(config: Config, name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What a placement resolves to, and what its joint step costs."""
    architecture = plan(
        config.model.backbone,
        options=config.model.options,
        num_classes=2,
        input_shape=shape,
        taps=[name],
        head=head_spec(config.mint, coded=config.uses_key),
        detach=config.mint.detach,
    )
    return {
        "taps": [tap.name for tap in architecture.taps],
        "early_exit": architecture.early_exit,
        "flop_ratio": count_flops(
            architecture, n_task=_ROWS, n_rows=_ROWS + round(_ROWS * config.train.external_ratio)
        ).ratio,
    }
