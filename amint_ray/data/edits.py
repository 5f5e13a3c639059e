"""What may have become of an image on its way, and an attack should survive.

All take and give (n, channels, height, width) uint8 at the model's input size.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image


def edited(images: torch.Tensor, edit: str) -> torch.Tensor:
    """The images after one edit.

    Args:
        images: (n, channels, height, width) uint8.
        edit: `plain` (nothing), `jpeg_90`, `jpeg_75`, `jpeg_50` (encoded at that quality, and
            decoded), `resize_0.9` (to 0.9 of its size and back, bicubic), `shift_1` (one pixel to
            the right, the edge repeated) or `flip` (left to right).
    """
    if edit == "plain":
        return images
    if edit == "flip":
        return images.flip(3)
    if edit == "shift_1":
        return torch.cat([images[..., :1], images[..., :-1]], dim=3)
    kind, _, amount = edit.partition("_")
    if kind == "jpeg":
        return _each(images, lambda image: _jpeg(image, int(amount)))
    if kind == "resize":
        return _each(images, lambda image: _resized(image, float(amount)))
    raise ValueError(f"{edit!r} is no edit")


def _each(images: torch.Tensor, change: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    """Each image changed as a picture: grey, RGB, or channel by channel where it is neither."""
    channels = images.shape[1]
    pictures = images if channels in (1, 3) else images.flatten(0, 1)[:, None]
    arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
    done = [
        np.asarray(change(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)))
        for array in arrays
    ]
    if not done:
        return images
    stacked = torch.from_numpy(np.stack(done)).to(images.device)
    if stacked.ndim == 3:
        return stacked.reshape(images.shape)
    return stacked.permute(0, 3, 1, 2).contiguous()


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def _resized(image: Image.Image, factor: float) -> Image.Image:
    width, height = (max(1, round(side * factor)) for side in image.size)
    smaller = image.resize((width, height), Image.Resampling.BICUBIC)
    return smaller.resize(image.size, Image.Resampling.BICUBIC)
