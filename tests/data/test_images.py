"""Decoding: each kind of file read right."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from image_files import (
    HEIGHT,
    WIDTH,
    Pixels,
    deep_values,
    eighth,
    encoded,
    gray,
    noise,
    palette_image,
    pixels,
    refusal,
    smooth,
)
from PIL import Image, ImageCms

from amint_ray.data.images import decode, encode_png, perceptual_hash

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# --- plain files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
        ("JPEG2000", {"irreversible": False}),
    ],
)
def test_lossless_rgb_is_exact(file_format: str, options: dict[str, Any]) -> None:
    picture = noise(HEIGHT, WIDTH, 3)
    assert (pixels(encoded(picture, file_format, **options)) == picture).all()


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "PPM", "TIFF"])
def test_gray_of_8_bits_is_exact(file_format: str) -> None:
    picture = noise(HEIGHT, WIDTH)
    assert (pixels(encoded(picture, file_format)) == gray(picture)).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_as_pillow_reads_it(options: dict[str, Any]) -> None:
    raw = encoded(smooth(), "JPEG", quality=95, **options)
    found = pixels(raw)
    assert (found == np.asarray(Image.open(io.BytesIO(raw)))).all()
    assert np.abs(found.astype(int) - smooth()).mean() < 3


def test_given_images_need_no_decoding() -> None:
    picture = noise(HEIGHT, WIDTH)
    given = Image.fromarray(picture)
    assert (pixels(given) == gray(picture)).all()
    colour = Image.fromarray(noise(HEIGHT, WIDTH, 3))
    assert (pixels(colour) == np.asarray(colour)).all()


# --- CMYK -----------------------------------------------------------------------------------------


def ink() -> Pixels:
    """(48, 64, 4) smooth shares of cyan, magenta, yellow and black, 255 for the most."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 3, y * 5, 200 - x - y, x + y], axis=-1).astype(np.uint8)


def printed(inks: Pixels) -> npt.NDArray[np.float64]:
    share = inks.astype(float) / 255
    return 255 * (1 - share[..., :3]) * (1 - share[..., 3:])


def adobe_segment(raw: bytes) -> slice:
    start = raw.index(b"\xff\xee\x00\x0eAdobe")
    return slice(start, start + 16)


def close(found: Pixels, expected: npt.NDArray[np.float64]) -> bool:
    return bool(np.abs(found - expected).mean() < 2 and np.abs(found - expected).max() < 12)


CMYK_OPTIONS = {"quality": 100, "subsampling": 0}


def test_cmyk_jpeg_of_adobes_kind_is_inverted() -> None:
    raw = encoded(Image.fromarray(ink(), "CMYK"), "JPEG", **CMYK_OPTIONS)
    assert raw[adobe_segment(raw)][-1] == 0, "no Adobe CMYK"
    assert close(pixels(raw), printed(ink()))


def test_cmyk_jpeg_without_adobes_mark_is_not_inverted() -> None:
    # Pillow's writer stores 255 − ink; to store ink, it is given the opposite.
    raw = encoded(Image.fromarray(255 - ink(), "CMYK"), "JPEG", **CMYK_OPTIONS)
    where = adobe_segment(raw)
    plain = raw[: where.start] + raw[where.stop :]
    assert close(pixels(plain), printed(ink()))


def test_ycck_jpeg() -> None:
    """Inks as RGB in YCbCr, black beside them; the segment's last byte says so."""
    inks = ink()
    turned = np.asarray(Image.fromarray(inks[..., :3], "RGB").convert("YCbCr"))
    stored = np.concatenate([turned, 255 - inks[..., 3:]], axis=-1)
    raw = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", **CMYK_OPTIONS))
    raw[adobe_segment(bytes(raw)).stop - 1] = 2
    assert close(pixels(bytes(raw)), printed(inks))


def test_cielab() -> None:
    pale = smooth() // 3 + 100  # within what both can express
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    turned = ImageCms.profileToProfile(Image.fromarray(pale), srgb, lab, outputMode="LAB")
    assert turned is not None and turned.mode == "LAB"
    assert close(pixels(encoded(turned, "TIFF")), pale.astype(float))


def test_cmyk_tiff_is_not_inverted() -> None:
    raw = encoded(Image.fromarray(ink(), "CMYK"), "TIFF")
    assert np.abs(pixels(raw) - printed(ink())).max() <= 1.01


# --- few bits, palettes, transparency -------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_one_bit(file_format: str) -> None:
    bits = noise(HEIGHT, WIDTH, below=2).astype(bool)
    raw = encoded(Image.fromarray(bits), file_format)
    assert (pixels(raw) == gray(bits * 255)).all()


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(file_format: str) -> None:
    image, colours = palette_image()
    assert (pixels(encoded(image, file_format)) == colours).all()


