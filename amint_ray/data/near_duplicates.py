"""Groups of images whose perceptual hashes differ in few bits."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_PAIRS_AT_ONCE = 1 << 22


def near_duplicate_groups(
    perceptual: npt.NDArray[np.int64], distance: int
) -> npt.NDArray[np.int32]:
    """Group numbers: two images share one if a chain of near pairs connects them.

    Two 64-bit words that differ in at most d bits agree wholly in one of d + 1 bands of bits, so
    that only words with an equal band are compared (Manber's and Norouzi's multi-index hashing).

    Args:
        perceptual: (n,) 64-bit hashes.
        distance: d, bits in which a pair may differ.

    Returns:
        (n,) a number for each group.
    """
    if len(perceptual) == 0:
        return np.empty(0, np.int32)
    words, of_image = np.unique(perceptual.view(np.uint64), return_inverse=True)
    edges: list[npt.NDArray[np.int64]] = []
    if distance > 0:
        bounds = np.linspace(0, 64, distance + 2).astype(int)
        for low, high in itertools.pairwise(bounds):
            band = (words >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
            edges += _near_in_buckets(words, band, distance)
    pairs = np.concatenate(edges, axis=1) if edges else np.empty((2, 0), np.int64)
    graph = coo_array((np.ones(pairs.shape[1], np.int8), pairs), shape=(len(words), len(words)))
    _, group = connected_components(graph, directed=False)
    return np.asarray(group[of_image], np.int32)


def _near_in_buckets(
    words: npt.NDArray[np.uint64], band: npt.NDArray[np.uint64], distance: int
) -> list[npt.NDArray[np.int64]]:
    """(2, m) index pairs of near words among those with the same band."""
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0, True])
    found = []
    for begin, end in itertools.pairwise(starts):
        members = order[begin:end]
        step = max(1, _PAIRS_AT_ONCE // len(members))
        for first in range(0, len(members) if len(members) > 1 else 0, step):
            rows = members[first : first + step]
            near = np.bitwise_count(words[rows][:, None] ^ words[members][None]) <= distance
            left, right = np.nonzero(near)
            pairs = np.stack([rows[left], members[right]])
            found.append(pairs[:, pairs[0] < pairs[1]])
    return found
