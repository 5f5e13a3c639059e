"""From stored bytes to what the backbone sees: one path for D and E, training and scoring."""

from __future__ import annotations

import torch

from amint_ray.config.schema import Data


def crop_and_flip(images: torch.Tensor, *, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Move each image by its own shift on black ground, and mirror some of them.

    Args:
        images: (n, channels, height, width).
        shift: (n, 2) int64 pixels down and to the right; negative: up and to the left.
        flip: (n,) bool, mirrored left to right before being moved.
    """
    n, channels, height, width = images.shape
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    rows = torch.arange(height) - shift[:, :1]
    columns = torch.arange(width) - shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    rows = rows.clamp(0, height - 1)[:, None, :, None].expand(n, channels, height, width)
    columns = columns.clamp(0, width - 1)[:, None, None, :].expand(n, channels, height, width)
    return images.gather(2, rows).gather(3, columns) * inside[:, None]


def to_model_input(images: torch.Tensor, config: Data) -> torch.Tensor:
    """Scale bytes to [0, 1] and normalise.

    Args:
        images: (n, channels, height, width) uint8.
        config: tells mean and std.

    Returns:
        (n, channels, height, width) float32.
    """
    return images.float().div_(255).sub_(config.mean).div_(config.std)
