"""scikit-learn's digits as a source."""

from __future__ import annotations

import pickle

import numpy as np
from folder_trees import listed
from sklearn.datasets import load_digits

from amint_ray.data.arrays import open_digits
from amint_ray.data.images import decode


def test_digits_are_scikit_learns() -> None:
    source, reference = open_digits(None), load_digits()
    assert source.class_names == [str(c) for c in range(10)]
    rows = [(shard.rows, shard.test, shard.size) for shard in source.shards]
    assert rows == [(n, False, 64 * n) for n in (512, 512, 512, 261)]
    assert listed(source) == {f"digits/{i}": (t, False) for i, t in enumerate(reference.target)}
    for number in range(4):
        images = source.read(number, [0, 3, 260])
        for row, image in zip((0, 3, 260), images, strict=True):
            assert not isinstance(image, bytes)
            pixels = np.asarray(decode(image, max_megapixels=1))
            expected = reference.images[512 * number + row]
            np.testing.assert_allclose(pixels[..., 1] / 255, expected / 16, atol=0.5 / 255)


def test_limit_takes_the_first() -> None:
    whole, part = open_digits(None), open_digits(600)
    assert [shard.rows for shard in part.shards] == [512, 88]
    assert part.sample_ids(1) == whole.sample_ids(1)[:88]
    assert part.labels(1) == whole.labels(1)[:88]
    for image, same in zip(part.read(1, range(88)), whole.read(1, range(88)), strict=True):
        assert image == same
    assert part.identity != whole.identity
    assert len(pickle.dumps(part)) < 600 * 64 + 10_000
