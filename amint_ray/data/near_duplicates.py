"""Groups of images whose perceptual hashes differ in few bits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_PAIRS_AT_ONCE = 1 << 22
_MOST_TOGETHER, _MOST_OF_ALL = 100, 0.05
"""A group of more images, and of more of all of them, is remarked on."""

Pairs = npt.NDArray[np.int64]
"""(2, m) indices of words."""


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
    edges: list[Pairs] = []
    held = 0
    if distance > 0:
        bounds = np.linspace(0, 64, distance + 2).astype(int)
        for low, high in itertools.pairwise(bounds):
            band = (words >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
            for pairs in _near_in_buckets(words, band, distance):
                edges.append(pairs)
                held += pairs.shape[1]
                if held > _PAIRS_AT_ONCE + len(words):
                    edges = [_stars(_components(edges, len(words)))]
                    held = edges[0].shape[1]
    return np.asarray(_components(edges, len(words))[of_image], np.int32)


def pairs_across(
    perceptual: npt.NDArray[np.int64], role: npt.NDArray[np.int64], *, roles: int, distance: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Pairs of near-duplicates in different roles, each counted once; chains join nothing here.

    Args:
        perceptual: (n,) 64-bit hashes.
        role: (n,) numbers from 0.
        roles: how many there are.
        distance: bits in which a pair may differ.

    Returns:
        (roles, roles) symmetric counts of pairs, 0 on the diagonal; and (n, roles) whether a
        sample has a near-duplicate in that role, its own left out.
    """
    words, of_image = np.unique(perceptual.view(np.uint64), return_inverse=True)
    counts = np.zeros((len(words), roles), np.int64)
    np.add.at(counts, (of_image, role), 1)
    pairs, near = counts.T @ counts, counts > 0
    bounds = np.linspace(0, 64, distance + 2).astype(int)
    masks = [
        np.uint64((1 << int(high)) - (1 << int(low))) for low, high in itertools.pairwise(bounds)
    ]
    for number, mask in enumerate(masks if distance else []):
        for left, right in _near_in_buckets(words, words & mask, distance):
            differing = words[left] ^ words[right]
            # What agrees in an earlier band, too, was found there.
            new = np.ones(len(left), np.bool_)
            for earlier in masks[:number]:
                new &= (differing & earlier) != 0
            left, right = left[new], right[new]
            one_way = counts[left].T @ counts[right]
            pairs += one_way + one_way.T
            for a, b in ((left, right), (right, left)):
                np.logical_or.at(near, a, counts[b] > 0)
    np.fill_diagonal(pairs, 0)
    found = near[of_image]
    found[np.arange(len(role)), role] = False
    return pairs, found


def deciding_content(
    content: list[str], perceptual: npt.NDArray[np.int64], distance: int | None
) -> list[str]:
    """What decides each image's role: its content, or that of the first of its near-duplicates.

    Args:
        content: (n,) content hashes.
        perceptual: (n,) 64-bit hashes, read only where near-duplicates are grouped.
        distance: None: they are not.
    """
    if distance is None:
        return content
    group = near_duplicate_groups(perceptual, distance).tolist()
    leader: dict[int, str] = {}
    for number, key in zip(group, content, strict=True):
        leader[number] = min(key, leader.get(number, key))
    return [leader[number] for number in group]


def largest_group(
    group: Sequence[str], sample_id: Sequence[str], distance: int | None
) -> tuple[int | None, list[str]]:
    """How many images the largest group has, and what to say of it, if anything.

    A chain of near pairs can join what does not look alike, without end.

    Args:
        group: (n,) what decides each image's role.
        sample_id: (n,) names.
        distance: None: near-duplicates are not grouped.
    """
    if distance is None or not group:
        return None, []
    key, size = Counter(group).most_common(1)[0]
    if size <= max(_MOST_TOGETHER, _MOST_OF_ALL * len(group)):
        return size, []
    less = f"a number below {distance} makes smaller groups" if distance else "null makes none"
    note = (
        f"the largest group of near-duplicates holds {size:,} of {len(group):,} images, "
        f"{sample_id[group.index(key)]} among them, and all get one role; "
        f"data.near_duplicates={distance} joins chains of images: {less}"
    )
    return size, [note]


def _components(edges: Sequence[Pairs], n: int) -> npt.NDArray[np.int32]:
    """(n,) the number of the component that each word is in."""
    pairs = np.concatenate(edges, axis=1) if edges else np.empty((2, 0), np.int64)
    graph = coo_array((np.ones(pairs.shape[1], np.int8), pairs), shape=(n, n))
    _, group = connected_components(graph, directed=False)
    return np.asarray(group, np.int32)


def _stars(group: npt.NDArray[np.int32]) -> Pairs:
    """Pairs that connect the same words, and are fewer than these, however many were near."""
    _, first = np.unique(group, return_index=True)
    centre = first[group]
    others = np.flatnonzero(centre != np.arange(len(group)))
    return np.stack([centre[others], others])


def _near_in_buckets(
    words: npt.NDArray[np.uint64], band: npt.NDArray[np.uint64], distance: int
) -> Iterator[Pairs]:
    """Index pairs of near words among those with the same band."""
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0, True])
    for begin, end in itertools.pairwise(starts):
        members = order[begin:end]
        step = max(1, _PAIRS_AT_ONCE // len(members))
        for first in range(0, len(members) if len(members) > 1 else 0, step):
            rows = members[first : first + step]
            near = np.bitwise_count(words[rows][:, None] ^ words[members][None]) <= distance
            left, right = np.nonzero(near)
            pairs = np.stack([rows[left], members[right]])
            yield pairs[:, pairs[0] < pairs[1]]
