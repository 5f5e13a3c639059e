"""LiRA: the likelihood of φ had the image been trained on, against that had it not.

φ is taken as normal over models that trained on an image, and over those that did not. Of the
audited model one view is asked, the image itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import Evidence, Mask, Shadows
from amint_ray.attacks.method import Method
from amint_ray.evaluation.outputs import Scores

_SOURCE = (
    "Carlini, Chien, Nasr, Song, Terzis, Tramèr: Membership Inference Attacks From First "
    "Principles, S&P 2022"
)
FEWEST = 2
"""Shadows of a kind that a sample needs: one has no spread."""
_SMALLEST_SIGMA = 1e-30  # as in the authors' code: equal values must not divide by zero


@dataclass(frozen=True)
class Normal:
    """A normal distribution of φ for each of n samples.

    Attributes:
        mean: (n,); NaN where fewer than `FEWEST` shadows tell.
        sigma: (n,), of the sample's own shadows; likewise.
        pooled: one for all samples, around each sample's own mean.
    """

    mean: Scores
    sigma: Scores
    pooled: float

    def standardised(self, phi: Scores, *, fixed: bool) -> Scores:
        """(φ − μ) / σ."""
        value: Scores = (phi - self.mean) / self._spread(fixed)
        return value

    def log_density(self, phi: Scores, *, fixed: bool) -> Scores:
        """Up to the constant −½ log 2π."""
        value: Scores = -0.5 * self.standardised(phi, fixed=fixed) ** 2
        return value - np.log(self._spread(fixed))

    def _spread(self, fixed: bool) -> Scores:
        sigma = np.full(len(self.mean), self.pooled) if fixed else self.sigma
        value: Scores = np.maximum(sigma, _SMALLEST_SIGMA)
        return value


def fit(shadows: Shadows, edit: str) -> tuple[Normal, Normal]:
    """The distributions of φ over shadows that trained on a sample, and over those that did not.

    Variances are the unbiased ones, Σ (φ − μ)² / (k − 1), pooled Σ Σ (φ − μ)² / Σ (k − 1): with a
    handful of shadows the difference to dividing by k is large.

    Args:
        shadows: S of them.
        edit: after which φ was taken.
    """
    n = shadows.inside.shape[1]
    counts, means, squares = np.zeros((2, n), np.int64), np.zeros((2, n)), np.zeros((2, n))
    for at, *kinds, phi in shadows.blocks(edit):
        for kind, seen in enumerate(kinds):
            counts[kind, at], means[kind, at], squares[kind, at] = _moments(phi, seen)
    inside, outside = (_normal(*each) for each in zip(counts, means, squares, strict=True))
    return inside, outside


def _moments(phi: Scores, seen: Mask) -> tuple[npt.NDArray[np.int64], Scores, Scores]:
    count = seen.sum(axis=0)
    mean = (phi * seen).sum(axis=0) / np.maximum(count, 1)
    return count, mean, (((phi - mean) * seen) ** 2).sum(axis=0)


def _normal(count: npt.NDArray[np.int64], mean: Scores, square: Scores) -> Normal:
    enough = count >= FEWEST
    freedom = np.where(enough, count - 1, 0)
    sigma = np.sqrt(square / np.maximum(freedom, 1))
    pooled = float(np.sqrt(square[enough].sum() / max(1, freedom.sum())))
    return Normal(np.where(enough, mean, np.nan), np.where(enough, sigma, np.nan), pooled)


def _online(evidence: Evidence, edit: str, *, fixed: bool) -> Scores:
    """Log p(φ | trained on) − log p(φ | not)."""
    assert evidence.shadows is not None
    phi = evidence.outputs[edit].label_confidence[0].astype(np.float64)
    inside, outside = fit(evidence.shadows, edit)
    return inside.log_density(phi, fixed=fixed) - outside.log_density(phi, fixed=fixed)


def _offline(evidence: Evidence, edit: str, *, fixed: bool) -> Scores:
    """The paper's P[N(μ_out, σ_out²) < φ], as (φ − μ_out) / σ_out: the same order, never 1."""
    assert evidence.shadows is not None
    phi = evidence.outputs[edit].label_confidence[0].astype(np.float64)
    _, outside = fit(evidence.shadows, edit)
    return outside.standardised(phi, fixed=fixed)


_NEEDS = frozenset({"shadows"})

LIRA_ONLINE = Method(
    name="lira_online",
    title="LiRA online",
    source=_SOURCE,
    score=functools.partial(_online, fixed=False),
    needs=_NEEDS,
    inside=FEWEST,
    outside=FEWEST,
)
LIRA_ONLINE_FIXED = Method(
    name="lira_online_fixed",
    title="LiRA online, one variance",
    source=_SOURCE,
    score=functools.partial(_online, fixed=True),
    needs=_NEEDS,
    inside=FEWEST,
    outside=FEWEST,
)
LIRA_OFFLINE = Method(
    name="lira_offline",
    title="LiRA offline",
    source=_SOURCE,
    score=functools.partial(_offline, fixed=False),
    needs=_NEEDS,
    outside=FEWEST,
)
LIRA_OFFLINE_FIXED = Method(
    name="lira_offline_fixed",
    title="LiRA offline, one variance",
    source=_SOURCE,
    score=functools.partial(_offline, fixed=True),
    needs=_NEEDS,
    outside=FEWEST,
)
