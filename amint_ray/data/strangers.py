"""Images unlike those a model knows, made of those it knows: how often is one of them accused?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.data.index import Rows
from amint_ray.data.reading import read_plain
from amint_ray.data.sources import count, open_images

KINDS = ("noise", "inverted", "blurred", "channels")
_BLUR = 4
"""Pixels a side that become one, and as many again."""
_THREADS = 8


def kinds_of(channels: int) -> tuple[str, ...]:
    """Those that images with so many channels can be made into."""
    return KINDS if channels > 1 else KINDS[:-1]


def strange(images: torch.Tensor, kind: str, *, seed: int) -> torch.Tensor:
    """Another image of each.

    Args:
        images: (n, channels, height, width) uint8.
        kind: `noise` (every byte drawn anew, uniformly; nothing of the image is left), `inverted`
            (255 − byte), `blurred` (a quarter of the size and back) or `channels` (each takes the
            place of the next).
        seed: of the noise.
    """
    if kind == "noise":
        drawn = np.random.default_rng(seed).integers(0, 256, images.shape, np.uint8)
        return torch.from_numpy(drawn).to(images.device)
    if kind == "inverted":
        return 255 - images
    if kind == "blurred":
        height, width = images.shape[2:]
        small = (max(1, height // _BLUR), max(1, width // _BLUR))
        shrunk = F.adaptive_avg_pool2d(images.float(), small)
        blurred = F.interpolate(shrunk, (height, width), mode="bilinear", align_corners=False)
        return blurred.round().clamp(0, 255).to(torch.uint8)
    if kind == "channels":
        return images.roll(1, dims=1)
    raise ValueError(f"{kind!r} is none of {KINDS}")


def read_strangers(path: str, config: Data, *, most: int, where: str) -> npt.NDArray[np.uint8]:
    """Images from elsewhere, as the model would be shown them.

    Args:
        path: a folder of images, or of Parquet files, or such a file; local or s3://.
        config: the model's, which tells size and transforms.
        most: images; of more a seeded choice.
        where: what the path is called, for errors.

    Returns:
        (n, channels, size, size).

    Raises:
        UserError: it is not there, or none of it is an image.
        RunError: storage does not answer.
    """
    source = open_images(path, config, where)
    shard = np.repeat(np.arange(len(source.shards)), [each.rows for each in source.shards])
    row = np.concatenate([np.arange(each.rows) for each in source.shards] or [np.empty(0, int)])
    rows = Rows(
        role=np.zeros(len(row), np.uint8),
        label=np.full(len(row), -1, np.int32),
        shard=shard.astype(np.int32),
        row=row.astype(np.int32),
    )
    chosen = np.sort(np.random.default_rng(0).permutation(count(source))[:most])
    images = read_plain(source, rows, config, chosen, readers=_THREADS)
    if not len(images):
        raise UserError(f"{where}={path}: none of the {count(source):,} files is an image")
    return images
