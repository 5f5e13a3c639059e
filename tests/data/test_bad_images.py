"""Images that cannot be used: refused with a reason, whatever is wrong with them."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from image_files import claiming, encoded, noise, pixels, refusal
from PIL import Image

from amint_ray.data.images import BadImage, decode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_empty_and_text() -> None:
    assert refusal(b"") == "is empty (0 bytes)"
    assert refusal(b"hello, world, this is text") == (
        "is not an image: it begins with b'hello, world'"
    )
    assert "begins with b'<html>'" in refusal(b"<html>")


def test_other_kinds_start_no_program() -> None:
    """Pillow hands EPS to Ghostscript."""
    assert "not an image" in refusal(encoded(noise(8, 8, 3), "EPS"))
    assert "not an image" in refusal(encoded(noise(16, 16, 3), "ICO"))


WHOLE = {
    "PNG": encoded(noise(64, 64, 3), "PNG"),
    "JPEG": encoded(noise(64, 64, 3), "JPEG"),
    "GIF": encoded(noise(64, 64), "GIF"),
    "BMP": encoded(noise(64, 64, 3), "BMP"),
    "WEBP": encoded(noise(64, 64, 3), "WEBP"),
    "TIFF": encoded(noise(64, 64, 3), "TIFF"),
    "LZW": encoded(noise(64, 64, 3), "TIFF", compression="tiff_lzw"),
    "PPM": encoded(noise(64, 64, 3), "PPM"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_truncated(kind: str) -> None:
    whole = WHOLE[kind]
    assert pixels(whole).shape == (64, 64, 3)
    for kept in (len(whole) // 2, len(whole) - 200, 20):
        text = refusal(whole[:kept])
        assert text.startswith("cannot be decoded: "), text


def test_damaged_chunk() -> None:
    whole = WHOLE["PNG"]
    start = whole.index(b"IDAT")
    assert "cannot be decoded" in refusal(whole[: start + 40] + b"\0" * 40 + whole[start + 80 :])
    long = whole[: start - 4] + (5).to_bytes(4, "big") + whole[start:]
    assert "cannot be decoded" in refusal(long)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG"])
def test_bomb_is_refused_by_its_header(kind: str) -> None:
    text = refusal(claiming(kind, 20_000, 20_000))
    assert text == "is too large: 20000×20000 pixels, data.max_megapixels allows 178 million"
    # Pillow's own limits are 89 (a warning) and 179 million: ours alone counts.
    assert "too large" in refusal(claiming(kind, 10_000, 10_000), max_megapixels=99.9)
    assert "cannot be decoded" in refusal(claiming("PNG", 20_000, 10_000), max_megapixels=201)


def test_limit_is_exact_and_holds_for_given_images() -> None:
    picture = noise(100, 100, 3)
    assert pixels(encoded(picture, "PNG"), max_megapixels=0.01).shape == (100, 100, 3)
    assert "too large: 100×100" in refusal(encoded(picture, "PNG"), max_megapixels=0.0099)
    assert "too large" in refusal(Image.fromarray(picture), max_megapixels=0.0099)


def test_no_pixels() -> None:
    assert "no pixels (0×5)" in refusal(Image.new("RGB", (0, 5)))
    assert "cannot be decoded" in refusal(claiming("PNG", 0, 5))


@pytest.mark.parametrize(
    "error", [struct.error("x"), OverflowError(), RecursionError(), EOFError(), KeyError("a\nb")]
)
def test_whatever_pillow_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", broken)
    assert refusal(WHOLE["PNG"]).startswith("cannot be decoded: ")


def test_reason_is_one_line_without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("cannot read <_io.BytesIO object at 0x7f2d>\n  for  a reason")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", broken)
    assert refusal(WHOLE["PNG"]) == "cannot be decoded: cannot read for a reason"


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", full)
    assert refusal(WHOLE["PNG"]) == "needs more memory than there is"


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (MemoryError(), True),
        (OSError("out of memory when reading image file"), True),
        (OSError("broken data stream when reading image file"), False),
    ],
)
def test_want_of_memory_may_pass(
    error: Exception, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
    with pytest.raises(BadImage) as caught:
        decode(WHOLE["PNG"], max_megapixels=1)
    assert caught.value.passing == passing


def test_whoever_imports_is_left_alone() -> None:
    """What is told to Pillow holds for the whole process, and so for other users of it."""
    code = """
import logging, warnings, numpy
from PIL import Image
before = Image.MAX_IMAGE_PIXELS, list(warnings.filters), logging.getLogger("PIL").level
import amint_ray.data.images as images
assert before == (Image.MAX_IMAGE_PIXELS, list(warnings.filters), logging.getLogger("PIL").level)
images.decode(images.encode_png(Image.new("RGB", (3, 3))), max_megapixels=1)
assert Image.MAX_IMAGE_PIXELS is None
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_random_damage_raises_nothing_else() -> None:
    generator = random.Random(0)
    for whole in WHOLE.values():
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(generator.choice([1, 8])):
                # Headers are more telling than pixels.
                at = generator.randrange(generator.choice([40, 400, len(whole)]))
                damaged[at % len(whole)] = generator.randrange(256)
            try:
                decode(bytes(damaged), max_megapixels=1)
            except BadImage as error:
                assert "\n" not in str(error)


def test_nothing_reaches_the_screen() -> None:
    """Pillow's warnings, its limit's too, and what it logs."""
    code = """
import io, logging, sys
import numpy as np
from PIL import Image
from amint_ray.data.images import BadImage, decode
import image_files as t
image, _ = t.palette_image()
t.pixels(t.encoded(image, "PNG", transparency=bytes([0, 255, 128])))
t.refusal(t.claiming("PNG", 10_000, 10_000))
stored = t.encoded(t.noise(8, 8, 3), "JPEG", exif=t.exif(6))
t.pixels(stored.replace(b"\\x12\\x01\\x03\\x00\\x01", b"\\x12\\x01\\x04\\x00\\xff"))
samples = t.encoded(t.noise(8, 8, 3), "TIFF")
at = samples.index(b"\\x15\\x01\\x03\\x00")
try:
    decode(samples[: at + 8] + b"\\xff\\xff" + samples[at + 10 :], max_megapixels=1)
except BadImage:
    print("refused", end="")
"""
    root = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert (done.stdout, done.stderr) == ("refused", "")
