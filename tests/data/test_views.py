"""What the task and the head see of an image: D and E alike, and the same from the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_source import SIDE, Set, assert_same_batches, config_of, picture

from amint_ray.config.data_schema import Data
from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, UserError
from amint_ray.data import reading
from amint_ray.data.transforms import Views, crop_and_flip

SET = Set(
    [7, 12, 5, 9, 13, 8, 8, 12, 11, 6, 10, 14, 9, 13], {"member": 50, "withheld": 8, "external": 60}
)
FLIP_ALONE = {"scale": [1, 1], "ratio": [1, 1], "color_jitter": None, "hflip": 0.5}
RANDAUGMENT = {"auto_augment": "rand-m9-mstd0.5"}


def config(views: str, augment: str = "timm", **data: Any) -> Config:
    return config_of(data={"augment": augment, **data}, mint={"views": views})


def timms(channels: int = 3, **options: Any) -> Data:
    values = {"augment": "timm", "image_size": options.pop("image_size", SIDE)}
    return Data.model_validate({**values, "channels": channels, "augment_options": options})


def kinds(of: Config, batch: Batch) -> Iterator[tuple[str, int, torch.Tensor]]:
    """`task`, `plain` or `external`, the picture's number and its pixels, row by row."""
    pixels = (batch.images * of.data.std + of.data.mean).mul(255).round().byte()
    first_e = len(pixels) - int((batch.membership == 0).sum())
    for row, name in enumerate(batch.sample_id.tolist()):
        kind = "task" if row < batch.n_task else "plain" if row < first_e else "external"
        yield kind, int(name[1:]), pixels[row]


