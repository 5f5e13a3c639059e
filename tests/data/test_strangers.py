"""Images unlike those that a model knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.data.near_duplicates import pairs_across
from amint_ray.data.strangers import KINDS, kinds_of, read_strangers, strange

IMAGES = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (6, 3, 16, 16), np.uint8))


def test_each_kind_is_another_image_of_the_same_form() -> None:
    for kind in KINDS:
        made = strange(IMAGES, kind, seed=0)
        assert (made.shape, made.dtype) == (IMAGES.shape, torch.uint8)
        assert not torch.equal(made, IMAGES)
        assert torch.equal(made, strange(IMAGES, kind, seed=0))
    assert torch.equal(strange(strange(IMAGES, "inverted", seed=0), "inverted", seed=0), IMAGES)
    assert torch.equal(strange(IMAGES, "channels", seed=0)[:, 1], IMAGES[:, 0])
    assert not torch.equal(strange(IMAGES, "noise", seed=0), strange(IMAGES, "noise", seed=1))
    blurred = strange(IMAGES, "blurred", seed=0).float()
    assert blurred.var() < IMAGES.float().var() / 4
    assert blurred.mean() == pytest.approx(IMAGES.float().mean(), abs=2)
    assert kinds_of(1) == ("noise", "inverted", "blurred")
    with pytest.raises(ValueError, match="none of"):
        strange(IMAGES, "sepia", seed=0)


def test_images_from_elsewhere_need_no_classes(tmp_path: Path) -> None:
    for number in range(5):
        pixels = np.full((20, 30, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "6.png").write_bytes(b"no image")
    config = load_config("digits").data
    found = read_strangers(str(tmp_path), config, most=10, where="--ood")
    assert found.shape == (5, config.channels, config.image_size, config.image_size)
    assert sorted(found[:, 0, 0, 0].tolist()) == [0, 40, 80, 120, 160]
    some = read_strangers(str(tmp_path), config, most=3, where="--ood")
    assert 2 <= len(some) <= 3  # the file that is no image may be among them


def test_a_place_without_images(tmp_path: Path) -> None:
    config = load_config("digits").data
    for path, part in ((tmp_path / "nowhere", "--ood="), (tmp_path, "--ood=")):
        with pytest.raises(UserError) as told:
            read_strangers(str(path), config, most=10, where="--ood")
        assert part in str(told.value) and "\n" not in str(told.value)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 files is an image"):
        read_strangers(str(tmp_path), config, most=10, where="--ood")


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_pairs_across_roles_are_those_of_looking_at_each(distance: int) -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(0, 1 << 63, 30, np.uint64)
    hashes = words[rng.integers(0, 30, 120)]
    for _ in range(4):  # some bits of some
        flipped = np.uint64(1) << rng.integers(0, 64, 120).astype(np.uint64)
        hashes = np.where(rng.random(120) < 0.3, hashes ^ flipped, hashes)
    role = rng.integers(0, 4, 120)
    pairs, near = pairs_across(hashes.view(np.int64), role, roles=4, distance=distance)
    expected, close = np.zeros((4, 4), np.int64), np.zeros((120, 4), np.bool_)
    for i in range(120):
        for j in range(i):
            apart = int(np.bitwise_count(hashes[i] ^ hashes[j]))
            if apart <= distance and role[i] != role[j]:
                expected[role[i], role[j]] += 1
                expected[role[j], role[i]] += 1
                close[i, role[j]] = close[j, role[i]] = True
    assert expected.sum() > 0
    assert np.array_equal(pairs, expected)
    assert np.array_equal(near, close)
