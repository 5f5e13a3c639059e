"""In which order samples are taken: functions of seed and number alone, so that a run can go on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
_STREAMS = 24


def random(seed: int, stream: str, number: int) -> np.random.Generator:
    """A generator that is a function of its arguments alone."""
    return np.random.default_rng([seed, int.from_bytes(stream.encode(), "little"), number])


def shuffled(positions: Positions, seed: int, stream: str, number: int) -> Positions:
    """A permutation for images in memory."""
    return random(seed, stream, number).permutation(positions)


def fixed_sample(groups: Iterable[Positions], most: int | None) -> Positions:
    """Up to `most` positions of each group, in ascending order; of the same groups always the same.

    Drawn at random, not at equal distances: a source may have its classes in turn. Fewer are a part
    of more.

    Args:
        groups: (n,) samples each; no sample is in two.
        most: of each; None: all.
    """
    taken = [
        group
        if most is None or len(group) <= most
        else group[random(0, "fixed sample", len(group)).permutation(len(group))[:most]]
        for group in groups
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *taken]))


def stream_count(readers: int) -> int:
    """Streams that an order for streaming is made of: as many for each reader of all workers.

    Args:
        readers: of all workers together; for each divisor of 24 the answer is the same.
    """
    return readers * -(-_STREAMS // readers)


def windowed(
    positions: Positions,
    shard: npt.NDArray[np.int32],
    seed: int,
    stream: str,
    number: int,
    *,
    streams: int,
    window: int,
) -> Positions:
    """An order in which every shard is read once or twice, and few of them at a time.

    The shards are shuffled and laid end to end; the row is cut into `streams` pieces as long as
    each other, within each of which a sample moves by at most `window` places; the pieces are then
    dealt out in turn, so that place g belongs to piece g mod `streams`. Whoever takes some of the
    pieces reads only their shards.

    Args:
        positions: (n,) samples.
        shard: (n,) where each of them is.
        seed: of the run.
        stream: what the order is for.
        number: of the pass.
        streams: pieces.
        window: how far a sample moves within its piece.

    Returns:
        (n,) the same positions.
    """
    generator = random(seed, f"{stream} streamed", number)
    ids, which = np.unique(shard, return_inverse=True)
    row = positions[np.argsort(generator.permutation(len(ids))[which], kind="stable")]
    order = np.empty_like(positions)
    start = 0
    for piece in range(streams):
        length = len(order[piece::streams])
        keys = np.arange(length) + generator.random(length) * window
        order[piece::streams] = row[start : start + length][np.argsort(keys, kind="stable")]
        start += length
    return order
