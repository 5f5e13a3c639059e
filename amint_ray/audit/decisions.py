"""What the kinds of evidence say of an image together, and how often such an image is a member."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from amint_ray.audit.suspects import Mask, Settings
from amint_ray.evaluation.metrics import Interval, precision_at_prior
from amint_ray.evaluation.outputs import Scores


def combined(p: Sequence[Scores]) -> Scores:
    """One p-value of several kinds of evidence, each (n,): Bonferroni's.

    It is valid however they depend on each other. A kind that says nothing of an image (NaN) counts
    as one that finds nothing; NaN where all say nothing.
    """
    smallest: Scores = np.minimum(1.0, len(p) * np.fmin.reduce(p))
    return smallest


def precision(p: Sequence[Scores], known: Sequence[Scores], *, prior: float) -> Scores:
    """(n,) share of training images among those with so small a p-value or a smaller one.

    At the prior; with p itself, which bounds it, as the rate of others, and that of the reference's
    training images. NaN where either is not known.

    Args:
        p: of each kind of evidence, (n,).
        known: of each kind, p-values of the reference's training images.
        prior: share of training images among those asked about.
    """
    together = combined(p)
    found = np.full(len(together), np.nan)
    for rows, alike in _comparable(p, known):
        if len(alike):
            hits = prior * np.searchsorted(alike, together[rows], side="right") / len(alike)
            found[rows] = hits / (hits + (1 - prior) * together[rows])
    return found


def precision_at_threshold(
    p: Sequence[Scores],
    known: Sequence[Scores],
    flagged: Mask,
    *,
    calibration: int,
    settings: Settings,
) -> Interval:
    """The same at the largest p-value that was called a member's, with its interval.

    Where not all kinds speak of all images, it is that of the images of which less is known.

    Args:
        p: of each kind of evidence, (n,).
        known: of each kind, p-values of the reference's training images.
        flagged: (n,) what was called a member.
        calibration: images that a p-value comes from.
        settings: prior and confidence.
    """
    together = combined(p)
    if not flagged.any():
        return Interval.unknown("no image is called a member")
    threshold = float(together[flagged].max())
    hits, trials = min(
        (
            (int(np.searchsorted(alike, threshold, side="right")), len(alike))
            for rows, alike in _comparable(p, known)
            if (rows & flagged).any()
        ),
        key=lambda each: each[0] / max(1, each[1]),
    )
    return precision_at_prior(
        hits,
        trials,
        min(calibration, math.ceil(threshold * calibration)),
        calibration,
        prior=settings.prior,
        confidence=settings.confidence,
    )


def _comparable(p: Sequence[Scores], known: Sequence[Scores]) -> Iterator[tuple[Mask, Scores]]:
    """Images of which the same kinds speak, and what these say of training images, sorted."""
    speaks = np.isfinite(p)
    for kinds in itertools.product((True, False), repeat=len(p)):
        rows: Mask = (speaks == np.array(kinds)[:, None]).all(axis=0)
        if any(kinds) and rows.any():
            silent = np.full(len(known[0]), np.nan)
            values = combined([k if s else silent for k, s in zip(known, kinds, strict=True)])
            yield rows, np.sort(values[np.isfinite(values)])
