"""Membership and task metrics, each with its interval. NumPy and SciPy only.

Throughout, *positives* are scores of images that were trained on (`member` or `withheld`),
*negatives* scores of images that were not (`test`); larger means "more likely trained on".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaincinv, ndtri, stdtrit

Scores = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """A measured value with its confidence limits; all three None where it cannot be stated.

    Attributes:
        value: the point estimate.
        low: lower confidence limit.
        high: upper confidence limit.
        note: why there is no value, or None.
    """

    value: float | None
    low: float | None
    high: float | None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """`{value, low, high}`, and `note` where there is one."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return values if self.note is None else {**values, "note": self.note}

    @classmethod
    def unknown(cls, note: str) -> Interval:
        """No value, and why."""
        return cls(None, None, None, note)


def proportion(successes: int, trials: int, *, confidence: float) -> Interval:
    """A proportion with its exact Clopper-Pearson interval (Biometrika 26, 1934)."""
    if trials == 0:
        return Interval.unknown("no samples")
    tail = (1 - confidence) / 2
    low = betaincinv(successes, trials - successes + 1, tail) if successes > 0 else 0.0
    high = betaincinv(successes + 1, trials - successes, 1 - tail) if successes < trials else 1.0
    return Interval(successes / trials, float(low), float(high))


def proportion_difference(hits_a: Mask, hits_b: Mask, *, confidence: float) -> Interval:
    """Share of hits of a minus that of b, on the *same* samples in the same order.

    The interval is Bonett & Price's adjusted Wald (Statistics in Medicine 31, 2012), which is not
    empty where the two agree on all samples.

    Args:
        hits_a: (n,).
        hits_b: (n,).
        confidence: of the interval.
    """
    n = len(hits_a)
    if n == 0:
        return Interval.unknown("no samples")
    only_a, only_b = int((hits_a & ~hits_b).sum()), int((hits_b & ~hits_a).sum())
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = float(ndtri((1 + confidence) / 2)) * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return Interval((only_a - only_b) / n, max(-1.0, a - b - half), min(1.0, a - b + half))


def mean(values: Scores, *, confidence: float) -> Interval:
    """A mean with the interval that the normal distribution gives it: ± z·s/√n."""
    if len(values) < 2:
        return Interval.unknown("fewer than two samples")
    value, half = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half *= float(ndtri((1 + confidence) / 2))
    return Interval(value, value - half, value + half)


def mean_over_trainings(values: Scores, *, confidence: float) -> Interval:
    """A mean over independent trainings with Student's t interval.

    Args:
        values: (k,) one a training.
        confidence: of the interval.
    """
    k = len(values)
    if k < 2:
        return Interval.unknown("fewer than two trainings")
    value, half = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(k)
    half *= float(stdtrit(k - 1, (1 + confidence) / 2))
    return Interval(value, value - half, value + half)


def auc(positives: Scores, negatives: Scores, *, confidence: float) -> Interval:
    """Area under the ROC curve: P(positive > negative) + ½ P(equal).

    The interval is DeLong's (Biometrics 44, 1988) on the logit scale. Its variance vanishes as the
    classes separate, so above 0.98 and below 0.02 the wider of it and Newcombe's method 5
    (Statistics in Medicine 25, 2006), which does not, is taken. `tests/evaluation/test_metrics.py`
    simulates the coverage.

    Args:
        positives: (m,) scores.
        negatives: (n,) scores.
        confidence: of the interval.
    """
    if len(positives) == 0 or len(negatives) == 0:
        return Interval.unknown("no samples")
    return auc_of_shares(
        share_below(positives, negatives),
        1 - share_below(negatives, positives),
        confidence=confidence,
    )


def auc_of_shares(over_negatives: Scores, over_positives: Scores, *, confidence: float) -> Interval:
    """`auc` where each sample's place among the others is known, and scores need not be one scale.

    Args:
        over_negatives: (m,) for each positive, the share of negatives below it, ties half.
        over_positives: (n,) for each negative, the share of positives above it, ties half.
        confidence: of the interval.
    """
    m, n = len(over_negatives), len(over_positives)
    if m == 0 or n == 0:
        return Interval.unknown("no samples")
    value = float(over_negatives.mean())
    z = float(ndtri((1 + confidence) / 2))
    limits = []
    if m > 1 and n > 1 and 0 < value < 1:
        variance = over_negatives.var(ddof=1) / m + over_positives.var(ddof=1) / n
        if variance > 0:
            half = z * math.sqrt(variance) / (value * (1 - value))
            centre = math.log(value / (1 - value))
            limits.append((_expit(centre - half), _expit(centre + half)))
    if not limits or not 0.02 <= value <= 0.98:
        limits.append(_newcombe(value, m, n, z))
    return Interval(value, min(low for low, _ in limits), max(high for _, high in limits))


