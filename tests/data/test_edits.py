"""Edits of suspects and fixed views, against NumPy's slices and Pillow by hand."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from amint_ray.attacks.evidence import EDITS, PLAIN
from amint_ray.data.edits import edited
from amint_ray.evaluation.views import VIEWS, view

SHAPES = [(3, 8, 8), (1, 8, 8), (2, 8, 8), (3, 20, 12)]
"""Channels, height, width."""


def noise(channels: int, height: int, width: int) -> torch.Tensor:
    random = np.random.default_rng(channels + height)
    return torch.from_numpy(random.integers(0, 256, (4, channels, height, width), dtype=np.uint8))


def smooth(channels: int, side: int) -> torch.Tensor:
    """A gradient, other in each channel: what a picture is to an encoder."""
    ramp = np.linspace(20, 230, side)
    across = [0.3 + 0.2 * channel for channel in range(channels)]
    planes = [ramp[:, None] * (1 - share) + share * ramp for share in across]
    return torch.from_numpy(np.stack(planes).astype(np.uint8)[None])


def pictures(image: npt.NDArray[np.uint8]) -> list[Image.Image]:
    """An image as Pillow takes it: RGB, or each channel for itself."""
    if len(image) == 3:
        return [Image.fromarray(image.transpose(1, 2, 0), "RGB")]
    return [Image.fromarray(channel, "L") for channel in image]


def channels_of(done: list[Image.Image]) -> npt.NDArray[np.uint8]:
    arrays = [np.asarray(each) for each in done]
    return arrays[0].transpose(2, 0, 1) if arrays[0].ndim == 3 else np.stack(arrays)


def through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    file.seek(0)
    return Image.open(file).copy()


@pytest.mark.parametrize("shape", SHAPES)
def test_moves_are_slices(shape: tuple[int, int, int]) -> None:
    images = noise(*shape)
    pixels = images.numpy()
    moved = {
        0: pixels,
        1: pixels[..., ::-1],
        2: np.concatenate([pixels[..., :1], pixels[..., :-1]], axis=3),
        3: np.concatenate([pixels[..., 1:], pixels[..., -1:]], axis=3),
        4: np.concatenate([pixels[:, :, :1], pixels[:, :, :-1]], axis=2),
        5: np.concatenate([pixels[:, :, 1:], pixels[:, :, -1:]], axis=2),
    }
    assert list(moved) == list(range(VIEWS))
    for number, expected in moved.items():
        np.testing.assert_array_equal(view(images, number).numpy(), expected)
    np.testing.assert_array_equal(edited(images, "flip").numpy(), moved[1])
    np.testing.assert_array_equal(edited(images, "shift_1").numpy(), moved[2])
    assert edited(images, PLAIN) is images


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quality", [90, 75, 50])
def test_jpeg_is_what_pillow_makes_of_each_image(shape: tuple[int, int, int], quality: int) -> None:
    images = noise(*shape)
    got = edited(images, f"jpeg_{quality}").numpy()
    for image, found in zip(images.numpy(), got, strict=True):
        done = [through_jpeg(each, quality) for each in pictures(image)]
        np.testing.assert_array_equal(found, channels_of(done))


@pytest.mark.parametrize("shape", SHAPES)
def test_resized_is_to_nine_tenths_and_back(shape: tuple[int, int, int]) -> None:
    images = noise(*shape)
    _, height, width = shape
    smaller = (round(0.9 * width), round(0.9 * height))
    got = edited(images, "resize_0.9").numpy()
    for image, found in zip(images.numpy(), got, strict=True):
        done = [
            each.resize(smaller, Image.Resampling.BICUBIC).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for each in pictures(image)
        ]
        np.testing.assert_array_equal(found, channels_of(done))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_edit_changes_pixels_and_little_else(channels: int) -> None:
    images = smooth(channels, 16)
    before = images.clone()
    for edit in EDITS:
        done = edited(images, edit)
        assert (done.shape, done.dtype) == (images.shape, torch.uint8), edit
        assert not torch.equal(done, images), edit
        if edit != "flip":
            difference = (done.int() - images.int()).abs().float().mean()
            assert difference < 16, edit
    assert torch.equal(images, before)


def test_the_coarser_the_encoding_the_more_is_lost() -> None:
    images = noise(3, 32, 32)
    lost = [
        float((edited(images, f"jpeg_{quality}").int() - images.int()).abs().float().mean())
        for quality in (90, 75, 50)
    ]
    assert lost == sorted(lost) and lost[0] < lost[-1]


def test_no_images_are_no_images() -> None:
    none = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    for edit in EDITS:
        assert edited(none, edit).shape == none.shape


def test_an_edit_of_another_name() -> None:
    with pytest.raises(ValueError, match="'crop' is no edit"):
        edited(noise(3, 8, 8), "crop")
