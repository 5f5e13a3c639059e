"""The blind classifiers find what was planted, and nothing where the split is random."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from amint_ray.contracts import Role
from amint_ray.evaluation import confounders
from amint_ray.evaluation.confounders import check_confounders
from amint_ray.evaluation.metrics import auc

Images = npt.NDArray[np.uint8]
DETECTORS = ("pixel_statistics", "small_network")


def photos(n: int, *, seed: int = 0, channels: int = 3, side: int = 16) -> Images:
    """Smooth noise around a brightness of its own; in many images some of it is cut at 0 or 255."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.normal(size=(n, channels, side, side)), (0, 0, 1.5, 1.5))
    grain = rng.normal(0, 3, noise.shape)
    brightness, contrast = rng.uniform(70, 190, (n, 1, 1, 1)), rng.uniform(150, 450, (n, 1, 1, 1))
    return np.clip(brightness + contrast * noise + grain, 0, 255).astype(np.uint8)


def digits(seed: int) -> Images:
    """All 1,797 of scikit-learn's 8×8 digits, shuffled: neighbours have one writer."""
    images = (load_digits().images * 255 / 16).astype(np.uint8)[:, None]
    return np.random.default_rng(seed).permutation(images)


def brightened(images: Images, levels: int) -> Images:
    return np.clip(images.astype(int) + levels, 0, 255).astype(np.uint8)


def with_bright_pixel(images: Images, levels: int = 40) -> Images:
    images = images.copy()
    images[:, 0, 5, 9] = brightened(images[:, 0, 5, 9], levels)
    return images


def check(
    member: Images, test: Images, external: Images | None = None, **options: Any
) -> dict[str, Any]:
    images = {Role.MEMBER: member, Role.TEST: test}
    if external is not None:
        images[Role.EXTERNAL] = external
    return check_confounders(images, **{"confidence": 0.95, **options})


def limits(found: dict[str, Any]) -> tuple[float, float, float]:
    assert set(found) == {"value", "low", "high"}
    return found["value"], found["low"], found["high"]


# --- what was planted is found --------------------------------------------------------------------


@pytest.mark.parametrize("images", [photos(600), digits(0)[:600]], ids=["photos", "digits"])
def test_one_grey_level_on_every_member_is_found(images: Images) -> None:
    found = check(brightened(images[:300], 1), images[300:])
    assert found["clean"] is False
    comparison = found["comparisons"]["member_vs_test"]
    assert comparison["confounded"] is True
    assert comparison["classifiers"]["pixel_statistics"]["value"] > 0.8
    assert comparison["classifiers"]["pixel_statistics"]["low"] > 0.7


def test_one_bright_pixel_is_found_by_the_network() -> None:
    images = photos(800, seed=1)
    found = check(with_bright_pixel(images[:400]), images[400:])["comparisons"]["member_vs_test"]
    assert found["confounded"] is True
    assert found["auc"] == found["classifiers"]["small_network"]  # the larger of the two
    assert found["auc"]["low"] > 0.8
    assert found["classifiers"]["pixel_statistics"]["value"] < 0.7


def test_one_bright_pixel_of_a_large_image_survives_the_way_down() -> None:
    images = photos(160, seed=2, channels=1, side=96)
    small = confounders._with_high_pass(images[:3, :, :, :80])
    assert small.shape == (3, 64, 64, 2)
    assert small[..., 0].mean() == pytest.approx(16 * images[:3, 0, :, :80].mean(), rel=0.01)
    found = check(with_bright_pixel(images[:80], 60), images[80:])["comparisons"]["member_vs_test"]
    assert found["classifiers"]["small_network"]["low"] > 0.7


def test_the_map_is_the_laplacian() -> None:
    image = np.full((1, 1, 5, 6), 7, np.uint8)
    image[0, 0, 2, 3] = 9
    both = confounders._with_high_pass(image)
    assert both.shape == (1, 5, 6, 2)
    assert (both[0, :, :, 0] == 16 * image[0, 0].astype(int)).all()
    assert both[0, 2, 3, 1] == 8
    assert [both[0, y, x, 1] for y, x in ((1, 3), (3, 3), (2, 2), (2, 4))] == [-2] * 4
    assert np.count_nonzero(both[..., 1]) == 5  # and nothing at the border


