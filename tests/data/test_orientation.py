"""EXIF orientation: every image upright, as the standard defines it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from image_files import (
    HEIGHT,
    WIDTH,
    Pixels,
    deep_values,
    eighth,
    encoded,
    exif,
    noise,
    pixels,
    smooth,
)
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LOSSLESS = {"lossless": True}
# What turns the stored pixels upright, by the EXIF standard's definition of each value.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),  # clockwise
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_each_orientation(file_format: str, options: dict[str, Any], orientation: int) -> None:
    stored = noise(HEIGHT, WIDTH, 3)
    raw = encoded(stored, file_format, exif=exif(orientation), **options)
    assert (pixels(raw) == UPRIGHT[orientation](stored)).all()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_each_orientation_of_a_jpeg(orientation: int) -> None:
    raw = encoded(smooth(), "JPEG", exif=exif(orientation), quality=95)
    stored = np.asarray(Image.open(io.BytesIO(encoded(smooth(), "JPEG", quality=95))))
    assert (pixels(raw) == UPRIGHT[orientation](stored)).all()


def test_orientation_of_deep_gray() -> None:
    raw = encoded(Image.fromarray(deep_values()), "PNG", exif=exif(6))
    assert (pixels(raw) == UPRIGHT[6](eighth(deep_values()))).all()


@pytest.mark.parametrize("value", [0, 9, 77])
def test_unknown_orientation_turns_nothing(value: int) -> None:
    stored = noise(HEIGHT, WIDTH, 3)
    assert (pixels(encoded(stored, "PNG", exif=exif(value))) == stored).all()


@pytest.mark.parametrize("junk", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"junk" * 9])
def test_damaged_exif_does_not_cost_the_image(junk: bytes) -> None:
    stored = noise(HEIGHT, WIDTH, 3)
    assert (pixels(encoded(stored, "PNG", exif=junk)) == stored).all()
