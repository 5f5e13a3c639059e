"""Ranks among calibration images: placements, conformal p-values, and the two-sample test.

An image that was not trained on is exchangeable with the calibration images, so its rank among them
is uniform. Where a collection has other classes than the calibration images, it is exchangeable
with those of the same class alone: `strata` are classes then, and only images of one stratum are
compared (Mondrian conformal prediction, Vovk et al. 2005; the stratified rank test, van Elteren
1960, here with each stratum's share of the suspects as weight).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtri

from amint_ray.audit.suspects import Mask, Whole
from amint_ray.evaluation.outputs import Scores

_EXACT_CELLS = 100_000
"""Pairs of a suspect and a calibration image up to which the null distribution is counted out."""
_FEW = 20
"""Images of the smaller side up to which ties are broken against the suspects."""
_EXACT_CELLS_OF_FEW = 1_000_000
"""Pairs up to which it is counted out where one side has so few, whose mean is not quite normal."""


@dataclass(frozen=True)
class Sample:
    """Images scored alike.

    Attributes:
        score: (n,) larger means "more likely trained on"; finite.
        stratum: (n,) what an image is compared within; all 0: with every other.
    """

    score: Scores
    stratum: Whole

    @classmethod
    def unstratified(cls, score: Scores) -> Sample:
        """All in one stratum."""
        return cls(score, np.zeros(len(score), np.int64))

    def __len__(self) -> int:
        return len(self.score)

    def kept(self, rows: Mask) -> Sample:
        """The rows where the mask is true."""
        return Sample(self.score[rows], self.stratum[rows])


@dataclass(frozen=True)
class Placed:
    """Where each of n images stands among the calibration images of its stratum.

    Attributes:
        share: (n,) of those below it, ties counted half; NaN where the stratum has none.
        p: (n,) conformal p-value, (1 + #{calibration ≥ score}) / (1 + #calibration); 1 where the
            stratum has none.
    """

    share: Scores
    p: Scores


def place(suspects: Sample, calibration: Sample) -> Placed:
    """Each suspect's place; in one stratum, `p` is `evaluation.calibration.p_values`."""
    values, at = np.unique(calibration.score, return_inverse=True)
    # Order by stratum, then by score, in one whole number each: one sorted array serves all strata.
    width = len(values) + 2
    ordered = np.sort(calibration.stratum * width + at + 1)
    low = np.searchsorted(values, suspects.score, side="left")
    high = np.searchsorted(values, suspects.score, side="right")
    base = suspects.stratum * width
    first = np.searchsorted(ordered, base)
    count = np.searchsorted(ordered, base + width) - first
    below = np.searchsorted(ordered, base + low + 1) - first
    not_above = np.searchsorted(ordered, base + high + 1) - first
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(count > 0, (below + not_above) / (2 * count), np.nan)
    return Placed(share, (1 + count - below) / (1 + count))


@dataclass(frozen=True)
class RankTest:
    """One-sided two-sample rank test of n suspects against calibration.

    Attributes:
        p_value: chance of so high a rank or a higher one where no suspect was trained on; None
            where nothing could be compared.
        mean_share: mean over the suspects of the share of calibration images below.
        compared: suspects whose stratum has calibration images.
        calibration: how many calibration images would give the same sampling error in one stratum.
    """

    p_value: float | None
    mean_share: float
    compared: int
    calibration: float


def rank_test(suspects: Sample, calibration: Sample) -> RankTest:
    """Mann and Whitney's test (Annals of Mathematical Statistics 18, 1947), ranks within strata.

    The calibration's own sampling error counts as much as the suspects'. In one stratum the null
    distribution is exact for up to 100,000 pairs, a million where one side has few images, and for
    a single suspect; ties are broken against the suspects where one side has few, which keeps it
    valid. Elsewhere it is the normal distribution with tie and continuity correction.
    """
    codes, n = np.unique(suspects.stratum, return_counts=True)
    at = np.minimum(np.searchsorted(codes, calibration.stratum), max(0, len(codes) - 1))
    matched = np.zeros(len(calibration), np.bool_)
    if len(codes):
        matched = codes[at] == calibration.stratum
    m = np.bincount(at[matched], minlength=len(codes))
    usable = m > 0
    if not usable.any():
        return RankTest(None, math.nan, 0, 0.0)
    ours = np.searchsorted(codes, suspects.stratum)
    among = usable[ours]
    stratum = np.concatenate([ours[among], at[matched]])
    score = np.concatenate([suspects.score[among], calibration.score[matched]])
    suspect = np.arange(len(score)) < among.sum()

    order = np.lexsort((score, stratum))
    of, value, suspect = stratum[order], score[order], suspect[order]
    starts = np.flatnonzero(np.r_[True, (of[1:] != of[:-1]) | (value[1:] != value[:-1])])
    size = np.diff(np.r_[starts, len(of)])
    first = np.searchsorted(of, np.arange(len(codes)))
    rank = np.repeat(starts + (size + 1) / 2, size) - first[of]
    with np.errstate(invalid="ignore", divide="ignore"):
        u = np.bincount(of[suspect], rank[suspect], len(codes)) - n * (n + 1) / 2
        mean_share = u / (n * m)
        tie = np.bincount(of[starts], size.astype(float) ** 3 - size, len(codes))
        both = n + m
        variance = ((both + 1) - tie / (both * (both - 1))) / (12.0 * n * m)
    n, m, mean_share, variance = (x[usable] for x in (n, m, mean_share, variance))
    weight = n / n.sum()
    statistic = float(weight @ mean_share)
    effective = 1 / float((weight**2 / m).sum())
    n_all = int(n.sum())
    tied = bool((size > 1).any())
    if len(n) == 1 and _counted_out(n_all, int(m[0])) and (not tied or min(n_all, m[0]) <= _FEW):
        strict = round(u[usable][0]) if not tied else _strictly_above(of, value, suspect, usable)
        p = float(exact_tail(n_all, int(m[0]))[strict])
    else:
        step = float((0.5 / (n_all * m)).min())
        spread = math.sqrt(float((weight**2) @ variance))
        excess = statistic - 0.5 - step
        # Of the logarithm, so that a p-value below 1e-300 is small and not 0.
        p = math.exp(float(log_ndtr(-excess / spread))) if spread > 0 else 1.0
    return RankTest(min(1.0, p), statistic, n_all, effective)


def _counted_out(n: int, m: int) -> bool:
    """Whether the null distribution is counted out for n suspects and m calibration images."""
    few = min(n, m)
    return few == 1 or n * m <= (_EXACT_CELLS_OF_FEW if few <= _FEW else _EXACT_CELLS)


def _strictly_above(of: Whole, value: Scores, suspect: Mask, usable: Mask) -> int:
    """Pairs in the one usable stratum whose suspect is above its calibration image, not level."""
    here = usable[of]
    calibration = np.sort(value[here & ~suspect])
    return int(np.searchsorted(calibration, value[here & suspect], side="left").sum())


@functools.lru_cache(maxsize=8)
def exact_tail(n: int, m: int) -> Scores:
    """P(U ≥ u) for u = 0 … n·m under the null, without ties.

    U's generating function is the Gaussian binomial, ∏ (1 − q^(m+i)) / (1 − q^i) for i = 1 … n
    (Andrews: The Theory of Partitions, 1976), here with every factor scaled to a distribution. Only
    the lower half is built, where nothing cancels; the upper is its mirror image.
    """
    few, many = min(n, m), max(n, m)
    size = n * m // 2 + 1
    p = np.zeros(size)
    p[0] = 1.0
    for i in range(1, few + 1):
        shift = many + i
        if shift < size:
            p[shift:] -= p[:-shift].copy()
        padded = np.concatenate([p, np.zeros(-size % i)])
        p = padded.reshape(-1, i).cumsum(axis=0).ravel()[:size] * (i / shift)
    whole = np.concatenate([p, p[: n * m + 1 - size][::-1]])
    # From the top, where the tail is small, so that it has all its digits.
    tail: Scores = np.minimum(1.0, whole[::-1].cumsum()[::-1])
    return tail


@functools.lru_cache(maxsize=1024)
def critical_share(n: int, m: float, alpha: float) -> float:
    """The smallest mean share of calibration images below at which `rank_test` gives p ≤ alpha.

    Args:
        n: suspects.
        m: calibration images.
        alpha: the level.

    Returns:
        Above 1 where no outcome reaches the level.
    """
    whole = int(m)
    if whole > 0 and _counted_out(n, whole):
        reached = np.flatnonzero(exact_tail.__wrapped__(n, whole) <= alpha)
        return float(reached[0]) / (n * whole) if len(reached) else math.inf
    spread = math.sqrt((n + m + 1) / (12 * n * m))
    return 0.5 - float(ndtri(alpha)) * spread + 0.5 / (n * m)
