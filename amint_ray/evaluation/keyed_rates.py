"""Rates of keyed codes with their intervals: of right bits, and of images at a level of p."""

from __future__ import annotations

from collections.abc import Sequence

from amint_ray.evaluation.keyed import Counts, Scores
from amint_ray.evaluation.metrics import Interval, mean, proportion

P_LEVELS = (0.01, 0.001, 1e-6)


def tpr_at_p(
    p_values: Scores, levels: Sequence[float] = P_LEVELS, *, bits: int, confidence: float
) -> dict[str, Interval]:
    """Share of members with a p-value of at most each level, with its Clopper-Pearson interval.

    The level *is* the false-positive rate, or above it where no p-value lies on it: nothing is
    estimated from negatives, and no level is too low for their number.

    Args:
        p_values: (n,) members' p-values.
        levels: false-positive rates.
        bits: of the codes, k. A level below 2^−k cannot be reached, and has no value.
        confidence: of the intervals.

    Returns:
        By level, as `0.01`, `0.001`, `1e-06`.
    """
    return {
        f"{level:g}": proportion(
            int((p_values <= level).sum()), len(p_values), confidence=confidence
        )
        if level >= 2.0**-bits
        else Interval.unknown(f"the smallest p-value of {bits} bits is {2.0**-bits:.2g}")
        for level in levels
    }


def match_rate(matched: Counts, *, bits: int, confidence: float) -> Interval:
    """Share of bits that match over images; ½ for images that did not train the head.

    Some images are remembered better than others, and then bits of an image are not independent:
    the interval is the wider of the mean's over images and Clopper-Pearson's over all bits, which
    is not empty where all images match alike.

    Args:
        matched: (n,) bits that matched, of each image.
        bits: k.
        confidence: of the interval.
    """
    exact = proportion(int(matched.sum()), len(matched) * bits, confidence=confidence)
    by_image = mean(matched / bits, confidence=confidence)
    if exact.low is None or exact.high is None or by_image.low is None or by_image.high is None:
        return exact
    low, high = min(exact.low, by_image.low), max(exact.high, by_image.high)
    return Interval(exact.value, max(0.0, low), min(1.0, high))
