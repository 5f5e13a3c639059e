"""The contact sheet: as large as it must be, each image framed in its role's colour."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from amint_ray.contracts import Role
from amint_ray.data.contact_sheet import COLUMNS, ROWS, contact_sheet

BLACK = Image.new("RGB", (40, 40))
SIDE, FRAME, LEGEND = 96, 3, 20
AREA = (SIDE + 2 * FRAME) ** 2 - SIDE**2  # pixels of one frame


def coloured(sheet: Image.Image) -> dict[tuple[int, ...], int]:
    """Pixels of each colour that is no shade of gray."""
    found = sheet.getcolors(sheet.width * sheet.height)
    assert found is not None
    return {colour: n for n, colour in found if len(set(colour)) > 1}


def below_legend(sheet: Image.Image) -> Image.Image:
    return sheet.crop((0, LEGEND, sheet.width, sheet.height))


def colour_of(role: Role) -> tuple[int, ...]:
    found = coloured(below_legend(contact_sheet({"a": [(role, BLACK)]})))
    ((colour, pixels),) = found.items()
    assert pixels == AREA
    return colour


def test_each_role_has_a_colour_and_the_legend_shows_it() -> None:
    colours = {role: colour_of(role) for role in Role}
    for one, other in combinations(colours.values(), 2):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 60
    legend = coloured(contact_sheet({"a": []}).crop((0, 0, 300, LEGEND)))
    assert all(legend[colour] >= 100 for colour in colours.values())


@pytest.mark.parametrize(("classes", "images"), [(1, 1), (3, 5), (ROWS, COLUMNS)])
def test_frames_count_the_images_of_each_role(classes: int, images: int) -> None:
    generator = np.random.default_rng(classes)
    drawn = [[Role(r) for r in generator.choice(list(Role), images)] for _ in range(classes)]
    rows = {f"class {i}": [(role, BLACK) for role in roles] for i, roles in enumerate(drawn)}
    sheet = contact_sheet(rows)
    assert sheet.mode == "RGB"
    expected = {
        colour_of(role): n * AREA
        for role in Role
        if (n := sum(roles.count(role) for roles in drawn))
    }
    assert coloured(below_legend(sheet)) == expected
    cell = SIDE + 2 * FRAME
    assert max(3, images) * cell <= sheet.width <= max(3, images) * (cell + 10)
    assert classes * (cell + 10) <= sheet.height <= LEGEND + 10 + classes * (cell + 30)


def test_no_more_is_drawn_than_fits() -> None:
    most = contact_sheet({str(i): [(Role.TEST, BLACK)] * COLUMNS for i in range(ROWS)})
    more = contact_sheet({str(i): [(Role.TEST, BLACK)] * (COLUMNS + 4) for i in range(ROWS + 3)})
    assert more == most


def test_images_stand_in_order_and_are_not_distorted() -> None:
    wide = Image.new("RGB", (80, 20), "red")
    tall = Image.new("RGB", (30, 90), "blue")
    sheet = np.asarray(contact_sheet({"a": [(Role.TEST, wide), (Role.TEST, tall)]})).astype(int)
    red = np.argwhere((sheet == [255, 0, 0]).all(-1))
    blue = np.argwhere((sheet == [0, 0, 255]).all(-1))
    for found, (height, width) in ((red, (24, 96)), (blue, (96, 32))):
        assert (np.ptp(found, axis=0) + 1).tolist() == [height, width]
    assert red[:, 1].max() < blue[:, 1].min()


@pytest.mark.parametrize("name", ["", "кошка 猫", "x" * 500, "two\nlines", "\x00"])
def test_every_name_can_be_written(name: str) -> None:
    sheet = contact_sheet({name: [(Role.MEMBER, BLACK)], "other": []})
    assert coloured(below_legend(sheet)) == {colour_of(Role.MEMBER): AREA}
    assert sheet.size == contact_sheet({"a": [(Role.MEMBER, BLACK)], "other": []}).size


def test_nothing_to_draw_is_a_legend() -> None:
    assert len(coloured(contact_sheet({}))) >= len(Role)
