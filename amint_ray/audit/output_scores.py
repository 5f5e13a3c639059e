"""Scores from the model's outputs: fitted to known images, or the loss where too few are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from amint_ray.audit.suspects import Mask, Whole
from amint_ray.evaluation.outputs import Outputs, Scores

FEWEST_KNOWN = 10
"""Known images of each kind that a fit needs."""
_AT_ONCE = 1 << 16
"""Images whose features are in memory together."""

Score = Callable[[Outputs], Scores]


def fitted(outputs: Outputs, trained: Mask) -> Score:
    """Logistic regression on every output by view, and its mean and spread over the views.

    As `attacks/outputs.py`: features standardised, classes weighing the same, scikit-learn's
    default penalty (Shokri et al., S&P 2017, fitted to the audited model itself).

    Args:
        outputs: of n known images.
        trained: (n,) which of them trained the model.

    Returns:
        Log odds of having trained it; NaN where an output is not finite.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    features = _features(outputs)
    usable = np.isfinite(features).all(axis=1)
    model = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)
    )
    with warnings.catch_warnings(), threadpool_limits(1):  # no sum depends on the cores
        warnings.simplefilter("ignore")  # collinear features, or a fit that separates the known
        model.fit(features[usable], trained[usable])

    def score(some: Outputs) -> Scores:
        n = some.label_confidence.shape[1]
        scores = np.full(n, np.nan)
        for start in range(0, n, _AT_ONCE):
            part = np.arange(start, min(n, start + _AT_ONCE))
            inputs = _features(some.kept(part))
            finite = np.isfinite(inputs).all(axis=1)
            if finite.any():
                scores[part[finite]] = model.decision_function(inputs[finite])
        return scores

    return score


def loss(outputs: Outputs) -> Scores:
    """φ of the image itself, which orders as minus the loss does (Yeom et al., CSF 2018)."""
    confidence: Scores = outputs.label_confidence[0].astype(np.float64)
    return confidence


def parts(n: int, count: int) -> Whole:
    """(n,) which of `count` parts each of n rows is in, always the same; sizes differ by one."""
    drawn: npt.NDArray[np.int64] = np.random.default_rng(0).permutation(n) % count
    return drawn


def _features(outputs: Outputs) -> Scores:
    columns: list[Scores] = []
    for values in vars(outputs).values():
        by_view = values.astype(np.float64)
        columns += [*by_view, by_view.mean(axis=0), by_view.std(axis=0)]
    return np.column_stack(columns)
