"""p-values and thresholds: by brute force, as one decision, and valid under the null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from amint_ray.evaluation.calibration import benjamini_hochberg, p_values, threshold_at

ALPHAS = (0.001, 0.01, 0.05, 0.1, 0.15, 0.25, 1 / 3, 0.5, 0.7, 0.95)


@pytest.mark.parametrize("levels", [3, 20, 10**9])
def test_p_values_by_brute_force(levels: int) -> None:
    rng = np.random.default_rng(levels)
    calibration = rng.integers(0, levels, 37).astype(float)
    scores = np.r_[rng.integers(-1, levels + 1, 50).astype(float), calibration, -np.inf, np.inf]
    expected = [(1 + sum(c >= s for c in calibration)) / 38 for s in scores]
    assert p_values(scores, calibration).tolist() == expected


def test_p_values_do_not_depend_on_the_order_of_calibration() -> None:
    calibration = np.array([3.0, 1.0, 2.0])
    assert p_values(np.array([2.5, 0.0, 2.0, 4.0]), calibration).tolist() == [0.5, 1, 0.75, 0.25]
    assert calibration.tolist() == [3.0, 1.0, 2.0]  # left as it was


def test_threshold_and_p_value_are_one_decision() -> None:
    rng = np.random.default_rng(0)
    decided = {True: 0, False: 0}
    for n in range(1, 60):
        calibration = rng.integers(0, 12, n).astype(float)
        scores = rng.integers(-1, 14, 30) + rng.choice([0.0, 0.5], 30)
        for alpha in (*ALPHAS, *(k / (n + 1) for k in range(1, n + 1))):
            accused = p_values(scores, calibration) <= alpha
            threshold = threshold_at(alpha, calibration)
            if threshold is None:
                assert not accused.any()
                assert alpha < 1 / (n + 1)
            else:
                assert ((scores > threshold) == accused).all()
            for answer in (True, False):
                decided[answer] += int((accused == answer).sum())
    assert min(decided.values()) > 10_000  # both answers were put to the test


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.25])
def test_threshold_exists_from_one_over_alpha_minus_one_on(alpha: float) -> None:
    enough = round(1 / alpha) - 1
    scores = np.arange(enough, dtype=float)
    assert threshold_at(alpha, scores) == scores.max()
    assert threshold_at(alpha, scores[1:]) is None
    assert threshold_at(alpha, np.empty(0)) is None


def simulate(*, decimals: int, n: int = 99, repetitions: int = 20_000) -> np.ndarray:
    """p-values of suspects that are exchangeable with their calibration images."""
    scores = np.random.default_rng(4).normal(size=(repetitions, n + 1)).round(decimals)
    return np.array([p_values(row[:1], row[1:])[0] for row in scores])


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_p_values_are_uniform_under_the_null(alpha: float) -> None:
    """Every α here is a multiple of 1/(n + 1), where P(p ≤ α) = α exactly."""
    p = simulate(decimals=12)
    error = 4 * math.sqrt(alpha * (1 - alpha) / len(p))
    assert abs((p <= alpha).mean() - alpha) < error


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.5])
def test_p_values_stay_valid_with_ties(alpha: float) -> None:
    p = simulate(decimals=0)
    rate = (p <= alpha).mean()
    assert rate <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / len(p))
    assert (p <= 0.5).any()  # and not because nobody is ever accused


@pytest.mark.parametrize("n", [1, 7, 200])
def test_benjamini_hochberg_by_scipy(n: int) -> None:
    """Where adjusted p-values are at most the rate, hypotheses are rejected."""
    rng = np.random.default_rng(n)
    for fdr in (0.01, 0.1, 0.5):
        for _ in range(20):
            p = rng.random(n) ** rng.choice([1, 4])
            expected = false_discovery_control(p) <= fdr
            assert benjamini_hochberg(p, fdr).tolist() == expected.tolist()


def test_benjamini_hochberg_of_nothing_and_of_what_is_not_known() -> None:
    assert benjamini_hochberg(np.empty(0), 0.1).shape == (0,)
    assert benjamini_hochberg(np.array([np.nan, 0.04, np.nan]), 0.05).tolist() == [0, 1, 0]
    assert benjamini_hochberg(np.array([0.04, 1.0]), 0.05).tolist() == [0, 0]
    # The level but for the last digit, as a multiple of 1/(m + 1) may be.
    assert benjamini_hochberg(np.array([np.nextafter(0.05, 1)]), 0.05).tolist() == [1]
