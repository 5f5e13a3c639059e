"""Chosen samples as they are scored, some at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_source import Set, config_of, png

from amint_ray.contracts import RunError
from amint_ray.data.reading import plain_batches, read_plain
from amint_ray.data.sources import Fault

SIZES = [5, 7, 3, 6]
CONFIG = config_of()
CHOSEN = np.array([20, 3, 11, 4, 0, 13, 7, 19, 12, 8])


def read(
    some: Set, positions: npt.NDArray[np.int64], size: int
) -> tuple[list[npt.NDArray[np.int64]], dict[int, torch.Tensor]]:
    """Which samples each batch brought; and the images by sample."""
    batches = list(plain_batches(some.source, some.rows, CONFIG.data, positions, size=size))
    images = {
        position: image
        for chosen, batch in batches
        for position, image in zip(chosen.tolist(), batch, strict=True)
    }
    return [chosen for chosen, _ in batches], images


@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_pixels_are_those_of_memory_mode_and_of_read_plain(size: int) -> None:
    whole = Set(SIZES, {})
    expected = whole.plain(CONFIG)
    chosen, images = read(whole, CHOSEN, size)
    assert sorted(np.concatenate(chosen).tolist()) == sorted(CHOSEN.tolist())
    assert [len(each) for each in chosen] == [
        min(size, len(CHOSEN) - start) for start in range(0, len(CHOSEN), size)
    ]
    for position, image in images.items():
        assert torch.equal(image, expected[position]), position
    by_shard = CHOSEN[np.argsort(whole.rows.shard[CHOSEN], kind="stable")]
    other = read_plain(whole.source, whole.rows, CONFIG.data, CHOSEN, readers=1)
    assert torch.equal(torch.stack([images[p] for p in by_shard.tolist()]), torch.from_numpy(other))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_shard_is_read_once_however_small_the_batches_are(size: int) -> None:
    whole = Set(SIZES, {})
    read(whole, CHOSEN, size)
    shards = [shard for shard, _ in whole.source.reads]
    assert shards == sorted(set(shards))


def test_an_image_that_is_missing_is_missing() -> None:
    """Neither an image of zeros nor a shift of those behind it."""
    instead = {3: Fault("is gone"), 11: png(11)[:150], 20: b""}
    some = Set(SIZES, {}, instead=instead)
    expected = some.plain(CONFIG)
    for size in (1, 4, 100):
        _, images = read(some, CHOSEN, size)
        assert images.keys() == set(CHOSEN.tolist()) - instead.keys()
        for position, image in images.items():
            assert torch.equal(image, expected[position]), position


def test_no_sample_is_no_batch() -> None:
    assert read(Set(SIZES, {}), CHOSEN[:0], 4) == ([], {})


def test_storage_that_no_longer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amint_ray.data.reading._PAUSES", ())
    monkeypatch.setattr("amint_ray.data.reading._FAILURES", 0)
    some = Set(SIZES, {}, broken=dict.fromkeys(range(len(SIZES)), "the disk is on fire"))
    with pytest.raises(RunError, match="storage no longer answers: the disk is on fire"):
        read(some, CHOSEN, 4)
