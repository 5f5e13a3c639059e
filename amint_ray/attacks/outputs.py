"""Attacks that are fitted: logistic regression on the outputs, from a few hundred known images."""

from __future__ import annotations

import functools
import warnings

import numpy as np

from amint_ray.attacks.evidence import PLAIN, Evidence
from amint_ray.attacks.method import Method
from amint_ray.contracts import Role, RunError
from amint_ray.evaluation.outputs import Outputs, Scores

_SOURCE = (
    "Shokri, Stronati, Song, Shmatikov: Membership Inference Attacks Against Machine Learning "
    "Models, S&P 2017, fitted to the audited model itself"
)
_FEWEST_KNOWN = 10
"""Known images of each kind that a fit needs."""


def _score(evidence: Evidence, edit: str, *, reference: bool, snapshots: bool) -> Scores:
    """Log odds of membership; fitted to the plain known images, whatever happened to the suspects.

    Features are standardised by the known images, classes weigh the same, and the penalty is
    scikit-learn's default (C = 1): the few known must not be learned by heart.

    Raises:
        RunError: too few images are known.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    plain = _features(evidence, PLAIN, reference=reference, snapshots=snapshots)
    usable = evidence.known & np.isfinite(plain).all(axis=1)
    trained = evidence.of(Role.MEMBER)
    for kind, count in (
        ("members", int((usable & trained).sum())),
        ("calibration images", int((usable & ~trained).sum())),
    ):
        if count < _FEWEST_KNOWN:
            raise RunError(
                f"the trained output attack knows {count} {kind} and needs {_FEWEST_KNOWN}: name "
                "other methods, or let it know more of them"
            )
    model = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)
    )
    with warnings.catch_warnings(), threadpool_limits(1):  # no sum depends on the cores
        warnings.simplefilter("ignore")  # collinear features, or a fit that separates the known
        model.fit(plain[usable], trained[usable])
    suspects = (
        plain
        if edit == PLAIN
        else _features(evidence, edit, reference=reference, snapshots=snapshots)
    )
    scored = np.isfinite(suspects).all(axis=1)
    scores = np.full(len(evidence), np.nan)
    if scored.any():
        scores[scored] = model.decision_function(suspects[scored])
    return scores


def _features(evidence: Evidence, edit: str, *, reference: bool, snapshots: bool) -> Scores:
    """(n, features); NaN where an output is not finite or no shadow is without the image."""
    columns = _of_views(evidence.outputs[edit])
    phi = evidence.outputs[edit].label_confidence[0].astype(np.float64)
    if reference:
        outside = _mean_outside(evidence, edit)
        columns += [outside, phi - outside]
    if snapshots:
        assert evidence.snapshots is not None
        for earlier in evidence.snapshots[edit]:
            own = earlier.label_confidence.astype(np.float64)
            columns += [own[0], own.mean(axis=0)]
    return np.column_stack(columns)


def _of_views(outputs: Outputs) -> list[Scores]:
    """Every output by view, and its mean and spread over the views."""
    columns: list[Scores] = []
    for values in vars(outputs).values():
        by_view = values.astype(np.float64)
        columns += [*by_view, by_view.mean(axis=0), by_view.std(axis=0)]
    return columns


def _mean_outside(evidence: Evidence, edit: str) -> Scores:
    """(n,) mean φ over the shadows that did not train on a sample; NaN where all did."""
    assert evidence.shadows is not None
    mean = np.full(len(evidence), np.nan)
    for at, _, outside, phi in evidence.shadows.blocks(edit):
        count = outside.sum(axis=0)
        np.divide((phi * outside).sum(axis=0), count, out=mean[at], where=count > 0)
    return mean


OUTPUT_ATTACK = Method(
    name="output_attack",
    title="trained on outputs",
    source=_SOURCE,
    score=functools.partial(_score, reference=False, snapshots=False),
    fitted=True,
)
OUTPUT_ATTACK_REFERENCE = Method(
    name="output_attack_reference",
    title="trained on outputs and shadows",
    source=_SOURCE,
    score=functools.partial(_score, reference=True, snapshots=False),
    needs=frozenset({"shadows"}),
    outside=1,
    fitted=True,
)
OUTPUT_ATTACK_SNAPSHOTS = Method(
    name="output_attack_snapshots",
    title="trained on outputs and snapshots",
    source=_SOURCE,
    score=functools.partial(_score, reference=False, snapshots=True),
    needs=frozenset({"snapshots"}),
    fitted=True,
)
