"""Decoding a whole source once, where it fits."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.data.index import Hashes, Index, Progress, index_here
from amint_ray.data.sources import Source, count
from amint_ray.data.transforms import Views


def choose_mode(source: Source, config: Data) -> Literal["memory", "streamed"]:
    """Whether images are held in memory or read anew in each epoch.

    Raises:
        UserError: memory is asked for and not enough.
    """
    gib = memory_needed(source, config) / 2**30
    fits = gib <= config.memory_gib
    if config.mode == "memory" and not fits:
        raise UserError(
            f"data: {count(source):,} images of {config.image_size}×{config.image_size} need "
            f"{gib:.1f} GiB in memory, data.memory_gib allows {config.memory_gib:g}; raise it, "
            "take data.mode=streamed, a part with data.limit=N, or a smaller data.image_size"
        )
    if config.mode != "auto":
        return config.mode
    return "memory" if fits and config.augment != "timm" else "streamed"


def memory_needed(source: Source, config: Data) -> int:
    """Bytes that all decoded images take."""
    return count(source) * config.channels * config.image_size**2


def load_memory(
    source: Source,
    config: Data,
    *,
    readers: int,
    progress: Progress = lambda done, total: None,
    hashes: Hashes = "roles",
) -> tuple[npt.NDArray[np.uint8], Index]:
    """Decode every image as it is scored.

    Args:
        source: where they are.
        config: tells the transforms and the roles.
        readers: threads.
        progress: called with (images done, images in all).
        hashes: which are wanted; those of the pixels as they are scored can be had from these.

    Returns:
        (n, channels, size, size), and who they are, in the same order.

    Raises:
        UserError: nothing can be used.
    """
    views = Views(config)
    rows = [shard.rows for shard in source.shards]
    first = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    size = config.image_size
    images = np.empty((int(first[-1]), config.channels, size, size), dtype=np.uint8)

    def keep(shard: int, row: int, image: Image.Image) -> None:
        images[first[shard] + row] = views.plain(image).numpy()

    index = index_here(
        source,
        config,
        readers=readers,
        progress=progress,
        keep=keep,
        hashes="roles" if hashes == "content" else hashes,
    )
    used = first[index.shard] + index.row
    # Without a gap, nothing is copied.
    return (images if len(used) == len(images) else images[used]), index
