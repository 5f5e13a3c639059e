"""Decoding: whatever a source gives for a row becomes RGB pixels, or a reason why it cannot."""

from __future__ import annotations

import functools
import io
import logging
import re
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

# No others: some of Pillow's readers start programs (EPS), or hide a size that is checked too late
# (ICO).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|BM|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6Ff]\s|....ftypavi[fs]|"
    rb"\0\0\0\x0cjP|\xff\x4f\xff\x51",
    re.DOTALL,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags
_OUT_OF_MEMORY = "out of memory"
_LONGEST_REASON = 200


class BadImage(Exception):  # noqa: N818 - a finding about data more than an error
    """An image that cannot be used; its text is the reason, in one line.

    Attributes:
        passing: whether another machine, or this one later, may find otherwise.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


def decode(raw: bytes | Image.Image, *, max_megapixels: float) -> Image.Image:
    """An image as RGB at its own size, EXIF rotation applied.

    Of an animation it is the first frame. Transparency is dropped, as `convert("RGB")` does: what
    colour a transparent pixel has is its file's affair. Colour profiles are not applied. Gray of 16
    bits is scaled to 8, rounded (65535 becomes 255); floating-point gray must lie within 0 to 1.

    Args:
        raw: an encoded file, or an image that needs no decoding.
        max_megapixels: a larger image is refused by what its header says, before anything is
            allocated for it.

    Raises:
        BadImage: it is empty, damaged, too large, or no image of a kind that is read here (JPEG,
            PNG, GIF, BMP, WebP, TIFF, PNM, AVIF, JPEG 2000).
    """
    try:
        image = raw if isinstance(raw, Image.Image) else _open(raw)
        width, height = image.size
        if width * height > max_megapixels * 1e6:
            raise BadImage(
                f"is too large: {width}×{height} pixels, data.max_megapixels allows "
                f"{max_megapixels:g} million"
            )
        if width * height == 0:
            raise BadImage(f"has no pixels ({width}×{height})")
        image.load()
        turn = _turn(image)
        rgb = _rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except BadImage:
        raise
    except Exception as error:  # hostile bytes make Pillow raise nearly anything
        # Some of its decoders say so in words.
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY in str(error):
            raise BadImage("needs more memory than there is", passing=True) from None
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error


def perceptual_hash(image: Image.Image) -> int:
    """The 64 bits of pHash (signs of the lowest DCT coefficients), as a signed 64-bit integer."""
    import imagehash  # brings SciPy's transforms along, which decoding alone does not need

    bits = np.packbits(imagehash.phash(image).hash.reshape(-1))
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def encode_png(image: Image.Image) -> bytes:
    """The same pixels as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ours that this Pillow knows, once it has been told what it is used for.

    That can be told for the whole process only, since `warnings.catch_warnings` is not safe among
    threads: so it is done for those who decode, once, and not for whoever imports this.
    """
    # Pillow's own limit would warn below ours, or refuse what `data.max_megapixels` allows; the
    # size is compared here, before anything is decoded.
    Image.MAX_IMAGE_PIXELS = None
    # What it remarks on odd metadata says nothing of the pixels and would end on the user's screen.
    warnings.filterwarnings("ignore", module=r"PIL\.", category=UserWarning)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(encoded: bytes) -> Image.Image:
    if not encoded:
        raise BadImage("is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(encoded), formats=_formats())
    except UnidentifiedImageError:
        if _MAGIC.match(encoded):
            reason = "cannot be decoded: its header is damaged, cut short or of an unknown variant"
        else:
            reason = f"is not an image: it begins with {encoded[:12]!r}"
        raise BadImage(reason) from None


def _reason(error: Exception) -> str:
    """An error's text as one line, without the addresses of objects."""
    text = re.sub(r"\s*<_io\.[^>]*>", "", " ".join(str(error).split()))
    return (text or type(error).__name__)[:_LONGEST_REASON]


def _rgb(image: Image.Image) -> Image.Image:
    """The same pixels in RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow inverts every CMYK JPEG, but only Adobe's store ink as 255 − ink.
        image = ImageChops.invert(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(height, width) gray of an image with one deeper channel."""
    deep: npt.NDArray[Any] = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (deep.min() >= 0 and deep.max() <= 1):  # said so that NaN fails, too
            raise BadImage("has floating-point pixels outside 0 to 1")
        return np.rint(deep * np.float32(255)).astype(np.uint8)
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # TIFF has 12, too
    white = 2 ** min(bits, 16) - 1
    if deep.min() < 0 or deep.max() > white:
        raise BadImage(f"has pixels of {deep.min()} to {deep.max()}, outside 0 to {white}")
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow heeds it for 8 bits only
        deep = white - deep.astype(np.int64)
    gray: npt.NDArray[np.uint8] = np.rint(deep * (255 / white)).astype(np.uint8)
    return gray


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What its EXIF data ask for; damaged EXIF data ask for nothing."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # anything, like in decoding
        return None
