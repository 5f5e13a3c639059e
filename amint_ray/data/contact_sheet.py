"""A picture of a source: some images of each of some classes, framed by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from amint_ray.contracts import Role

_THUMBNAIL, _FRAME, _GAP, _TEXT = 96, 3, 4, 18
COLUMNS, ROWS = 10, 12
_KEY, _DRAWN_BY = "Software", "amint data"  # a PNG text chunk that tells our sheets from others
_COLOURS = {
    Role.MEMBER: "#0072b2",
    Role.WITHHELD: "#56b4e9",
    Role.EXTERNAL: "#d55e00",
    Role.CALIBRATION: "#f0e442",
    Role.TEST: "#009e73",
}


def contact_sheet(rows: Mapping[str, Sequence[tuple[Role, Image.Image]]]) -> Image.Image:
    """Draw the sheet.

    Args:
        rows: by class name, (role, RGB image) pairs; at most `ROWS` times `COLUMNS` are drawn.
    """
    cell = _THUMBNAIL + 2 * _FRAME
    columns = max(3, max((min(len(images), COLUMNS) for images in rows.values()), default=0))
    shown = list(rows.items())[:ROWS]
    width = _GAP + columns * (cell + _GAP)
    height = _TEXT + _GAP + len(shown) * (_TEXT + cell + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    left = _GAP
    for role, colour in _COLOURS.items():
        draw.rectangle((left, _GAP, left + 10, _GAP + 10), fill=colour)
        draw.text((left + 14, _GAP - 1), role.value, fill="black", font=font)
        left += 26 + int(draw.textlength(role.value, font=font))
    top = _TEXT + _GAP
    for name, images in shown:
        text = name.encode("latin-1", "replace").decode("latin-1")  # what the font has
        draw.text((_GAP, top), text[: width // 7], fill="black", font=font)
        for i, (role, image) in enumerate(images[:columns]):
            size = (_THUMBNAIL, _THUMBNAIL)
            small = ImageOps.pad(image, size, color="white")
            framed = ImageOps.expand(small, _FRAME, fill=_COLOURS[role])
            sheet.paste(framed, (_GAP + i * (cell + _GAP), top + _TEXT))
        top += _TEXT + cell + _GAP
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, marked as one.

    Raises:
        OSError: it cannot be written.
    """
    mark = PngInfo()
    mark.add_text(_KEY, _DRAWN_BY)
    sheet.save(path, "PNG", pnginfo=mark)


def may_be_replaced(path: Path) -> bool:
    """Whether nothing is at a path, or a sheet that was drawn here."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return bool(image.info.get(_KEY) == _DRAWN_BY)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, SyntaxError):  # Pillow on what is no image, or a damaged one
        return False
