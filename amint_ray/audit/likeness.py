"""Whether suspects are such images as the calibration images are. Where not, p-values say nothing.

Two questions. *Are they outliers?* Members, one class alone, or the same images a little noisier
must pass; noise, inverted images or another data set must not. A test of equal distributions would
fail the former as well, so what is tested is how far an image's activations are from the nearest
calibration image's: one that lies where calibration images lie is near to one, whichever part of
them its collection is from. *Are their classes the same?* Some classes are easier than others, and
a collection of an easy class has high scores without having been trained on: it is compared within
classes (`ranks.py`).

The limit comes from the digits recipe, 131 calibration images; effect: images of `test` 0.47,
`member` 0.48, a single class of either 0.36 to 0.63, with noise of 25 grey levels 0.52, mirrored
0.62, shifted by a pixel 0.71, turned by 90° 0.73, MNIST at 8 pixels 0.89 cropped and 0.99 whole,
darkened to 0.6 0.90, pixels shuffled 0.96, inverted 1.00, noise 1.00.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amint_ray.audit.ranks import Sample, rank_test
from amint_ray.audit.suspects import Whole
from amint_ray.evaluation.metrics import Interval, auc
from amint_ray.evaluation.outputs import Floats, Scores

LIMIT = 0.7
"""Effect above which suspects are called unlike calibration, if it is no chance."""
_LEVEL = 0.01
_MOST = 10_000
"""Suspects that are looked at; a seeded choice where there are more."""
_FEWEST = 10
_AT_ONCE = 1024
_DRAWS = 999
CLASSES_APART = 0.25
"""Distance of the class shares, beyond that by chance, above which each image, too, is compared
within its class; its p-value cannot be small then where a class has few calibration images."""


@dataclass(frozen=True)
class Likeness:
    """How far suspects are from calibration images.

    Attributes:
        effect: chance that a suspect is further from its nearest calibration image than a
            calibration image is from its nearest other; ½ where they are alike.
        p_value: of the one-sided rank test of these distances.
        unlike: whether effect and p-value both say so; None: not known.
    """

    effect: Interval
    p_value: float | None
    unlike: bool | None


class Surroundings:
    """Where the calibration images lie, by activations divided by their standard deviation."""

    def __init__(self, calibration: Floats) -> None:
        """Take these for what suspects are to be like.

        Args:
            calibration: (m, d) activations of calibration images.
        """
        self._scale = calibration.std(axis=0, dtype=np.float64) if len(calibration) else 1.0
        self._scale = np.where(self._scale == 0, 1.0, self._scale)
        self._theirs: Scores = calibration / self._scale

    def distance(self, suspects: Floats) -> Scores:
        """(n,) squared distance of each suspect to the nearest calibration image.

        Args:
            suspects: (n, d) activations.
        """
        points: Scores = suspects / self._scale
        return _nearest(points, self._theirs, itself=False)

    def compare(self, far: Scores, *, confidence: float) -> Likeness:
        """Whether suspects are further out than calibration images are from each other.

        Args:
            far: (n,) `distance` of different images.
            confidence: of the interval of the effect.
        """
        if len(self._theirs) < _FEWEST or len(far) == 0:
            note = f"{len(self._theirs)} calibration images and {len(far)} suspects to compare"
            return Likeness(Interval.unknown(note), None, None)
        far = far[np.random.default_rng(0).permutation(len(far))[:_MOST]]
        apart = _nearest(self._theirs, self._theirs, itself=True)
        effect = auc(far, apart, confidence=confidence)
        test = rank_test(Sample.unstratified(far), Sample.unstratified(apart))
        assert effect.value is not None and test.p_value is not None
        return Likeness(effect, test.p_value, effect.value > LIMIT and test.p_value <= _LEVEL)


def _nearest(points: Scores, others: Scores, *, itself: bool) -> Scores:
    """(n,) squared distance of each point to the nearest of the others, or but itself."""
    square = (others**2).sum(axis=1)
    found: Scores = np.full(len(points), np.inf)
    for start in range(0, len(points), _AT_ONCE):
        part = points[start : start + _AT_ONCE]
        distance = (part**2).sum(axis=1)[:, None] + square - 2 * part @ others.T
        if itself:
            rows = np.arange(len(part))
            distance[rows, start + rows] = np.inf
        found[start : start + len(part)] = distance.min(axis=1, initial=np.inf)
    return found.clip(0.0)


@dataclass(frozen=True)
class Composition:
    """How the classes of a collection compare with those of the calibration images.

    Attributes:
        distance: half the summed difference of the class shares, 0 to 1.
        by_chance: what it is on average for so many images of the same shares.
        p_value: of χ² for equal shares, by permutation.
    """

    distance: float
    by_chance: float
    p_value: float

    @property
    def differs(self) -> bool:
        """Whether the collection is to be compared within classes."""
        return self.p_value <= _LEVEL

    @property
    def far(self) -> bool:
        """Whether each image is."""
        return self.differs and self.distance - self.by_chance > CLASSES_APART


def composition(suspects: Whole, calibration: Whole) -> Composition:
    """Compare class shares.

    Args:
        suspects: (n,) classes of different images.
        calibration: (m,) classes of calibration images.
    """
    if len(suspects) == 0 or len(calibration) == 0:
        return Composition(0.0, 0.0, 1.0)
    known, codes = np.unique(np.concatenate([suspects, calibration]), return_inverse=True)
    ours = np.bincount(codes[: len(suspects)], minlength=len(known))
    total = np.bincount(codes, minlength=len(known))
    n, m = len(suspects), len(calibration)
    # Drawn, as most classes may have no image at all on either side; the fewer images are drawn.
    drawn = np.random.default_rng(0).multivariate_hypergeometric(
        total, min(n, m), size=_DRAWS, method="marginals"
    )
    drawn = drawn if n <= m else total - drawn
    every = np.vstack([ours, drawn])
    excess = every - n * total / (n + m)
    statistic = (excess**2 / total).sum(axis=1)  # χ² but for a factor
    distance = abs(every / n - (total - every) / m).sum(axis=1) / 2
    as_far = (statistic[1:] >= statistic[0] * (1 - 1e-12)).sum()
    return Composition(
        float(distance[0]), float(distance[1:].mean()), float((1 + as_far) / (1 + _DRAWS))
    )