def test_external_images_of_another_kind_are_found_as_such() -> None:
    images = photos(600, seed=3)
    external = gaussian_filter(photos(200, seed=4).astype(float), (0, 0, 0.5, 0.5)).astype(np.uint8)
    found = check(images[:200], images[200:], external)
    assert found["clean"] is False
    assert found["comparisons"]["external_vs_test"]["confounded"] is True
    assert found["comparisons"]["member_vs_test"]["confounded"] is False
    for detector in DETECTORS:
        assert found["comparisons"]["external_vs_test"]["classifiers"][detector]["low"] > 0.5


# --- a random split is clean ----------------------------------------------------------------------


def test_random_splits_are_clean() -> None:
    """Expected at most 0.25 of 10 confounded; the AUCs scatter around a half on both sides."""
    values, confounded = [], 0
    for seed in range(10):
        images = digits(seed)[:480]
        found = check(images[:120], images[120:360], images[360:], seed=seed)
        confounded += found["clean"] is False
        for comparison in found["comparisons"].values():
            for classifier in comparison["classifiers"].values():
                value, low, high = limits(classifier)
                assert low < value < high
                values.append(value)
    assert confounded <= 1
    assert abs(np.mean(values) - 0.5) < 0.02
    assert 0.3 < np.mean(np.array(values) > 0.5) < 0.7


def test_copies_in_a_role_are_not_recognised() -> None:
    """Three copies of each image: they count once, else every one would be known by the others."""
    images = digits(3)[:160]
    found = check(np.repeat(images[:80], 3, axis=0), np.repeat(images[80:], 3, axis=0))
    assert found == check(images[:80], images[80:])
    assert found["comparisons"]["member_vs_test"]["n_positives"] == 80
    assert found["clean"] is True


def test_no_image_is_scored_by_a_classifier_that_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []

    def memory(inputs: Any, positive: Any, held: Any, seed: int) -> Any:
        known = {image.tobytes(): truth for image, truth in zip(inputs, positive, strict=True)}
        for image in inputs[held]:
            del known[image.tobytes()]
        scored.extend(image.tobytes() for image in inputs[held])
        return np.array([float(known.get(image.tobytes(), 0.5)) for image in inputs[held]])

    monkeypatch.setattr(confounders, "_DETECTORS", {"memory": (lambda images: images, memory)})
    images = digits(4)[:200]
    found = check(images[:90], images[90:])["comparisons"]["member_vs_test"]
    assert found["auc"]["value"] == 0.5
    assert sorted(scored) == sorted(image.tobytes() for image in images)  # and each of them once


# --- intervals ------------------------------------------------------------------------------------


def test_limits_are_the_mean_of_the_halves_at_bonferronis_confidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halves = []

    def brightness(inputs: Any, positive: Any, held: Any, seed: int) -> Any:
        scores = inputs[held].mean(axis=(1, 2, 3))
        halves.append((scores[positive[held]], scores[~positive[held]]))
        return scores

    detectors = {"a": (lambda images: images, brightness), "b": (lambda images: images, brightness)}
    monkeypatch.setattr(confounders, "_DETECTORS", detectors)
    images = photos(160, seed=5)
    found = check(images[:60], images[60:110], images[110:], confidence=0.9)
    assert found["confidence"] == 0.9
    assert found["interval_confidence"] == pytest.approx(0.975)  # 2 detectors, 2 comparisons
    first = [auc(*half, confidence=0.975) for half in halves[:2]]
    expected = [np.mean([getattr(a, key) for a in first]) for key in ("value", "low", "high")]
    got = found["comparisons"]["member_vs_test"]["classifiers"]["a"]
    assert limits(got) == pytest.approx(expected)
    assert [len(positives) for positives, _ in halves[:2]] == [30, 30]

    alone = check(images[:60], images[60:110], confidence=0.9)
    assert alone["interval_confidence"] == pytest.approx(0.95)  # 2 detectors, 1 comparison
    assert alone["comparisons"]["member_vs_test"]["auc"]["low"] > got["low"]


# --- what cannot be compared ----------------------------------------------------------------------


