"""What `amint data` says, of sources that need not be looked at on a screen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launch.silent import Silent
from PIL import Image

from amint_ray.config.schema import Config
from amint_ray.contracts import UserError
from amint_ray.launch.describe_data import describe_data


def config_of(folder: Path, **data: object) -> Config:
    return Config.model_validate({"data": {"source": "folder", "path": str(folder), **data}})


def plant(folder: Path, count: int) -> None:
    """Images of one shade each, which all look alike to a perceptual hash, in two classes."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 255 - i, 7)).save(path)


def test_what_does_not_fit_into_memory_is_told_before_anything_is_decoded(tmp_path: Path) -> None:
    plant(tmp_path, 4)
    watcher = Silent()
    config = config_of(tmp_path, mode="memory", memory_gib=1e-9)
    with pytest.raises(UserError, match=r"data\.memory_gib allows"):
        describe_data(config, None, watcher)
    assert watcher.phases == ["opening folder"]


def test_a_group_of_most_images_is_told(tmp_path: Path) -> None:
    plant(tmp_path, 120)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a/other.png")
    watcher = Silent()
    document = describe_data(config_of(tmp_path, near_duplicates=0), None, watcher)
    assert document["largest_group"] == 120
    assert document["near_duplicates"] == 119
    (note,) = watcher.notices
    assert note.startswith("data: the largest group of near-duplicates holds 120 of 121 images")
    alone = describe_data(config_of(tmp_path), None, watcher)
    assert alone["largest_group"] is None
    assert len(watcher.notices) == 1