# --- D and E --------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ["plain", "task"])
@pytest.mark.parametrize("augment", ["timm", "crop_flip", "none"])
def test_each_kind_of_row_is_made_by_the_transform_it_should_be(
    views: str, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls themselves: what is asked of timm for images of D, and for those of E."""
    calls: list[tuple[str, str]] = []
    seeds: list[int] = []
    number = {np.asarray(picture(i)).tobytes(): i for i in range(len(SET.role))}

    class Watched(Views):
        def plain(self, rgb: Image.Image) -> torch.Tensor:
            calls.append(("plain", SET.role[number[np.asarray(rgb).tobytes()]]))
            return super().plain(rgb)

        def task(self, rgb: Image.Image, seed: int) -> torch.Tensor:
            calls.append(("task", SET.role[number[np.asarray(rgb).tobytes()]]))
            seeds.append(seed)
            return super().task(rgb, seed)

    monkeypatch.setattr(reading, "Views", Watched)
    once = {"data": {"augment": augment}, "mint": {"views": views}, "train": {"epochs": 1}}
    list(SET.here(config_of(**once)).train_batches(0))
    # As many rows of E as of D, so E is not seen in full.
    of_d = {"member": "D", "withheld": "D"}
    counts = Counter((kind, of_d.get(role, role)) for kind, role in calls)
    if augment != "timm":
        assert counts == {("plain", "D"): 58, ("plain", "external"): 58}
    elif views == "plain":
        assert counts == {("task", "D"): 58, ("plain", "D"): 58, ("plain", "external"): 58}
    else:
        assert counts == {("task", "D"): 58, ("task", "external"): 58}
    assert len(set(seeds)) == len(seeds)  # each image has a draw of its own


@pytest.mark.parametrize("augment", ["timm", "crop_flip"])
@pytest.mark.parametrize("views", ["plain", "task"])
def test_rows_for_the_head_are_plain_or_the_tasks_own(augment: str, views: str) -> None:
    """By their pixels."""
    of = config(views, augment)
    plain = SET.plain(of)
    as_scored: Counter[tuple[str, bool]] = Counter()
    for epoch in range(2):
        for batch in SET.here(of, readers=2).train_batches(epoch):
            for kind, number, pixels in kinds(of, batch):
                as_scored[kind, torch.equal(pixels, plain[number])] += 1
    if views == "plain":
        assert as_scored["plain", True] == as_scored["external", True] == 2 * 58
        assert as_scored["plain", False] == as_scored["external", False] == 0
    else:
        assert as_scored["plain", True] + as_scored["plain", False] == 0
        assert as_scored["external", False] >= 80
    assert as_scored["task", False] >= 80  # of 116; a small image may be cropped to what it was


def test_timm_turns_d_and_e_as_often() -> None:
    """With flips alone each row is the image or its mirror image."""
    of = config("task", augment_options=FLIP_ALONE)
    still = Views(timms(**{**FLIP_ALONE, "hflip": 0.0}))
    image = [still.task(picture(number), 0) for number in range(len(SET.role))]
    flipped: dict[str, list[bool]] = {"task": [], "external": []}
    for epoch in range(3):
        for batch in SET.here(of).train_batches(epoch):
            for kind, number, pixels in kinds(of, batch):
                turned = torch.equal(pixels, image[number].flip(2))
                assert turned or torch.equal(pixels, image[number])
                flipped[kind].append(turned)
    for rows in flipped.values():
        assert len(rows) == 3 * 58
        assert np.mean(rows) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("views", ["plain", "task"])
def test_crop_flip_moves_d_and_where_it_should_e(views: str) -> None:
    of = config(views, "crop_flip")
    plain = SET.plain(of)
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    variants = [(*shift, flip) for shift in shifts for flip in (False, True)]
    seen: dict[str, Counter[tuple[int, int, bool]]] = {
        kind: Counter() for kind in ("task", "plain", "external")
    }
    for epoch in range(3):
        for batch in SET.here(of).train_batches(epoch):
            for kind, number, pixels in kinds(of, batch):
                moved = crop_and_flip(
                    plain[number].expand(18, -1, -1, -1),
                    shift=torch.tensor([v[:2] for v in variants]),
                    flip=torch.tensor([v[2] for v in variants]),
                )
                (fitting,) = (moved == pixels).flatten(1).all(1).nonzero().flatten().tolist()
                seen[kind][variants[fitting]] += 1
    still = Counter({(0, 0, False): 3 * 58})
    assert len(seen["task"]) == 18
    assert max(seen["task"].values()) < 30  # ten on average
    if views == "plain":
        assert seen["plain"] == seen["external"] == still
    else:
        assert not seen["plain"]
        assert len(seen["external"]) == 18
        assert max(seen["external"].values()) < 30


def test_without_mint_d_is_augmented_and_nothing_else_is_read() -> None:
    of = config_of(data={"augment": "timm"}, loss={"lambda_mint": 0.0})
    joint = config_of(data={"augment": "timm"})
    for alone, both in zip(
        SET.here(of).train_batches(1), SET.here(joint).train_batches(1), strict=True
    ):
        assert len(alone.images) == alone.n_task == both.n_task
        assert torch.equal(alone.images, both.images[: both.n_task])


@pytest.mark.parametrize("augment", ["timm", "crop_flip"])
def test_scoring_is_never_augmented(augment: str) -> None:
    of = config("task", augment)
    plain, seen = SET.plain(of), 0
    for batch in SET.here(of, readers=2).score_batches(list(Role)):
        pixels = (batch.images * of.data.std + of.data.mean).mul(255).round().byte()
        numbers = [int(name[1:]) for name in batch.sample_id]
        assert torch.equal(pixels, plain[numbers])
        seen += len(numbers)
    assert seen == len(SET.role)


# --- seeds ----------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    RANDAUGMENT,
    {"auto_augment": "augmix-m3"},
    {"auto_augment": "original"},
    {"auto_augment": "3a"},
    {"grayscale_prob": 0.5, "gaussian_blur_prob": 0.5, "vflip": 0.5, "interpolation": "random"},
]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_image_with_the_same_seed_is_the_same_view(
    options: dict[str, Any], channels: int
) -> None:
    """Whatever was drawn before, by whomever."""
    views = Views(timms(channels, image_size=32, **options))
    rgb = picture(1).resize((40, 40))
    first = [views.task(rgb, seed) for seed in range(20)]
    assert first[0].shape == (channels, 32, 32)
    assert first[0].dtype == torch.uint8
    for seed in reversed(range(20)):
        torch.rand(seed)
        random.random()
        np.random.rand(seed + 1)
        views.plain(rgb)
        assert torch.equal(views.task(rgb, seed), first[seed]), seed
    assert len({view.numpy().tobytes() for view in first}) >= 15


def test_the_plain_view_draws_nothing() -> None:
    views = Views(timms(**RANDAUGMENT))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one, two = views.plain(picture(3)), views.plain(picture(3))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize("views", ["plain", "task"])
def test_an_augmented_batch_is_the_same_for_any_readers_and_after_a_resume(views: str) -> None:
    of = config(views, augment_options=RANDAUGMENT)
    whole = list(SET.here(of).train_batches(1))
    assert_same_batches(list(SET.here(of, readers=3).train_batches(1)), whole)
    assert_same_batches(list(SET.here(of, readers=2).train_batches(1, first_step=2)), whole[2:])


def test_views_differ_between_epochs_and_runs() -> None:
    found = []
    for seed, epoch in ((5, 0), (5, 1), (6, 0)):
        of = config_of(data={"augment": "timm"}, train={"seed": seed}, mint={"views": "task"})
        rows = [row for batch in SET.here(of).train_batches(epoch) for row in kinds(of, batch)]
        found.append({(kind, n): pixels for kind, n, pixels in rows})
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = found[one].keys() & found[other].keys()
        same = sum(torch.equal(found[one][key], found[other][key]) for key in both)
        assert len(both) > 100
        assert same < 0.1 * len(both)


# --- options --------------------------------------------------------------------------------------

STILL = {"scale": [1, 1], "ratio": [1, 1], "color_jitter": None, "hflip": 0.0}


@pytest.mark.parametrize(
    "option",
    [
        {"hflip": 1.0},
        {"vflip": 1.0},
        {"color_jitter": 0.9},
        {"grayscale_prob": 1.0},
        {"scale": [0.1, 0.2]},
        {"re_prob": 1.0},
        RANDAUGMENT,
    ],
    ids=str,
)
def test_an_option_does_something_or_is_refused(option: dict[str, Any]) -> None:
    square = picture(0).resize((SIDE, SIDE))
    still = Views(timms(**STILL)).task(square, 0)
    assert torch.equal(still, Views(timms(**STILL)).plain(square))
    try:
        views = Views(timms(**{**STILL, **option}))
    except UserError as error:
        assert next(iter(option)) in str(error)
        return
    assert any(not torch.equal(views.task(square, seed), still) for seed in range(5))


@pytest.mark.parametrize(
    "options",
    [
        {"no_such_option": 1},
        {"normalize": True},
        {"auto_augment": "no-such-policy"},
        {"train_crop_mode": "none"},
        {"interpolation": "no-such"},
    ],
    ids=str,
)
def test_options_that_do_not_suit_timm_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.augment_options") as caught:
        Views(timms(**options))
    assert len(str(caught.value).splitlines()) == 1
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop_pct", [1.0, 0.5])
def test_the_plain_view_is_the_middle_of_the_shorter_side(channels: int, crop_pct: float) -> None:
    data = Data.model_validate({"image_size": 8, "channels": channels, "crop_pct": crop_pct})
    side = int(8 / crop_pct)
    tall = picture(5).resize((side, 2 * side))
    got = Views(data).plain(tall)
    top, left = (2 * side - 8) // 2, (side - 8) // 2
    middle = tall.crop((left, top, left + 8, top + 8)).convert("L" if channels == 1 else "RGB")
    expected = np.asarray(middle).reshape(8, 8, channels).transpose(2, 0, 1)
    assert got.numpy().tolist() == expected.tolist()