def test_absent_and_tiny_roles_are_unknown_and_not_confounded() -> None:
    images = digits(5)[:160]
    copies = np.repeat(images[:19], 10, axis=0)
    for external, n in ((None, 0), (images[:0], 0), (copies, 19)):
        found = check(images[:60], images[60:], external)
        assert found["clean"] is True
        comparison = found["comparisons"]["external_vs_test"]
        note = f"{n} distinct external images, 20 needed"
        unknown = {"value": None, "low": None, "high": None, "note": note}
        assert comparison == {
            "auc": unknown,
            "confounded": False,
            "n_positives": n,
            "n_negatives": 100,
            "classifiers": dict.fromkeys(DETECTORS, unknown),
        }
        assert found["interval_confidence"] == pytest.approx(0.975)
        assert found["comparisons"]["member_vs_test"]["n_positives"] == 60


def test_nothing_to_compare_is_neither_clean_nor_confounded() -> None:
    images = digits(6)[:100]
    for roles in ({}, {Role.MEMBER: images}, {Role.MEMBER: images, Role.TEST: images[:5]}):
        found = check_confounders(roles, confidence=0.95)
        assert found["clean"] is None
        for comparison in found["comparisons"].values():
            assert comparison["confounded"] is False
            assert comparison["auc"]["value"] is None
    note = found["comparisons"]["member_vs_test"]["auc"]["note"]
    assert note == "5 distinct test images, 20 needed"


@pytest.mark.parametrize("shape", [(20, 1, 1, 1), (24, 2, 1, 9), (20, 1, 3, 70)])
def test_odd_shapes_are_looked_at(shape: tuple[int, ...]) -> None:
    images = np.zeros((2, *shape), np.uint8)
    images[:, :, 0, 0, 0] = 3 * np.arange(shape[0])
    images[0, :, 0, 0, 0] += 1
    found = check(*images)["comparisons"]["member_vs_test"]
    assert (found["n_positives"], found["n_negatives"]) == (shape[0], shape[0])
    assert limits(found["auc"])


def test_mistakes_are_told() -> None:
    images = digits(7)[:100]
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match="between 0 and 1"):
            check(images[:50], images[50:], confidence=confidence)
    for wrong in (images[50:, 0], images[50:].astype(np.float32), images[50:, :, 1:]):
        with pytest.raises(ValueError, match="uint8"):
            check(images[:50], wrong)  # type: ignore[arg-type]


# --- nothing but the images and the seed decides --------------------------------------------------


def test_same_answer_whatever_the_order() -> None:
    images = photos(240, seed=6)
    found = check(images[:80], images[80:160], images[160:])
    shuffle = np.random.default_rng(0).permutation
    again = check(shuffle(images[:80]), shuffle(images[80:160]), shuffle(images[160:]))
    assert again == found
    assert check(images[:80], images[80:160], images[160:], seed=1) != found


def test_other_roles_play_no_part() -> None:
    images = digits(8)[:160]
    roles = {Role.MEMBER: images[:60], Role.TEST: images[60:120]}
    more = roles | {Role.WITHHELD: images[120:], Role.CALIBRATION: images[120:]}
    assert check_confounders(more, confidence=0.95) == check_confounders(roles, confidence=0.95)


def test_a_seeded_choice_is_used_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confounders, "MOST_IMAGES", 50)
    images = digits(9)[:400]
    chosen = [confounders._choose(images, seed) for seed in (0, 0, 1)]
    assert (chosen[0] == chosen[1]).all()
    assert not (chosen[0] == chosen[2]).all()
    found = check(images[:200], images[200:])["comparisons"]["member_vs_test"]
    assert (found["n_positives"], found["n_negatives"]) == (50, 50)


def test_the_generators_of_others_and_their_threads_are_left_alone() -> None:
    def state() -> tuple[Any, ...]:
        legacy: Any = np.random.get_state()
        of_torch = torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled()
        return random.getstate(), legacy[1].tolist(), legacy[2:], *of_torch

    images, found = digits(10)[:100], []
    for seed in (5, 6):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            before = state()
            found.append(check(images[:50], images[50:]))
            assert state() == before
    assert found[0] == found[1]