@pytest.mark.parametrize("transparency", [3, bytes([0, 255, 128, 0, 1, 2, 3])])
def test_transparent_palette_keeps_its_colours(transparency: int | bytes) -> None:
    image, colours = palette_image()
    raw = encoded(image, "PNG", transparency=transparency)
    assert "transparency" in Image.open(io.BytesIO(raw)).info
    assert (pixels(raw) == colours).all()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_dropped(file_format: str) -> None:
    picture = noise(HEIGHT, WIDTH, 4)
    picture[0, :, 3], picture[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    assert (pixels(encoded(picture, file_format, **options)) == picture[..., :3]).all()


def test_alpha_of_gray_is_dropped() -> None:
    picture = noise(HEIGHT, WIDTH, 2)
    raw = encoded(Image.fromarray(picture, "LA"), "PNG")
    assert (pixels(raw) == gray(picture[..., 0])).all()


# --- many bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_gray_of_16_bits_is_scaled_and_rounded(file_format: str) -> None:
    values = deep_values()
    found = pixels(encoded(Image.fromarray(values), file_format))
    assert (found == eighth(values)).all()
    assert found[0, :8, 0].tolist() == [0, 0, 1, 1, 1, 2, 254, 255]


def test_gray_of_16_bits_in_big_endian_tiff() -> None:
    values = deep_values()
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(">u2").tobytes())
    raw = encoded(image, "TIFF")
    assert raw[:2] == b"MM"
    assert (pixels(raw) == eighth(values)).all()


def packed_tiff(values: Any, *, bits: int, photometric: int) -> bytes:
    """An uncompressed gray TIFF of 12 or 16 bits, written by hand."""
    height, width = values.shape
    if bits == 16:
        strip = values.astype("<u2").tobytes()
    else:
        halves = values.reshape(-1, 2).astype(np.uint32)
        words = (halves[:, 0] << 12) | halves[:, 1]
        strip = b"".join(int(word).to_bytes(3, "big") for word in words)
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(strip)),
    ]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + directory + bytes(4)


def test_gray_tiffs_of_other_kinds() -> None:
    values = deep_values()
    assert (pixels(packed_tiff(values, bits=16, photometric=1)) == eighth(values)).all()
    # White is zero.
    assert (pixels(packed_tiff(values, bits=16, photometric=0)) == eighth(65535 - values)).all()
    twelve = values >> 4
    assert (pixels(packed_tiff(twelve, bits=12, photometric=1)) == eighth(twelve, 4095)).all()


def test_integers_beyond_16_bits_are_refused_and_never_clipped() -> None:
    values = deep_values().astype(np.int32)
    assert (pixels(encoded(Image.fromarray(values), "TIFF")) == eighth(values)).all()
    values[3, 3] = 65536
    assert "outside 0 to 65535" in refusal(encoded(Image.fromarray(values), "TIFF"))
    values[3, 3] = -1
    assert "-1 to" in refusal(encoded(Image.fromarray(values), "TIFF"))


def test_floating_point_within_0_and_1_only() -> None:
    values = (deep_values() / 65535).astype(np.float32)
    raw = encoded(Image.fromarray(values), "TIFF")
    assert Image.open(io.BytesIO(raw)).mode == "F"
    assert (pixels(raw) == gray(np.rint(values.astype(np.float64) * 255))).all()
    for wrong in (1.5, -0.25, np.nan, np.inf):
        values[4, 4] = wrong
        assert "floating-point pixels" in refusal(encoded(Image.fromarray(values), "TIFF"))


# --- animations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_animation_is_its_first_frame(file_format: str) -> None:
    frames = [Image.fromarray(gray(noise(HEIGHT, WIDTH, seed=seed))) for seed in range(3)]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    if file_format == "WEBP":
        options["lossless"] = True
    raw = encoded(frames[0], file_format, **options)
    assert getattr(Image.open(io.BytesIO(raw)), "n_frames", 1) == 3
    assert (pixels(raw) == np.asarray(frames[0])).all()


# --- hashing and encoding -------------------------------------------------------------------------


def reference_phash(image: Image.Image) -> int:
    """pHash from its definition: a plain DCT-II by cosines of the 32×32 gray image."""
    small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    k, n = np.mgrid[0:32, 0:32]
    cosines = 2 * np.cos(np.pi * k * (2 * n + 1) / 64)
    low = (cosines @ small @ cosines.T)[:8, :8]
    bits = "".join("1" if value > np.median(low) else "0" for value in low.reshape(-1))
    unsigned = int(bits, 2)
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


def test_perceptual_hash_is_phash() -> None:
    signs = set()
    for seed in range(6):
        image = Image.fromarray(noise(40, 50, 3, seed=seed))
        image = image.resize((200, 160), Image.Resampling.BICUBIC)
        found = perceptual_hash(image)
        assert found == reference_phash(image)
        assert np.int64(found) == found
        near = decode(encoded(image, "JPEG", quality=85), max_megapixels=1).resize((150, 120))
        assert ((found ^ perceptual_hash(near)) & (2**64 - 1)).bit_count() <= 6
        signs.add(found < 0)
    inverted = Image.fromarray(255 - np.asarray(image))
    assert ((found ^ perceptual_hash(inverted)) & (2**64 - 1)).bit_count() > 50


def test_encode_png_is_lossless() -> None:
    for picture in (noise(HEIGHT, WIDTH, 3), noise(HEIGHT, WIDTH)):
        raw = encode_png(Image.fromarray(picture))
        assert raw.startswith(b"\x89PNG")
        assert (np.asarray(Image.open(io.BytesIO(raw))) == picture).all()
