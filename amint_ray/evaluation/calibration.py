"""Thresholds and p-values from calibration scores alone.

The calibration images were never trained on, by role. A suspect that was not either is exchangeable
with them, so its rank among them is uniform; that is all the theory needed (Vovk et al., 2005).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


def p_values(scores: Scores, calibration: Scores) -> Scores:
    """Conformal p-value of each score: (1 + #{calibration ≥ score}) / (n + 1).

    Args:
        scores: (m,) suspects' scores; larger means "more likely trained on".
        calibration: (n,) scores of images known not to have been trained on.

    Returns:
        (m,) values in [1/(n + 1), 1]; for an image not trained on, P(p ≤ α) ≤ α.
    """
    ordered = np.sort(calibration)
    not_below = len(ordered) - np.searchsorted(ordered, scores, side="left")
    return (1 + not_below) / (len(ordered) + 1)


def threshold_at(fpr: float, calibration: Scores) -> float | None:
    """The score to exceed so that the p-value is at most `fpr`.

    `score > threshold_at(α, calibration)` and `p_values(score, calibration) ≤ α` are the same
    decision. None where the calibration set is too small (below 1/α − 1) to ever reach α.
    """
    k = math.floor(fpr * (len(calibration) + 1) + 1e-9)
    if k == 0:
        return None
    return float(np.sort(calibration)[-k])


def benjamini_hochberg(p: Scores, fdr: float) -> npt.NDArray[np.bool_]:
    """Which hypotheses to reject so that a share of at most `fdr` of them is expected to be true.

    Benjamini & Hochberg (Journal of the Royal Statistical Society B 57, 1995). Conformal p-values
    share their calibration images and so depend on each other in the way that it allows (Bates,
    Candès, Lei, Romano, Sesia, Annals of Statistics 51, 2023).

    Args:
        p: (n,) p-values; NaN is never rejected and counts for nothing.
        fdr: the false-discovery rate.

    Returns:
        (n,) whether each is rejected.
    """
    ordered = np.sort(p[np.isfinite(p)])
    steps = fdr * np.arange(1, len(ordered) + 1) / max(1, len(ordered))
    # p-values are multiples of 1/(m + 1), on which α lies, too, but for rounding.
    passed = np.flatnonzero(ordered <= steps * (1 + 1e-12))
    if len(passed) == 0:
        return np.zeros(len(p), np.bool_)
    rejected: npt.NDArray[np.bool_] = p <= ordered[passed[-1]]
    return rejected
