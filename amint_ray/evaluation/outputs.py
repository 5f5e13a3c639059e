"""What a classifier's outputs say of images, as far as membership inference reads them. NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amint_ray.contracts import UserError

Scores = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """What a model says of n samples, each seen in some fixed views; the first is the image itself.

    All arrays are (views, n) float32.

    Attributes:
        label_confidence: φ = log p_y − log(1 − p_y), y being the label, or the model's own
            prediction where there is none (−1). NaN where the logits are not finite.
        top_confidence: the largest probability.
        entropy: of the probabilities, in nats.
        margin: the largest logit minus the second.
        right: 1 where the prediction is the label, else 0; 0 where there is no label.
    """

    label_confidence: Floats
    top_confidence: Floats
    entropy: Floats
    margin: Floats
    right: Floats

    def kept(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Outputs:
        """Some of the samples: a mask, or which."""
        return Outputs(*(values[:, rows] for values in vars(self).values()))

    def finite(self) -> npt.NDArray[np.bool_]:
        """(n,) whether every output of every view is finite."""
        known = np.ones(self.label_confidence.shape[1], np.bool_)
        for values in vars(self).values():
            known &= np.isfinite(values).all(axis=0)
        return known


def outputs_of(logits: npt.ArrayLike, labels: npt.NDArray[np.int64]) -> Outputs:
    """The outputs for one view, computed in float64.

    φ is logit_y minus the log-sum-exp of the *other* logits: 1 − p_y is 0 where p_y is near 1.

    Args:
        logits: (n, classes).
        labels: (n,) class indices; −1: none.

    Returns:
        Arrays of shape (1, n).

    Raises:
        UserError: there is only one class.
    """
    x = np.asarray(logits, np.float64)
    if x.shape[1] < 2:
        raise UserError("the task has a single class: its outputs say nothing about membership")
    rows = np.arange(len(x))
    prediction = x.argmax(axis=1)
    chosen = np.where(labels < 0, prediction, labels)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        others = x.copy()
        others[rows, chosen] = -np.inf
        ordered = np.partition(x, -2, axis=1)
        log_p = x - _log_sum_exp(x)[:, None]
        p = np.exp(log_p)
        columns = (
            x[rows, chosen] - _log_sum_exp(others),
            p.max(axis=1),
            -(p * log_p).sum(axis=1),
            ordered[:, -1] - ordered[:, -2],
            prediction == labels,
        )
        finite = np.isfinite(x).all(axis=1)
        return Outputs(*(np.where(finite, c, np.nan)[None].astype(np.float32) for c in columns))


def stack_views(views: Sequence[Outputs]) -> Outputs:
    """Several views of the same samples as one; the first must be the image itself."""
    return _join(views, axis=0)


def append_samples(parts: Sequence[Outputs]) -> Outputs:
    """Batches of samples, each with the same views, one after another."""
    return _join(parts, axis=1)


def _join(parts: Sequence[Outputs], *, axis: int) -> Outputs:
    columns = (np.concatenate([getattr(p, name) for p in parts], axis) for name in vars(parts[0]))
    return Outputs(*columns)


def _log_sum_exp(x: Scores) -> Scores:
    top = x.max(axis=1)
    total: Scores = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    return total
