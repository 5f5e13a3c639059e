"""Images that are in memory to begin with: scikit-learn's digits, small published sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from amint_ray.data.sources import Known, Raw, Shard, Unreadable

_SHARD_ROWS = 512


@dataclass(frozen=True)
class Part:
    """One of the publisher's splits.

    Attributes:
        name: what the sample ids begin with.
        pixels: (n, height, width) gray or (n, height, width, 3) RGB.
        label: (n,) class indices.
        test: whether the publisher calls it a test split.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int64]
    test: bool


class ArraySource:
    """Images in arrays; a `sources.Source`."""

    def __init__(
        self, parts: Sequence[Part], class_names: Sequence[str], *, limit: int | None
    ) -> None:
        """Cut the parts into shards.

        Args:
            parts: the splits, with names of their own.
            class_names: one a class.
            limit: images of each part; None: all.
        """
        # Copied where it is cut, so that nothing is pickled, or kept, but what is used.
        self._parts = [
            part
            if limit is None or len(part.label) <= limit
            else Part(part.name, part.pixels[:limit].copy(), part.label[:limit].copy(), part.test)
            for part in parts
        ]
        self.class_names: list[str] | None = list(class_names)
        self.notes: list[str] = []
        self.unreadable: list[Unreadable] = []
        self.shards: list[Shard] = []
        self._starts: list[tuple[int, int]] = []  # part, first row in it
        digest = hashlib.sha256(repr(self.class_names).encode())
        for number, part in enumerate(self._parts):
            digest.update(repr((part.name, part.pixels.shape, part.test)).encode())
            digest.update(np.ascontiguousarray(part.pixels).data)
            digest.update(np.ascontiguousarray(part.label).data)
            for first in range(0, len(part.label), _SHARD_ROWS):
                piece = part.pixels[first : first + _SHARD_ROWS]
                self._starts.append((number, first))
                self.shards.append(Shard(len(piece), part.test, piece.nbytes))
        self.identity = digest.hexdigest()

    def sample_ids(self, shard: int) -> list[str]:
        """`PART/ROW`, rows counted from 0 within the part."""
        number, first = self._starts[shard]
        name = self._parts[number].name
        return [f"{name}/{first + row}" for row in range(self.shards[shard].rows)]

    def labels(self, shard: int) -> list[int | None]:
        """The rows' class indices."""
        number, first = self._starts[shard]
        return [*self._parts[number].label[first : first + self.shards[shard].rows].tolist()]

    def read(self, shard: int, rows: Sequence[int]) -> list[Raw]:
        """Some rows' images, gray ones of mode L."""
        number, first = self._starts[shard]
        pixels = self._parts[number].pixels
        return [Image.fromarray(pixels[first + row]) for row in rows]

    def known(self, shard: int) -> Known | None:
        """Nothing."""
        return None


def open_digits(limit: int | None) -> ArraySource:
    """scikit-learn's 1797 digits of 8×8 pixels, which have no test split.

    Args:
        limit: take the first so many; None: all.
    """
    from sklearn.datasets import load_digits  # a second of import that other sources are spared

    digits = load_digits()
    # The published grey values are counts from 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    part = Part("digits", pixels, digits.target.astype(np.int64), test=False)
    return ArraySource([part], [str(name) for name in digits.target_names], limit=limit)
