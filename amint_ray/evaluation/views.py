"""Fixed views through which a model's outputs are looked at.

All take and give (n, channels, height, width), pixels or normalised ones: they only move them.
"""

from __future__ import annotations

import torch

VIEWS = 6
"""How many there are, the image itself among them."""


def view(images: torch.Tensor, number: int) -> torch.Tensor:
    """One of the fixed views through which outputs are looked at.

    Args:
        images: (n, channels, height, width) of any type.
        number: 0 is the image itself, 1 its mirror image; 2 to 5 are shifted by one pixel.
    """
    moves = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    if number < 2:
        return images.flip(3) if number else images
    right, down = moves[number - 2]
    return shifted(images, right=right, down=down)


def shifted(images: torch.Tensor, *, right: int = 0, down: int = 0) -> torch.Tensor:
    """Moved by so many pixels, negative ones to the left and up; what is laid bare is the edge."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right).clamp(0, width - 1)
    return images[:, :, rows][:, :, :, columns]
