"""The paired difference of two AUCs: its value, its interval against resampling, its edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from amint_ray.evaluation import metrics


def pair(
    rng: np.random.Generator, m: int, n: int, *, shift_a: float, shift_b: float, common: float
) -> list[np.ndarray]:
    """Two scores of the same samples, correlated by what they have in common."""
    shared = [rng.normal(size=m), rng.normal(size=n)]
    found = []
    for shift in (shift_a, shift_b):
        for part, moved in zip(shared, (shift, 0.0), strict=True):
            own = rng.normal(size=len(part))
            found.append(moved + common**0.5 * part + (1 - common) ** 0.5 * own)
    return found


def area(positives: np.ndarray, negatives: np.ndarray) -> float:
    above, equal = positives[:, None] > negatives, positives[:, None] == negatives
    return float((above + 0.5 * equal).mean())


def test_value_and_sign() -> None:
    scores = pair(np.random.default_rng(0), 40, 60, shift_a=1.0, shift_b=0.3, common=0.5)
    scores = [np.round(values, 1) for values in scores]  # with ties
    got = metrics.auc_difference(*scores, confidence=0.95)
    assert got.value == pytest.approx(area(*scores[:2]) - area(*scores[2:]), abs=1e-12)
    back = metrics.auc_difference(*scores[2:], *scores[:2], confidence=0.95)
    assert [back.low, back.high] == pytest.approx([-got.high, -got.low])


def test_width_is_that_of_a_bootstrap_over_samples() -> None:
    rng = np.random.default_rng(1)
    a, x, b, y = pair(rng, 150, 250, shift_a=0.9, shift_b=0.4, common=0.7)
    got = metrics.auc_difference(a, x, b, y, confidence=0.95)
    differences = []
    for _ in range(400):
        i, j = rng.integers(0, 150, 150), rng.integers(0, 250, 250)
        differences.append(area(a[i], x[j]) - area(b[i], y[j]))
    width = 2 * 1.96 * np.std(differences)
    assert got.high - got.low == pytest.approx(width, rel=0.15)
    apart = [metrics.auc(*each, confidence=0.95) for each in ((a, x), (b, y))]
    unpaired = np.hypot(*(each.high - each.low for each in apart))
    assert got.high - got.low < 0.75 * unpaired  # pairing is worth something here


@pytest.mark.parametrize(
    ("shift_a", "shift_b", "common"), [(0.5, 0.5, 0.8), (1.5, 0.6, 0.3), (3.2, 2.6, 0.5)]
)
def test_coverage(shift_a: float, shift_b: float, common: float) -> None:
    rng = np.random.default_rng(2)
    truth = norm.cdf(shift_a / 2**0.5) - norm.cdf(shift_b / 2**0.5)
    covered = 0
    for _ in range(400):
        scores = pair(rng, 60, 80, shift_a=shift_a, shift_b=shift_b, common=common)
        got = metrics.auc_difference(*scores, confidence=0.95)
        covered += got.low <= truth <= got.high
    assert covered >= 400 * 0.92


def test_two_perfect_scores_may_still_differ() -> None:
    high, low = np.arange(100, 130.0), np.arange(50.0)
    got = metrics.auc_difference(high, low, high + 1, low, confidence=0.95)
    assert got.value == 0 and got.low < -0.01 and got.high > 0.01


def test_one_score_twice_differs_by_nothing() -> None:
    rng = np.random.default_rng(3)
    a, x = rng.normal(0.5, 1, 50), rng.normal(size=50)
    got = metrics.auc_difference(a, x, a, x, confidence=0.95)
    assert (got.value, got.low, got.high) == (0, 0, 0)


def test_what_cannot_be_compared() -> None:
    one, two = np.zeros(1), np.zeros(2)
    assert metrics.auc_difference(one, two, one, two, confidence=0.95).value is None
    with pytest.raises(ValueError, match="same samples"):
        metrics.auc_difference(two, two, one, two, confidence=0.95)