def auc_difference(
    positives_a: Scores,
    negatives_a: Scores,
    positives_b: Scores,
    negatives_b: Scores,
    *,
    confidence: float,
) -> Interval:
    """AUC of a minus AUC of b, two scores of the *same* samples in the same order.

    The interval is that of the paired DeLong test (Biometrics 44, 1988). Its variance vanishes as
    classes separate or scores agree, so where either AUC is above 0.98 or below 0.02 it is no
    narrower than MOVER's from both AUCs' own intervals (Zou & Donner, Statistics in Medicine 27,
    2008), which takes them as independent. `tests/evaluation/test_auc_difference.py` simulates.

    Args:
        positives_a: (m,) scores by a.
        negatives_a: (n,) scores by a.
        positives_b: (m,) scores by b.
        negatives_b: (n,) scores by b.
        confidence: of the interval.

    Raises:
        ValueError: the samples cannot be the same.
    """
    m, n = len(positives_a), len(negatives_a)
    if (m, n) != (len(positives_b), len(negatives_b)):
        raise ValueError("the two scores are not of the same samples")
    if m < 2 or n < 2:
        return Interval.unknown("fewer than two samples")
    of_positives = share_below(positives_a, negatives_a) - share_below(positives_b, negatives_b)
    of_negatives = share_below(negatives_b, positives_b) - share_below(negatives_a, positives_a)
    value = float(of_positives.mean())
    half = math.sqrt(of_positives.var(ddof=1) / m + of_negatives.var(ddof=1) / n)
    half *= float(ndtri((1 + confidence) / 2))
    low, high = value - half, value + half
    a = auc(positives_a, negatives_a, confidence=confidence)
    b = auc(positives_b, negatives_b, confidence=confidence)
    assert a.value is not None and a.low is not None and a.high is not None
    assert b.value is not None and b.low is not None and b.high is not None
    if not (0.02 <= a.value <= 0.98 and 0.02 <= b.value <= 0.98):
        low = min(low, value - math.hypot(a.value - a.low, b.high - b.value))
        high = max(high, value + math.hypot(a.high - a.value, b.value - b.low))
    return Interval(value, max(-1.0, low), min(1.0, high))


def balanced_accuracy(tpr: Interval, fpr: Interval) -> Interval:
    """(TPR + 1 − FPR) / 2, its interval by MOVER from the two rates' (Zou & Donner 2008)."""
    if (
        tpr.value is None
        or fpr.value is None
        or tpr.low is None
        or tpr.high is None
        or fpr.low is None
        or fpr.high is None
    ):
        return Interval.unknown(tpr.note or fpr.note or "no samples")
    value = (tpr.value + 1 - fpr.value) / 2
    down = math.hypot(tpr.value - tpr.low, fpr.high - fpr.value) / 2
    up = math.hypot(tpr.high - tpr.value, fpr.value - fpr.low) / 2
    return Interval(value, max(0.0, value - down), min(1.0, value + up))


def precision_at_prior(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    *,
    prior: float,
    confidence: float,
) -> Interval:
    """Share of true members among the accused where a share `prior` of the suspects are members.

    π·TPR / (π·TPR + (1 − π)·FPR). It rises with TPR and falls with FPR, so the corners of the two
    rates' Clopper-Pearson intervals, each at confidence √c, bound it with confidence c or more.

    Args:
        true_positives: positives above the threshold.
        positives: all positives.
        false_positives: negatives above the threshold.
        negatives: all negatives.
        prior: π.
        confidence: c.
    """
    tpr = proportion(true_positives, positives, confidence=math.sqrt(confidence))
    fpr = proportion(false_positives, negatives, confidence=math.sqrt(confidence))
    if tpr.value is None or fpr.value is None:
        return Interval.unknown("no samples")
    assert tpr.low is not None and tpr.high is not None
    assert fpr.low is not None and fpr.high is not None
    if true_positives + false_positives == 0:
        return Interval.unknown("nobody was accused")

    def precision(hit: float, false_alarm: float) -> float:
        accused = prior * hit + (1 - prior) * false_alarm
        return prior * hit / accused if accused > 0 else 0.0

    return Interval(
        precision(tpr.value, fpr.value),
        precision(tpr.low, fpr.high),
        precision(tpr.high, fpr.low),
    )


def roc(positives: Scores, negatives: Scores) -> tuple[Scores, Scores]:
    """False- and true-positive rates at every threshold, from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([positives, negatives]))
    above = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores)
        for scores in (negatives, positives)
    ]
    fpr, tpr = (np.concatenate([rates, [0.0]])[::-1] for rates in above)
    return fpr, tpr


def share_below(scores: Scores, others: Scores) -> Scores:
    """For each score, the share of `others` below it, ties counted half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, side="left")
    not_above = np.searchsorted(ordered, scores, side="right")
    return (below + not_above) / (2 * len(others))


def _newcombe(value: float, m: int, n: int, z: float) -> tuple[float, float]:
    """Limits θ with |value − θ| = z·√V(θ), V the Hanley-McNeil variance at N* = (m + n) / 2."""
    half = (m + n) / 2 - 1

    def distance(theta: float) -> float:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return abs(value - theta) - z * math.sqrt(theta * (1 - theta) * spread / (m * n))

    edge = 1e-12
    # Where the distance is not positive even at the edge, that edge is the limit.
    low = high = None
    if value > 2 * edge and distance(edge) > 0:
        low = brentq(distance, edge, value - edge)
    if value < 1 - 2 * edge and distance(1 - edge) > 0:
        high = brentq(distance, value + edge, 1 - edge)
    return float(low or 0.0), float(1.0 if high is None else high)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
