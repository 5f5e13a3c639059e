"""Suspects like and unlike calibration: what must pass does, what must not does not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from amint_ray.audit.likeness import LIMIT, Likeness, Surroundings, composition

CLASSES, FEATURES = 4, 6


def activations(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """Images around their class's place, on axes of very different lengths."""
    centres = np.random.default_rng(9).normal(size=(CLASSES, FEATURES)) * 3
    scale = np.geomspace(0.01, 100, FEATURES)
    return ((centres[label] + rng.normal(size=(len(label), FEATURES))) * scale).astype(np.float32)


def likeness(suspects: np.ndarray, calibration: np.ndarray, *, confidence: float) -> Likeness:
    there = Surroundings(calibration)
    return there.compare(there.distance(suspects), confidence=confidence)


@pytest.fixture(scope="module")
def calibration() -> np.ndarray:
    rng = np.random.default_rng(0)
    return activations(rng, rng.integers(0, CLASSES, 150))


@pytest.mark.parametrize("classes", [range(CLASSES), [2], [0, 3]])
@pytest.mark.parametrize("n", [1, 30, 400])
def test_images_of_the_source_pass_whatever_their_classes(
    calibration: np.ndarray, classes: list[int], n: int
) -> None:
    rng = np.random.default_rng(n)
    suspects = activations(rng, rng.choice(classes, n))
    found = likeness(suspects, calibration, confidence=0.95)
    assert found.unlike is False
    if n > 100:
        assert found.effect.value == pytest.approx(0.5, abs=0.1)


def test_other_images_do_not_pass(calibration: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    own = activations(rng, rng.integers(0, CLASSES, 60))
    noise = rng.normal(size=own.shape) * calibration.std(axis=0) * 2
    for suspects in (own * -1.5, noise, own + 2 * calibration.std(axis=0)):
        found = likeness(suspects.astype(np.float32), calibration, confidence=0.95)
        assert found.unlike is True
        assert found.effect.low is not None
        assert found.effect.low > LIMIT
    # Also where only one axis of a hundredth of the others' length is another.
    small = own.copy()
    small[:, 0] += 6 * calibration[:, 0].std()
    assert likeness(small, calibration, confidence=0.95).unlike is True


def test_a_difference_must_be_both_large_and_no_chance(calibration: np.ndarray) -> None:
    rng = np.random.default_rng(7)
    own = activations(rng, rng.integers(0, CLASSES, 2000))
    slight = own + 0.3 * calibration.std(axis=0) * rng.normal(size=own.shape)
    found = likeness(slight.astype(np.float32), calibration, confidence=0.95)
    assert found.p_value is not None
    assert found.p_value < 0.01
    assert found.unlike is False
    far = [likeness(own[i : i + 1], calibration, confidence=0.95) for i in range(40)]
    assert any(each.effect.value > LIMIT for each in far)  # type: ignore[operator]
    assert not any(each.unlike for each in far if each.p_value > 0.01)  # type: ignore[operator]


def test_effect_and_p_value_by_brute_force(calibration: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    suspects = activations(rng, rng.integers(0, CLASSES, 9))
    scale = calibration.std(axis=0)
    a, b = suspects / scale, calibration / scale
    far = [min(np.linalg.norm(x - y) for y in b) for x in a]
    apart = [min(np.linalg.norm(b[i] - b[j]) for j in range(150) if j != i) for i in range(150)]
    above = np.mean([x > y for x in far for y in apart])
    assert likeness(suspects, calibration, confidence=0.95).effect.value == pytest.approx(above)


def test_a_feature_that_never_varies_does_no_harm(calibration: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    suspects = activations(rng, rng.integers(0, CLASSES, 50))
    padded = [np.pad(x, ((0, 0), (0, 1))) for x in (suspects, calibration)]
    expected = likeness(suspects, calibration, confidence=0.95)
    assert likeness(*padded, confidence=0.95) == expected


def test_without_enough_calibration_images_likeness_is_not_known(calibration: np.ndarray) -> None:
    for suspects, others in ((calibration, calibration[:9]), (calibration[:0], calibration)):
        found = likeness(suspects, others, confidence=0.95)
        assert (found.unlike, found.p_value, found.effect.value) == (None, None, None)


def test_class_shares_by_the_usual_test() -> None:
    rng = np.random.default_rng(4)
    for shares in ([0.25] * 4, [0.3, 0.3, 0.2, 0.2], [0.33, 0.33, 0.17, 0.17]):
        ours, theirs = rng.choice(4, 300, p=shares), rng.choice(4, 500)
        counts = np.stack([np.bincount(x, minlength=4) for x in (ours, theirs)])
        turned = composition(theirs, ours)
        assert turned.p_value == pytest.approx(composition(ours, theirs).p_value, abs=0.04)
        found = composition(ours, theirs)
        expected = chi2_contingency(counts, correction=False).pvalue
        assert found.p_value == pytest.approx(expected, abs=0.04)
        assert found.distance == pytest.approx(abs(counts[0] / 300 - counts[1] / 500).sum() / 2)


def test_classes_differ_where_they_do_and_not_where_most_have_no_image() -> None:
    rng = np.random.default_rng(5)
    calibration = rng.integers(0, 1000, 2000)
    sparse = composition(rng.integers(0, 1000, 100), calibration)
    assert sparse.distance > 0.8
    assert not sparse.differs
    heavy = np.where(rng.random(100) < 0.15, 7, rng.integers(0, 1000, 100))
    some = composition(heavy, calibration)
    assert some.differs
    assert some.distance > 0.8
    assert not some.far
    assert composition(np.full(8, 3), rng.integers(0, 10, 60)).far
    slight = composition(rng.choice(10, 9000, p=[0.14, *[0.86 / 9] * 9]), rng.integers(0, 10, 9000))
    assert slight.differs
    assert not slight.far
    assert not composition(np.zeros(5, int), np.zeros(9, int)).differs
    assert not composition(np.empty(0, int), np.zeros(9, int)).differs


def test_equal_shares_are_seldom_called_different() -> None:
    rng = np.random.default_rng(6)
    draws = [composition(rng.integers(0, 30, 40), rng.integers(0, 30, 90)) for _ in range(300)]
    assert sum(found.differs for found in draws) <= 10
