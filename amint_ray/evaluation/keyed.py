"""Exact p-values of keyed codes, image by image. NumPy only: every worker imports it.

A keyed MINT head learns, for each member, a code of k bits: the beginning of HMAC-SHA256(key,
content). What it says of an image is k logits, whose signs are the bits that it predicts.

The *null* is that this content did not train the head. Then nothing that the model holds depends on
its code, and the code is k fair coin flips independent of the logits: by construction, whatever the
image shows, wherever it is from, whatever the model learned. All that is assumed is that nobody can
tell HMAC-SHA256 under a secret key from coin flips. So given the logits, the distribution of every
statistic is known, and needs no calibration images.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]
Code = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]

LEVELS = 63
"""Weights are integers from 0 to this."""
LONGEST_CODE = 64
_BLOCK = 1 << 17  # numbers worked on at a time: 1 MiB, which a core's own cache holds


def matches(logits: Logits, code: Code) -> Counts:
    """How many bits of its code the head predicts, of each image.

    The predicted bit is 1 where the logit is above 0.

    Args:
        logits: (n, k).
        code: (n, k) of 0 and 1.

    Returns:
        (n,) from 0 to k.

    Raises:
        ValueError: a logit is not finite, or the shapes differ, or the code is no code.
    """
    logits, code = checked(logits, code)
    matched: Counts = ((logits > 0) == (code > 0)).sum(axis=1, dtype=np.int64)
    return matched


def log_likelihood_ratio(logits: Logits, code: Code) -> Scores:
    """How much likelier the code is by the head's word than by coin flips, in nats.

    Σ_j log(2σ((2c_j − 1) z_j)): the head gives bit j the probability σ(±z_j), chance gives it ½.

    Args:
        logits: (n, k).
        code: (n, k) of 0 and 1.

    Returns:
        (n,) at most k log 2.

    Raises:
        ValueError: as `matches`.
    """
    logits, code = checked(logits, code)
    signed = np.where(code > 0, logits, -logits)
    ratio: Scores = (math.log(2) - np.logaddexp(0, -signed)).sum(axis=1)
    return ratio


def hard_p_values(matched: Counts, bits: int) -> Scores:
    """P(M ≥ m) with M ~ Binomial(k, ½), the exact distribution of `matches` under the null.

    Σ_{j ≥ m} C(k, j) / 2^k, summed in whole numbers and rounded once.

    Args:
        matched: (n,) bits that matched.
        bits: k.

    Returns:
        (n,) from 2^−k to 1.

    Raises:
        ValueError: more bits matched than there are, or fewer than none.
    """
    if len(matched) and not (matched.min() >= 0 and matched.max() <= bits):
        raise ValueError(f"not a number of matches among {bits} bits")
    tail, table = 0, np.empty(bits + 1)
    for m in range(bits, -1, -1):
        tail += math.comb(bits, m)
        table[m] = tail / 2**bits
    return table[matched]


def soft_p_values(logits: Logits, code: Code) -> Scores:
    """Exact p-value of the weighted number of matches, which trusts sure bits more.

    T = Σ_j w_j·1[bit j matches], with w_j = |z_j| on a grid of whole numbers, 63 for the image's
    largest. A match instead of a mismatch adds log σ(|z|) − log σ(−|z|) = |z| to
    `log_likelihood_ratio`, so given the logits T ranks codes as that does, but for the grid.

    p = P(T' ≥ T) over all 2^k codes, equally likely. The weights depend on the logits alone, and
    under the null the code is independent of them. So this is the distribution of T whatever the
    logits are, and P(p ≤ α) ≤ α, with equality at each p that occurs. The codes are counted by
    dynamic programming over the weights that are missed: whole numbers that a float holds exactly
    for k ≤ 53, and to a relative 1e-13 for k ≤ 64.

    Args:
        logits: (n, k), k ≤ 64.
        code: (n, k) of 0 and 1.

    Returns:
        (n,) from 2^−k to 1; 1 where all logits are 0.

    Raises:
        ValueError: as `matches`, or k > 64.
    """
    logits, code = checked(logits, code)
    if logits.shape[1] > LONGEST_CODE:
        raise ValueError(f"a code has at most {LONGEST_CODE} bits, not {logits.shape[1]}")
    p = np.ones(len(logits))
    if len(p) == 0:
        return p
    weights = on_grid(logits, np.abs(logits).max(axis=1, keepdims=True))
    total = weights.sum(axis=1)
    missed = (weights * ((logits > 0) != (code > 0))).sum(axis=1)
    # Missed weight and matched weight are distributed alike, so no tail is longer than half.
    over_half = 2 * missed >= total
    up_to = np.where(over_half, total - missed - 1, missed)
    order = np.argsort(-up_to)  # images with tails of a length go together
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, _BLOCK // (int(up_to[order[start]]) + 2 + LEVELS))]
        p[rows] = _share_missing_at_most(weights[rows], up_to[rows])
        start += len(rows)
    return np.where(over_half, 1 - p, p)


def checked(logits: Logits, code: Code) -> tuple[Scores, Code]:
    """Logits as float64 and their codes.

    Raises:
        ValueError: a logit is not finite, or the shapes differ, or the code is no code.
    """
    code = np.asarray(code)
    if logits.ndim != 2 or logits.shape != code.shape or logits.shape[1] == 0:
        raise ValueError(f"logits of shape {logits.shape} for codes of shape {code.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("some logits are not finite")
    if not ((code == 0) | (code == 1)).all():
        raise ValueError("a code is of 0 and 1")
    return logits.astype(np.float64), code


def on_grid(logits: Scores, top: float | Scores) -> Counts:
    """|z| as whole numbers from 0 to `LEVELS`, which is `top` and all above it.

    Args:
        logits: (n, k).
        top: not negative; one for all, or (n, 1).
    """
    shares = np.divide(np.abs(logits), top, out=np.zeros(logits.shape), where=np.asarray(top) > 0)
    weights: Counts = np.rint(LEVELS * np.minimum(shares, 1)).astype(np.int64)
    return weights


def _share_missing_at_most(weights: Counts, up_to: Counts) -> Scores:
    """P(Σ_j w_j·b_j ≤ d) for fair independent bits b, of each image.

    Args:
        weights: (n, k) from 0 to `LEVELS`.
        up_to: (n,) d; −1 gives 0.
    """
    n, bits = weights.shape
    length = int(up_to.max()) + 1
    # Columns: LEVELS of zeros, then the number of codes that miss 0, 1, 2, … in weight.
    codes = np.zeros((n, LEVELS + length))
    codes[:, LEVELS : LEVELS + 1] = 1
    if length == 0:
        return np.zeros(n)
    shifted = np.lib.stride_tricks.sliding_window_view(codes, length, axis=1)
    images = np.arange(n)
    for weight in weights.T:
        codes[:, LEVELS:] += shifted[images, LEVELS - weight]
    codes[:, LEVELS:][np.arange(length) > up_to[:, None]] = 0
    share: Scores = np.ldexp(codes.sum(axis=1), -bits)
    return share
