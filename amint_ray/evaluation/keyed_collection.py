"""What the keyed codes of a whole collection say: exact p-values, its power, the share of members.

Weak memories add up: where no image's code convicts by itself, the sum over many may. Under the
null (`keyed.py`) the codes of different contents are independent, so the distribution of the sum is
known, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len
from scipy.optimize import brentq
from scipy.special import betainc, expit, ndtr

from amint_ray.evaluation.keyed import (
    LEVELS,
    Code,
    Counts,
    Logits,
    Scores,
    checked,
    matches,
    on_grid,
    soft_p_values,
)
from amint_ray.evaluation.keyed_rates import match_rate
from amint_ray.evaluation.metrics import Interval

_SMALLEST = float(np.finfo(np.float64).tiny)
_GRID_FROM = 0.999
_NATS = 45.0  # e^−45 < 3e-20: what lies outside of the window counts for nothing
_MOST_RESAMPLES, _FEWEST_RESAMPLES, _DRAWS = 1000, 100, 1_000_000
_HALVINGS = 40
_FEW_BITS, _CLOSE = 128, 2


@dataclass(frozen=True)
class Collection:
    """What the codes of a collection say against "none of these images trained the head".

    Attributes:
        images: different contents; what occurs twice is counted once.
        bits: k × images.
        matched: bits that match.
        match_rate: matched / bits.
        p_hard: exact p-value of `matched`, all bits alike.
        p_soft: exact p-value of the matches weighted by how sure the head is of each.
        p_image: the smallest p-value of an image, times their number (Bonferroni).
    """

    images: int
    bits: int
    matched: int
    match_rate: float
    p_hard: float
    p_soft: float
    p_image: float

    @property
    def p_value(self) -> float:
        """min(1, 2 · min(p_soft, p_image)).

        Many images that are remembered faintly are found by the sum, a few among many strangers by
        themselves.
        """
        return min(1.0, 2 * min(self.p_soft, self.p_image))


def collection_test(logits: Logits, code: Code, content: Sequence[bytes]) -> Collection:
    """Test whether a collection as a whole knows its codes better than by chance.

    Images of one content have one code: they are one witness, with the mean of their logits, which
    depends on no code.

    `p_hard` is P(M ≥ m) with M ~ Binomial(n·k, ½). `p_soft` is P(T' ≥ T) with T = Σ_i Σ_j
    w_ij·1[bit j of image i matches], the weights |z_ij| on a grid of whole numbers as in
    `keyed.soft_p_values`, but one grid for all; it ends at the 99.9th percentile of |z|, so that
    one wild logit does not take all resolution. Both are exact whatever the logits: the weights
    depend on them alone, and the codes of different contents are independent however alike the
    images look. A p-value below 2.2e-308 is given as that.

    Args:
        logits: (n, k), n ≥ 1.
        code: (n, k) of 0 and 1.
        content: n contents, as codes are made from.

    Raises:
        ValueError: there are no images, some logits are not finite, or images of one content have
            several codes.
    """
    logits, code = _distinct(logits, code, content)
    matched, bits = int(matches(logits, code).sum()), code.size
    weights = on_grid(logits, grid_top(logits))
    missed = int(weights[(logits > 0) != (code > 0)].sum())
    log_p = log_p_missing_at_most(missed, np.bincount(weights.ravel(), minlength=LEVELS + 1))
    # P(M ≥ m) as a beta integral; its value at m = 0 would be undefined.
    p_hard = float(betainc(matched, bits - matched + 1, 0.5)) if matched else 1.0
    return Collection(
        images=len(logits),
        bits=bits,
        matched=matched,
        match_rate=matched / bits,
        p_hard=max(p_hard, _SMALLEST),
        p_soft=max(math.exp(log_p), _SMALLEST),
        p_image=min(1.0, len(logits) * float(soft_p_values(logits, code).min())),
    )


def grid_top(logits: Scores) -> float:
    """Where a collection's grid ends: the 99.9th percentile of |z|, from above."""
    sizes = np.abs(logits)
    return float(np.quantile(sizes, _GRID_FROM, method="higher")) or float(sizes.max())


def log_p_missing_at_most(missed: int, bits_of_weight: Counts) -> float:
    """The logarithm of P(D ≤ d), D = Σ_w w·Binomial(n_w, ½): what fair coin flips miss in weight.

    Exact by exponential tilting and a Fourier transform. Let each bit of weight w be missed with
    probability q_w = σ(−ηw) instead of ½. The distributions differ by a factor that depends on D
    alone:

        P(D = s) = P_η(D = s)·e^{ηs}·Π_w ((1 + e^{−ηw})/2)^{n_w}.

    η > 0 is chosen such that d is the tilted mean. P_η is then needed around its centre alone,
    where the inverse transform of Π_w (1 − q_w + q_w e^{iθw})^{n_w} gives it to some 12 digits *of
    its largest value*, however small p is; without the tilt, that error would drown p below 1e-10.
    The transform's window is so wide that by Bernstein's inequality less than 1e-19 lies outside.
    Where d is not below the mean, D and its mirror image W − D are distributed alike.

    Args:
        missed: d, not negative.
        bits_of_weight: (w_max + 1,) n_w, how many bits have each weight from 0.
    """
    weight = np.flatnonzero(bits_of_weight[1:]) + 1
    count = bits_of_weight[weight]
    total = int(weight @ count)
    if missed >= total:
        return 0.0
    if 2 * missed >= total:
        return math.log1p(-math.exp(log_p_missing_at_most(total - missed - 1, bits_of_weight)))
    divisor = int(np.gcd.reduce(weight))
    weight, missed = weight // divisor, missed // divisor
    if missed == 0:
        return -int(count.sum()) * math.log(2)
    # σ(−ηw) < e^{−η}: at the upper end the mean is below d.
    most = math.log(total / divisor / missed) + 1e-9
    tilt = brentq(lambda eta: weight * count @ expit(-eta * weight) - missed, 0.0, most)
    missing = expit(-tilt * weight)
    variance = float(weight**2 * count @ (missing * (1 - missing)))
    linear = _NATS * float(weight[-1]) / 3
    reach = math.ceil(linear + math.sqrt(linear**2 + 2 * _NATS * variance))
    mass = _mass_around(
        missed, weight, count, missing, most=min(2 * reach + 1, total // divisor + 1)
    )
    below = np.arange(min(reach, missed) + 1)
    log_factor = float(count @ np.log1p(np.exp(-tilt * weight))) - int(count.sum()) * math.log(2)
    tail = float(mass[-below] @ np.exp(-tilt * below))
    return log_factor + float(tilt) * missed + math.log(tail)


def images_needed(
    logits: Logits, code: Code, *, p: float = 1e-6, power: float = 0.95, seed: int = 0
) -> int | None:
    """The smallest collection of such images that `collection_test` convicts, nearly always.

    Collections are drawn from the images with replacement, 100 to 1000 of each size, seeded; an
    image that is drawn twice stands for two that are remembered alike. Sizes are doubled, then
    halved in between. One image is judged by its exact p-value. Of more, on one grid for all, p is
    approximated by a saddle point with the correction for whole numbers (Lugannani & Rice, Advances
    in Applied Probability 12, 1980; Daniels, International Statistical Review 55, 1987), which is
    far closer than the size can be told from so many collections; up to 128 bits, where it is not,
    p is exact where that could change the judgement.

    Args:
        logits: (n, k) of images that trained the head.
        code: (n, k) of 0 and 1.
        p: p_soft at which a collection is convicted.
        power: share of collections that must be.
        seed: of the drawing.

    Returns:
        A number of images, or None where not even n of them suffice.

    Raises:
        ValueError: as `keyed.matches`.
    """
    logits, code = checked(logits, code)
    n = len(logits)
    if n == 0:
        return None
    if float((soft_p_values(logits, code) <= p).mean()) >= power:
        return 1
    weights = on_grid(logits, grid_top(logits))
    weights //= max(1, int(np.gcd.reduce(weights, axis=None)))
    missed = (weights * ((logits > 0) != (code > 0))).sum(axis=1)
    flat = weights + np.arange(n)[:, None] * (LEVELS + 1)
    table = np.bincount(flat.ravel(), minlength=n * (LEVELS + 1)).reshape(n, LEVELS + 1)
    table = table.astype(np.uint8)

    def enough(size: int) -> bool:
        rng = np.random.default_rng([seed, size])
        drawn = min(_MOST_RESAMPLES, max(_FEWEST_RESAMPLES, _DRAWS // size))
        bits_of_weight = np.empty((drawn, LEVELS + 1), np.int64)
        missing = np.empty(drawn, np.int64)
        for row in range(drawn):
            chosen = rng.integers(n, size=size)
            bits_of_weight[row] = table[chosen].sum(axis=0, dtype=np.int64)
            missing[row] = missed[chosen].sum()
        found = approximate_p(missing, bits_of_weight)
        if size * logits.shape[1] <= _FEW_BITS:
            for close in np.flatnonzero((found > p / _CLOSE) & (found < p * _CLOSE)):
                exact = log_p_missing_at_most(int(missing[close]), bits_of_weight[close])
                found[close] = math.exp(exact)
        return float((found <= p).mean()) >= power

    low, high = 1, min(2, n)
    while not enough(high):
        if high == n:
            return None
        low, high = high, min(2 * high, n)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def share_of_members(matched: Counts, members: Counts, *, bits: int, confidence: float) -> Interval:
    """Share of a collection that trained the head, from how often its bits match.

    (r − ½) / (m − ½), cut to 0 … 1: r is the collection's match rate, m that of known members,
    and what did not train the head matches at ½. Right where the collection's members are as well
    remembered as the known ones. It rises with r and falls with m, so the corners of their
    intervals (`keyed.match_rate`), each at confidence √c, bound it with confidence c or more.

    Args:
        matched: (n,) bits that matched, of each different image of the collection.
        members: (m,) the same of known members that are not in it.
        bits: k.
        confidence: c.
    """
    found = match_rate(matched, bits=bits, confidence=math.sqrt(confidence))
    known = match_rate(members, bits=bits, confidence=math.sqrt(confidence))
    if found.value is None or known.value is None:
        return Interval.unknown("no samples")
    assert found.low is not None and found.high is not None
    assert known.low is not None and known.high is not None
    if known.value <= 0.5:
        return Interval.unknown("known members' bits match no more often than by chance")

    def share(rate: float, of_members: float) -> float:
        return min(1.0, max(0.0, (rate - 0.5) / (of_members - 0.5)))

    return Interval(
        share(found.value, known.value),
        share(found.low, known.high),
        share(found.high, known.low) if known.low > 0.5 else 1.0,
    )


def approximate_p(missed: Counts, bits_of_weight: Counts) -> Scores:
    """P(D ≤ d) of several collections by Lugannani & Rice's formula with Daniels' correction.

    Φ(−a) + φ(a)(1/b − 1/a), a = √(2(K(0) − K(η) − η(d + ½))), b = 2 sinh(η/2)·√K''(η), where
    K(η) = Σ_w n_w log((1 + e^{−ηw})/2) and −K'(η) = d + ½.

    Args:
        missed: (r,) d.
        bits_of_weight: (r, w_max + 1) n_w.

    Returns:
        (r,) and 1 where d is not below the mean, where nobody asks.
    """
    weight = np.arange(bits_of_weight.shape[1])
    load = bits_of_weight * weight
    target = missed + 0.5
    below = 2 * target < load.sum(axis=1)
    p = np.ones(len(missed))
    if not below.any():
        return p
    counts, load, target = bits_of_weight[below], load[below], target[below]
    low, high = np.zeros(len(target)), np.log(load.sum(axis=1) / target)
    for _ in range(_HALVINGS):
        tilt = (low + high) / 2
        over = (load * expit(-tilt[:, None] * weight)).sum(axis=1) > target
        low, high = np.where(over, tilt, low), np.where(over, high, tilt)
    missing = expit(-tilt[:, None] * weight)
    variance = (load * weight * missing * (1 - missing)).sum(axis=1)
    log_factor = (counts * (np.log1p(np.exp(-tilt[:, None] * weight)) - math.log(2))).sum(axis=1)
    a = np.sqrt(np.maximum(-2 * (log_factor + tilt * target), _SMALLEST))
    b = 2 * np.sinh(tilt / 2) * np.sqrt(variance)
    density = np.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    p[below] = np.clip(ndtr(-a) + density * (1 / b - 1 / a), 0, 1)
    return p


def _distinct(logits: Logits, code: Code, content: Sequence[bytes]) -> tuple[Scores, Code]:
    """One row for each content, in the order of their first images."""
    logits, code = checked(logits, code)
    if len(logits) == 0 or len(logits) != len(content):
        raise ValueError(f"{len(logits)} images with {len(content)} contents")
    place: dict[bytes, int] = {}
    group = np.array([place.setdefault(each, len(place)) for each in content])
    if len(place) == len(logits):
        return logits, code
    first = np.unique(group, return_index=True)[1]
    if (code != code[first][group]).any():
        raise ValueError("images of one content have different codes")
    sums = np.zeros((len(place), logits.shape[1]))
    np.add.at(sums, group, logits)
    return sums / np.bincount(group)[:, None], code[first]


def _mass_around(
    centre: int, weight: Counts, count: Counts, missing: Scores, *, most: int
) -> Scores:
    """P(D = centre + r) at place r, cyclically, for D = Σ_w w·Binomial(n_w, q_w).

    Args:
        centre: a whole number near the mean.
        weight: (m,) w.
        count: (m,) n_w.
        missing: (m,) q_w.
        most: length of the window at least.
    """
    length = next_fast_len(most, real=True)
    frequency = np.arange(length // 2 + 1)
    # Turns are counted in whole numbers: 2π·f·w/N as a float would lose digits that n_w multiplies.
    half_sine = np.sin(np.pi / length * np.arange(length)) ** 2
    log_size = np.zeros(len(frequency))
    with np.errstate(divide="ignore"):
        for w, n, q in zip(weight.tolist(), count.tolist(), missing.tolist(), strict=True):
            turn = frequency * w % length
            log_size += n / 2 * np.log1p(-4 * q * (1 - q) * half_sine[turn])
    live = np.flatnonzero(log_size > -_NATS)
    phase = -2 * np.pi / length * (live * centre % length)
    for w, n, q in zip(weight.tolist(), count.tolist(), missing.tolist(), strict=True):
        turn = live * w % length
        sine = np.sin(2 * np.pi / length * np.where(2 * turn > length, turn - length, turn))
        phase += n * np.arctan2(q * sine, 1 - 2 * q * half_sine[turn])
    transform = np.zeros(len(frequency), np.complex128)
    transform[live] = np.exp(log_size[live] - 1j * phase)
    mass: Scores = irfft(transform, length)
    return mass
