"""What a whole collection says: the size that would be noticed, and the share of training images.

Both need to know where images that did train the model stand among the calibration images: the
*known* ones of the stored reference. No suspect is ever taken for one.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr, ndtri

from amint_ray.audit.ranks import critical_share
from amint_ray.evaluation.metrics import Interval
from amint_ray.evaluation.outputs import Scores

_SIMULATED = 64
"""Suspects up to which power is simulated; their mean is nearly normal beyond."""
_RESAMPLES = 4000
_LARGEST = 1 << 24


def power_curve(known: Scores, *, calibration: float, alpha: float) -> Scores:
    """Chance that 1, 2, … 64 images such as the known ones are noticed by `rank_test`.

    By resampling the known ones, seeded, with these very calibration images.

    Args:
        known: (k,) shares of calibration images below images that were trained on.
        calibration: calibration images that they are compared with.
        alpha: level of the test.
    """
    draws = np.random.default_rng(0).choice(known, (_RESAMPLES, _SIMULATED))
    sizes = np.arange(1, _SIMULATED + 1)
    means = draws.cumsum(axis=1) / sizes
    needed = np.array([critical_share(n, calibration, alpha) for n in sizes.tolist()])
    noticed: Scores = (means >= needed - 1e-9).mean(axis=0)
    return noticed


def power_at(n: int, known: Scores, *, calibration: float, alpha: float) -> float:
    """The same for n suspects, their mean share taken as normal; right where n is large.

    Φ((θ − c) √n / σ), θ and σ being mean and standard deviation of the known ones' shares and c
    the smallest mean share that the test calls significant.
    """
    needed = critical_share(n, calibration, alpha)
    distance, spread = float(known.mean()) - needed, float(known.std())
    if spread == 0:
        return float(distance >= 0)
    return float(ndtr(distance * math.sqrt(n) / spread))


def images_for_power(
    known: Scores, *, calibration: float, alpha: float, target: float
) -> int | None:
    """The smallest collection of images such as the known ones that would be noticed.

    Args:
        known: (k,) shares of calibration images below images that were trained on.
        calibration: calibration images that they are compared with.
        alpha: level of the test.
        target: how surely.

    Returns:
        None where no collection would be, however large: the calibration images are too few, or the
        score tells too little; or where nothing is known.
    """
    if len(known) == 0 or calibration < 1:
        return None

    def enough(n: int) -> bool:
        return power_at(n, known, calibration=calibration, alpha=alpha) >= target

    small = power_curve(known, calibration=calibration, alpha=alpha) >= target
    if small[-1]:
        short = np.flatnonzero(~small)
        return int(short[-1]) + 2 if len(short) else 1
    low, high = _SIMULATED, 2 * _SIMULATED
    while not enough(high):
        low, high = high, 2 * high
        if high > _LARGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def share_error(share: float, known: Scores, *, suspects: int, calibration: float) -> float:
    """Standard error of the estimated share of training images, if it truly is `share`.

    Args:
        share: π.
        known: (k,) shares of calibration images below images that were trained on.
        suspects: how many are asked about.
        calibration: calibration images that they are compared with.
    """
    c0, c1, c2 = _variance(known, suspects, calibration)
    gain = float(known.mean()) - 0.5
    return math.sqrt(c0 + c1 * share + c2 * share**2) / gain if gain > 0 else math.inf


def share_of(
    mean_share: float, known: Scores, *, suspects: int, calibration: float, confidence: float
) -> Interval:
    """The share π of training images among the suspects, where these are such as the known ones.

    The suspects' mean share of calibration images below is ½ + π (θ − ½) then, θ being the known
    ones', which gives π. The interval holds every π with which what was seen is compatible: it
    inverts the score test, as Fieller (Journal of the Royal Statistical Society B 16, 1954) does
    for a ratio. Under π the variance is known from the mixture, from the known ones' number, and
    from the calibration's, which counts against the (1 − π) alone that are no training images:

    [π E(u²) + (1 − π)/3 − (½ + π (θ − ½))²] / n + π² Var(u) / k + (1 − π)² / 12 m

    Args:
        mean_share: over the suspects.
        known: (k,) u, the known ones' shares.
        suspects: n.
        calibration: m.
        confidence: of the interval.

    Returns:
        Within 0 and 1; unknown where the score does not tell the known ones from calibration.
    """
    if suspects == 0 or calibration < 1:
        return Interval.unknown("no suspect could be compared")
    if len(known) < 2:
        return Interval.unknown("no images are known that the model was trained on")
    gain = float(known.mean()) - 0.5
    z = float(ndtri((1 + confidence) / 2))
    # Where one cannot even tell that the known ones are more than calibration, nor can a share be.
    if gain <= z * math.sqrt(float(known.var()) / len(known) + 1 / (12 * calibration)):
        return Interval.unknown("training images are not told from others by this score")
    excess = mean_share - 0.5
    c0, c1, c2 = _variance(known, suspects, calibration)
    # (excess − π gain)² ≤ z² (c0 + c1 π + c2 π²)
    a = gain**2 - z**2 * c2
    b = -2 * excess * gain - z**2 * c1
    c = excess**2 - z**2 * c0
    value = min(1.0, max(0.0, excess / gain))
    root = b**2 - 4 * a * c
    if a <= 0:  # what lies within is not bounded: nothing is excluded
        return Interval(value, 0.0, 1.0)
    half = math.sqrt(max(0.0, root)) / (2 * a)
    low, high = -b / (2 * a) - half, -b / (2 * a) + half
    return Interval(value, min(value, max(0.0, low)), max(value, min(1.0, high)))


def telling(share: Interval) -> Interval:
    """The share, or unknown where its interval excludes nothing: a figure would say too much."""
    if share.low is None or share.high is None or share.low > 0 or share.high < 1:
        return share
    return Interval.unknown("too few suspects to tell")


def _variance(known: Scores, suspects: int, calibration: float) -> tuple[float, float, float]:
    """Of the mean share minus what π predicts: coefficients of 1, π and π²."""
    theta, k = float(known.mean()), len(known)
    # One more known image in the middle: where all so far are above all calibration images, the
    # next need not be.
    spread = (float(known.var()) * k + (theta - 0.5) ** 2) / (k + 1)
    gain = theta - 0.5
    n, m = suspects, calibration
    c0 = (1 / 3 - 1 / 4) / n + 1 / (12 * m)
    c1 = (spread + theta**2 - 1 / 3 - gain) / n - 1 / (6 * m)
    c2 = -(gain**2) / n + spread / k + 1 / (12 * m)
    return c0, c1, c2
