"""Image files of every kind, made from noise."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from amint_ray.data.images import BadImage, decode

Pixels = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 12, 18


def noise(*shape: int, seed: int = 0, below: int = 256, dtype: Any = np.uint8) -> Any:
    return np.random.default_rng(seed).integers(0, below, shape, dtype=dtype)


def smooth() -> Pixels:
    """(48, 64, 3): what JPEG keeps nearly as it is."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 4, y * 5, 255 - x * 2 - y], axis=-1).astype(np.uint8)


def encoded(image: Image.Image | Pixels, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(raw: bytes | Image.Image, max_megapixels: float = 178) -> Pixels:
    image = decode(raw, max_megapixels=max_megapixels)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(raw: bytes | Image.Image, max_megapixels: float = 178) -> str:
    with pytest.raises(BadImage) as caught:
        decode(raw, max_megapixels=max_megapixels)
    text = str(caught.value)
    assert text and len(text.splitlines()) == 1
    assert len(text) < 260
    assert "_io" not in text and "0x" not in text
    return text


def gray(values: Any) -> Pixels:
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def palette_image() -> tuple[Image.Image, Pixels]:
    """A palette image of 7 colours and its colours."""
    colours, index = noise(7, 3, seed=1), noise(HEIGHT, WIDTH, below=7)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    return image, colours[index]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def claiming(kind: str, width: int, height: int) -> bytes:
    """A few bytes whose header says this size."""
    if kind == "PNG":
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        data = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")
    if kind == "GIF":
        frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0) + b"\x08\x01\x00\x00;"
        return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame
    whole = bytearray(encoded(smooth(), "JPEG"))
    start = whole.index(b"\xff\xc0")
    whole[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(whole)


def deep_values() -> npt.NDArray[np.uint16]:
    values: npt.NDArray[np.uint16] = noise(HEIGHT, WIDTH, below=65536, dtype=np.uint16)
    values[0, :8] = [0, 128, 129, 257, 385, 386, 65406, 65535]  # around where rounding changes
    return values


def eighth(values: Any, white: int = 65535) -> Pixels:
    """Exact integer arithmetic: round(255 · value / white)."""
    return gray((np.asarray(values, np.int64) * 510 + white) // (2 * white))
