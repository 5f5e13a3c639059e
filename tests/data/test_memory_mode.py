"""Holding a source in memory: when, and that its images are decoded exactly as they are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hub_files import hub, indexed, loaded, opened, photo, reasons, same, write_hub
from image_files import Pixels, encoded, noise
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.data.index import index_here
from amint_ray.data.memory import choose_mode, load_memory, memory_needed
from amint_ray.data.sources import open_source


def last(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Channels last."""
    return images.transpose(0, 2, 3, 1)


def test_digits_are_held_as_published() -> None:
    seen: list[tuple[int, int]] = []
    config = Data(image_size=8, channels=1)
    images, index = load_memory(
        open_source(config), config, readers=2, progress=lambda *told: seen.append(told)
    )
    reference = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == np.uint8
    np.testing.assert_allclose(images[:, 0] / 255, reference.images / 16, atol=0.5 / 255)
    assert (index.manifest.label == reference.target).all()
    assert index.class_names == [str(c) for c in range(10)]
    assert len(set(index.manifest.sample_id.tolist())) == 1797
    assert {total for _, total in seen} == {1797} and seen[-1][0] == 1797


# --- when -----------------------------------------------------------------------------------------

MIB = 1 / 1024


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # 1024 images of 3 × 32 × 32 bytes are 3 MiB.
        ({"memory_gib": 3 * MIB}, "memory"),
        ({"memory_gib": 2.99 * MIB}, "streamed"),
        ({"memory_gib": 1 * MIB, "channels": 1}, "memory"),
        ({"memory_gib": 0.99 * MIB, "channels": 1}, "streamed"),
        ({"memory_gib": 12 * MIB, "image_size": 64}, "memory"),
        ({"memory_gib": 11.9 * MIB, "image_size": 64}, "streamed"),
        ({"memory_gib": 2 * MIB, "limit": 600}, "memory"),
        ({"augment": "timm"}, "streamed"),
        ({"augment": "crop_flip"}, "memory"),
        ({"mode": "streamed"}, "streamed"),
        ({"mode": "memory"}, "memory"),
        ({"mode": "memory", "memory_gib": 3 * MIB}, "memory"),
    ],
)
def test_mode_is_chosen_by_what_fits(keys: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", [b""] * 1024)
    config = hub(tmp_path, **{"image_size": 32, **keys})
    assert choose_mode(open_source(config), config) == expected


def test_too_much_memory_is_refused_before_decoding(tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", [b"never decoded"] * 1024)
    config = hub(tmp_path, image_size=32, mode="memory", memory_gib=2.99 * MIB)
    assert memory_needed(open_source(config), config) == 3 * 2**20
    with pytest.raises(UserError) as caught:
        choose_mode(open_source(config), config)
    text = str(caught.value)
    assert text.startswith("data: 1,024 images of 32×32 need ")
    assert len(text.splitlines()) == 1
    for way_out in ("data.memory_gib", "data.mode=streamed", "data.limit", "data.image_size"):
        assert way_out in text


# --- which image is whose -------------------------------------------------------------------------


def test_quarantined_images_leave_no_gap(tmp_path: Path) -> None:
    pictures = noise(24, 8, 8, 3)
    cells: list[Pixels | bytes | None] = [*pictures]
    cells[0], cells[9], cells[23] = b"", b"text", None
    labels = [-1 if i == 15 else i % 3 for i in range(24)]
    write_hub(tmp_path / "a.parquet", cells[:13], labels[:13], group_rows=4)
    write_hub(tmp_path / "b.parquet", cells[13:], labels[13:], group_rows=4)
    images, index = loaded(tmp_path)
    kept = [i for i in range(24) if i not in (0, 9, 15, 23)]
    assert (last(images) == pictures[kept]).all()
    assert images.shape == (20, 3, 8, 8)
    assert index.manifest.label.tolist() == [i % 3 for i in kept]
    assert list(reasons(index)) == ["a.parquet#0", "a.parquet#9", "b.parquet#2", "b.parquet#10"]
    same(index, indexed(tmp_path))


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_readers_do_not_change_who_is_who(readers: int, tmp_path: Path) -> None:
    pictures = noise(60, 8, 8, 3)
    write_hub(tmp_path / "train.parquet", pictures[:40], group_rows=3)
    write_hub(tmp_path / "test.parquet", pictures[40:], group_rows=7)
    config = hub(tmp_path)
    images, index = load_memory(open_source(config), config, readers=readers)
    order = [
        int(name.partition("#")[2]) + 40 * name.startswith("test")
        for name in index.manifest.sample_id.tolist()
    ]
    assert sorted(order) == list(range(60))
    assert (last(images) == pictures[order]).all()
    same(index, index_here(opened(tmp_path), config, readers=1))


# --- pixels ---------------------------------------------------------------------------------------


def test_images_of_the_right_size_are_stored_as_published(tmp_path: Path) -> None:
    pictures = noise(5, 8, 8, 3)
    write_hub(tmp_path / "t.parquet", pictures)
    assert (last(loaded(tmp_path)[0]) == pictures).all()


def test_gray_becomes_rgb_and_rgb_becomes_gray(tmp_path: Path) -> None:
    gray, colour = noise(8, 8), noise(8, 8, 3, seed=1)
    write_hub(tmp_path / "t.parquet", [gray, colour])
    three, _ = loaded(tmp_path, channels=3)
    assert (three[0] == np.stack([gray] * 3)).all()
    one, _ = loaded(tmp_path, channels=1)
    assert one.shape == (2, 1, 8, 8)
    assert (one[0, 0] == gray).all()
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(one[1, 0], luma, atol=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "crop_pct"), [(32, 1.0), (32, 0.875), (57, 0.9), (140, 0.95)])
def test_pixels_are_those_of_timms_evaluation(
    channels: int, size: int, crop_pct: float, tmp_path: Path
) -> None:
    pictures = [photo(0), photo(1)[:, :60], noise(20, 31, 3), noise(size, size, 3)]
    write_hub(tmp_path / "t.parquet", pictures)
    keys: dict[str, Any] = {"image_size": size, "crop_pct": crop_pct, "channels": channels}
    images, _ = loaded(tmp_path, mean=0.2, std=0.7, **keys)
    timms = create_transform(
        (channels, size, size),
        is_training=False,
        interpolation="bicubic",
        crop_pct=crop_pct,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    mode = "RGB" if channels == 3 else "L"
    for stored, found in zip(pictures, images, strict=True):
        expected = timms(Image.fromarray(stored).convert(mode)).numpy() * 255
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_other_sizes_are_cropped_to_the_centre_and_scaled(tmp_path: Path) -> None:
    wide, tall, square = noise(8, 24, 3), noise(20, 8, 3, seed=1), noise(16, 16, 3, seed=2)
    write_hub(tmp_path / "t.parquet", [wide, tall, square])
    images = last(loaded(tmp_path)[0])
    assert (images[0] == wide[:, 8:16]).all()
    assert (images[1] == tall[6:14]).all()
    scaled = Image.fromarray(square).resize((8, 8), Image.Resampling.BICUBIC)
    assert (images[2] == np.asarray(scaled)).all()
    cut = np.asarray(Image.fromarray(square).resize((10, 10), Image.Resampling.BICUBIC))[1:9, 1:9]
    assert (last(loaded(tmp_path, crop_pct=0.8)[0])[2] == cut).all()


def test_the_files_kind_leaves_no_trace_in_pixels(tmp_path: Path) -> None:
    picture = noise(24, 40, 3)
    kinds = ["PNG", "BMP", "TIFF", "PPM"]
    write_hub(tmp_path / "t.parquet", [encoded(picture, kind) for kind in kinds])
    images, index = loaded(tmp_path, image_size=16)
    assert (images == images[0]).all()
    assert len(set(index.manifest.content.tolist())) == 1
