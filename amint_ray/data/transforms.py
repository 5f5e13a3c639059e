"""From decoded images to what the backbone sees: one path for D and E, training and scoring."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError, first_line

# Of timm's create_transform: what changes the view. The rest is set here, or does nothing without
# timm's own loader, such as random erasing.
_OPTIONS = {
    *("train_crop_mode", "scale", "ratio", "hflip", "vflip", "interpolation", "auto_augment"),
    *("color_jitter", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"),
}

_IN_CACHE = 1 << 20  # pixels


class Views:
    """An RGB image as it is scored, and as the task sees it in training.

    Both are (channels, size, size) uint8. D and E share both: nothing here knows of roles.
    """

    def __init__(self, config: Data) -> None:
        """Set timm's transforms up.

        Raises:
            UserError: `data.augment_options` does not suit timm.
        """
        from timm.data import create_transform  # readers and drivers only; a second of import

        self._channels = config.channels
        size = (config.channels, config.image_size, config.image_size)
        shared: dict[str, Any] = {
            "interpolation": "bicubic",
            "mean": (config.mean,) * config.channels,
            "std": (config.std,) * config.channels,
        }
        self._plain = create_transform(size, crop_pct=config.crop_pct, normalize=False, **shared)
        self._task = None
        if config.augment == "timm":
            if unknown := sorted(config.augment_options.keys() - _OPTIONS):
                raise UserError(
                    f"data.augment_options: {unknown[0]!r} is none of {', '.join(sorted(_OPTIONS))}"
                )
            try:
                self._task = create_transform(
                    size, is_training=True, normalize=False, **(shared | config.augment_options)
                )
            except (TypeError, ValueError, AssertionError, KeyError) as error:
                raise UserError(
                    f"data.augment_options = {config.augment_options}: timm's create_transform "
                    f"refuses them: {first_line(error)}"
                ) from error

    def plain(self, rgb: Image.Image) -> torch.Tensor:
        """As it is scored: the shorter side resized, then the centre."""
        return cast(torch.Tensor, self._plain(self._converted(rgb)))

    def task(self, rgb: Image.Image, seed: int) -> torch.Tensor:
        """As `data.augment=timm` makes it; the same for the same seed."""
        assert self._task is not None
        # timm draws from all three; in a process that does nothing else they may be set.
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        return cast(torch.Tensor, self._task(self._converted(rgb)))

    def _converted(self, rgb: Image.Image) -> Image.Image:
        return rgb if self._channels == 3 else rgb.convert("L")


def crop_and_flip(images: torch.Tensor, *, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Move each image by its own shift on black ground, and mirror some of them.

    Args:
        images: (n, channels, height, width).
        shift: (n, 2) int64 pixels down and to the right; negative: up and to the left.
        flip: (n,) bool, mirrored left to right before being moved.
    """
    n, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) - shift[:, :1]
    columns = torch.arange(width, device=images.device) - shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    # One gather over flattened pixels: where each comes from, the same for all channels.
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    source = source.reshape(n, 1, height * width).expand(n, channels, height * width)
    moved = images.reshape(n, channels, height * width).gather(2, source)
    return moved.reshape(images.shape) * inside[:, None]


def to_model_input(images: Sequence[torch.Tensor], config: Data) -> torch.Tensor:
    """Scale bytes to [0, 1] and normalise, where the images are.

    Args:
        images: one or more (k, channels, height, width) uint8, on one device.
        config: tells mean and std.

    Returns:
        (n, channels, height, width) float32, n being the sum of all k.
    """
    first = images[0]
    step = len(first) or 1
    if first.device.type == "cpu":
        # A few at a time, which stay in the cache: each pass over all would go to memory.
        step = max(1, _IN_CACHE // max(1, first[:1].numel()))
    result = first.new_empty((sum(map(len, images)), *first.shape[1:]), dtype=torch.float32)
    start = 0
    for part in images:
        for some in torch.split(part, step):
            target = result[start : start + len(some)]
            target.copy_(some).div_(255).sub_(config.mean).div_(config.std)
            start += len(some)
    return result
