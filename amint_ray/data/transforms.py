"""From stored bytes to what the backbone sees: one path for D and E, training and scoring."""

from __future__ import annotations

import torch

from amint_ray.config.schema import Data


def to_model_input(images: torch.Tensor, config: Data) -> torch.Tensor:
    """Scale bytes to [0, 1] and normalise.

    Args:
        images: (n, channels, height, width) uint8.
        config: tells mean and std.

    Returns:
        (n, channels, height, width) float32.
    """
    return images.float().div_(255).sub_(config.mean).div_(config.std)
