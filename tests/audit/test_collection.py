"""Share and power: against brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from amint_ray.audit.collection import (
    images_for_power,
    power_at,
    power_curve,
    share_error,
    share_of,
    telling,
)
from amint_ray.audit.ranks import Sample, critical_share, place
from amint_ray.evaluation.metrics import Interval

plain = Sample.unstratified


def shares(rng: np.random.Generator, k: int, m: int, shift: float) -> tuple[np.ndarray, Sample]:
    """Known images' shares of m calibration images, and these."""
    calibration = plain(rng.normal(size=m))
    return place(plain(rng.normal(size=k) + shift), calibration).share, calibration


@pytest.mark.parametrize("mean_share", [0.3, 0.5, 0.62, 0.8, 0.97])
@pytest.mark.parametrize(("n", "m"), [(6, 200), (80, 50)])
def test_the_interval_holds_each_share_that_what_was_seen_is_compatible_with(
    mean_share: float, n: int, m: int
) -> None:
    known, _ = shares(np.random.default_rng(0), 150, m, 1.2)
    found = share_of(mean_share, known, suspects=n, calibration=m, confidence=0.95)
    theta, k = known.mean(), len(known)
    spread = (known.var() * k + (theta - 0.5) ** 2) / (k + 1)
    compatible = []
    for pi in np.linspace(0, 1, 2001):
        mean = 0.5 + pi * (theta - 0.5)
        of_one = pi * (spread + theta**2) + (1 - pi) / 3 - mean**2
        variance = of_one / n + pi**2 * spread / k + (1 - pi) ** 2 / (12 * m)
        if abs(mean_share - mean) <= 1.959964 * math.sqrt(variance):
            compatible.append(pi)
    value = min(1, max(0, (mean_share - 0.5) / (theta - 0.5)))
    assert found.value == pytest.approx(value)
    low, high = (compatible[0], compatible[-1]) if compatible else (value, value)
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)


def test_no_share_where_the_score_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    for known in (shares(rng, 200, 300, 0.0)[0] * 0.9, np.empty(0)):
        found = share_of(0.7, known, suspects=50, calibration=300, confidence=0.95)
        assert found.value is None
        assert found.note
    known, _ = shares(rng, 200, 300, 2.0)
    assert share_of(0.7, known, suspects=0, calibration=300, confidence=0.95).value is None


def test_a_share_that_excludes_nothing_is_not_told() -> None:
    nothing = telling(Interval(0.88, 0.0, 1.0))
    assert (nothing.value, nothing.note) == (None, "too few suspects to tell")
    for some in (Interval(0.88, 0.1, 1.0), Interval(0.2, 0.0, 0.9), Interval.unknown("why")):
        assert telling(some) == some


def test_the_error_of_the_share_falls_with_suspects_and_calibration() -> None:
    known, _ = shares(np.random.default_rng(0), 200, 300, 1.5)
    few = share_error(0.5, known, suspects=20, calibration=100)
    assert share_error(0.5, known, suspects=200, calibration=100) < few
    assert share_error(0.5, known, suspects=20, calibration=1000) < few
    assert share_error(0.5, 1 - known, suspects=20, calibration=100) == math.inf


@pytest.mark.parametrize("shift", [0.4, 1.0, 3.0])
def test_the_collection_that_is_named_would_be_noticed(shift: float) -> None:
    """With fresh images such as the known ones; fewer are noticed less surely."""
    rng = np.random.default_rng(3)
    known, calibration = shares(rng, 5000, 400, shift)
    n = images_for_power(known, calibration=400, alpha=0.01, target=0.95)
    assert n is not None
    rates = []
    for size in (n, n - max(1, n // 5)):
        drawn = place(plain(rng.normal(size=1000 * size) + shift), calibration).share
        needed = critical_share(size, 400, 0.01)  # where the test begins to reject
        rates.append(np.mean(drawn.reshape(1000, size).mean(axis=1) >= needed - 1e-9))
    error = math.sqrt(0.05 * 0.95 / 1000)
    assert 0.95 - 4 * error <= rates[0]
    assert rates[1] < 0.95


def test_power_curve_agrees_with_theory_where_the_mean_is_normal() -> None:
    known, _ = shares(np.random.default_rng(0), 2000, 300, 0.5)
    curve = power_curve(known, calibration=300, alpha=0.01)
    assert 0.3 < curve[39] < 0.9
    for n in (20, 30, 40, 64):
        theory = power_at(n, known, calibration=300, alpha=0.01)
        assert curve[n - 1] == pytest.approx(theory, abs=0.03)


def test_there_may_be_no_collection_that_would_be_noticed() -> None:
    # Too few calibration images: their own error hides what is there.
    known, _ = shares(np.random.default_rng(0), 500, 12, 0.2)
    assert images_for_power(known, calibration=12, alpha=0.01, target=0.95) is None
    assert images_for_power(np.empty(0), calibration=99, alpha=0.01, target=0.95) is None
    assert images_for_power(1 - known, calibration=12, alpha=0.01, target=0.95) is None
    # One image above all of m calibration images has p = 1 / (m + 1).
    assert images_for_power(np.ones(20), calibration=99, alpha=0.01, target=0.95) == 1
    assert images_for_power(np.ones(20), calibration=90, alpha=0.01, target=0.95) == 2


def test_ten_known_images_above_all_others_do_not_make_the_eleventh_certain() -> None:
    few, many = (
        share_of(0.95, np.ones(k), suspects=400, calibration=2000, confidence=0.95)
        for k in (10, 10_000)
    )
    assert few.low is not None
    assert many.low is not None
    assert few.high == 1
    assert many.high is not None
    assert many.high < 0.93
    assert few.low < many.low
