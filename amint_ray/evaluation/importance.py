"""Which parameters of a search matter. NumPy and scikit-learn only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.evaluation.objectives import is_number, spans_decades
from amint_ray.evaluation.search import Configuration

FEWEST_CONFIGURATIONS = 8
"""Complete configurations below which no parameter's importance is stated."""
_TREES = 100
_REPEATS = 20


def importance(
    configurations: Sequence[Configuration], metric: str
) -> dict[str, dict[str, float]] | None:
    """How much of a metric's variation each parameter explains, as shares that add up to 1.

    A random forest learns the metric from the parameters; a parameter matters as much as the
    forest's out-of-bag squared error grows when its values are shuffled among the configurations
    (L. Breiman, "Random Forests", Machine Learning 45, 2001, section 10). All columns that stand
    for a parameter are shuffled together. One that is there in some branches only is shuffled
    within them, so that the choice of the branch is credited to the parameter that makes it.

    The interval holds 95 % of the shufflings. It does not tell how other trials would have come
    out. Parameters that a sampler moved together share what either explains.

    Args:
        configurations: of which the complete ones count, feasible or not.
        metric: flat dotted name.

    Returns:
        by parameter, the most important first, `{value, low, high}`; None with too few
        configurations, where metric or parameters do not vary, or where the forest guesses no
        better out of bag than the mean does. The same for the same configurations, in any order.
    """
    measured = [(each.value(metric), each) for each in configurations if each.complete]
    pairs = sorted(((v, c) for v, c in measured if v is not None), key=lambda pair: pair[1].number)
    y = np.array([value for value, _ in pairs])
    features = _encode([each.parameters for _, each in pairs])
    if len(y) < FEWEST_CONFIGURATIONS or np.ptp(y) == 0 or not any(f.varies for f in features):
        return None
    # In units of the metric's variance: a forest that errs by 1 knows no more than the mean does.
    error, growth = _error_growth(features, (y - y.mean()) / y.std())
    if error >= 1:
        return None
    total = float(np.maximum(growth.mean(axis=1), 0).sum())
    if total <= 0:
        return None
    value = np.maximum(growth.mean(axis=1), 0) / total
    grown = np.maximum(growth, 0)
    shares = grown / np.maximum(grown.sum(axis=0), 1e-12)
    low, high = np.quantile(shares, (0.025, 0.975), axis=1)
    low, high = np.minimum(low, value), np.maximum(high, value)
    return {
        features[i].name: {
            "value": float(value[i]),
            "low": float(low[i]),
            "high": float(high[i]),
        }
        for i in np.argsort(-value, kind="stable")
    }


@dataclass(frozen=True)
class _Feature:
    """A parameter as a forest sees it.

    Attributes:
        name: the parameter's.
        columns: (n, k).
        rows: those among which it is shuffled.
        varies: whether shuffling can change anything.
    """

    name: str
    columns: npt.NDArray[np.float32]
    rows: npt.NDArray[np.intp]
    varies: bool


def _encode(parameters: Sequence[Mapping[str, Any]]) -> list[_Feature]:
    """Numbers as they are or as logarithms, categories one-hot, and whether there is a value."""
    names = sorted({name for each in parameters for name in each})
    present = {name: np.array([name in each for each in parameters], bool) for name in names}
    numeric = {
        name: all(is_number(each[name]) for each in parameters if name in each) for name in names
    }
    features = []
    for name in names:
        here = present[name]
        values = [each[name] for each in parameters if name in each]
        if numeric[name]:
            numbers = np.array(values, float)
            numbers = np.log10(numbers) if spans_decades(numbers) else numbers
            column = np.full(len(here), np.median(numbers))
            column[here] = numbers
            columns = [column]
        else:
            texts = [repr(each[name]) if name in each else "" for each in parameters]
            columns = [np.array([t == text for t in texts]) for text in sorted({*texts} - {""})]
        told = any(
            _tells(parameters, other, here)
            for other in names
            # A branch's parameter may tell what is missing deeper in that branch.
            if not numeric[other]
            and (present[other] | ~here).all()
            and (present[other] > here).any()
        )
        if not told and not here.all():
            columns.append(here)
        rows = np.flatnonzero(here) if told else np.arange(len(here))
        block = np.column_stack(columns).astype(np.float32)
        features.append(_Feature(name, block, rows, bool(np.ptp(block[rows], axis=0).any())))
    return features


def _tells(
    parameters: Sequence[Mapping[str, Any]], other: str, here: npt.NDArray[np.bool_]
) -> bool:
    """Whether each value of the other parameter goes with always or never having this one."""
    seen: dict[str, set[bool]] = {}
    for each, there in zip(parameters, here.tolist(), strict=True):
        seen.setdefault(repr(each[other]) if other in each else "", set()).add(there)
    return all(len(states) == 1 for states in seen.values()) and 2 * len(seen) <= len(here)


def _error_growth(
    features: Sequence[_Feature], y: npt.NDArray[np.float64]
) -> tuple[float, npt.NDArray[np.float64]]:
    """The forest's out-of-bag squared error, and by how much shuffling each parameter raises it.

    The latter is (parameters, repeats).

    scikit-learn's `permutation_importance` shuffles single columns and scores on what the forest
    was grown from or on data held out, of which a search has none to spare.
    """
    from sklearn.ensemble import RandomForestRegressor  # takes a second

    x = np.column_stack([feature.columns for feature in features])
    forest = RandomForestRegressor(_TREES, min_samples_leaf=2, random_state=0, n_jobs=1).fit(x, y)
    rng = np.random.default_rng(0)
    out_of_bag = np.ones((_TREES, len(y)), bool)
    for left_out, drawn in zip(out_of_bag, forest.estimators_samples_, strict=True):
        left_out[drawn] = False
    counts = out_of_bag.sum(axis=0)

    def error(variants: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """(variants, n, columns) → (variants,): of the mean of the trees that never saw a row."""
        sums = np.zeros(variants.shape[:2])
        for tree, rows in zip(forest.estimators_, out_of_bag, strict=True):
            seen = np.ascontiguousarray(variants[:, rows]).reshape(-1, variants.shape[2])
            sums[:, rows] += tree.predict(seen, check_input=False).reshape(len(variants), -1)
        known = counts > 0
        found: npt.NDArray[np.float64] = ((sums[:, known] / counts[known] - y[known]) ** 2).mean(
            axis=1
        )
        return found

    plain = float(error(x[None])[0])
    growth = np.zeros((len(features), _REPEATS))
    start = 0
    for i, feature in enumerate(features):
        end = start + feature.columns.shape[1]
        if feature.varies:
            variants = np.repeat(x[None], _REPEATS, axis=0)
            for variant in variants:
                shuffled = rng.permutation(feature.rows)
                variant[feature.rows, start:end] = x[shuffled, start:end]
            growth[i] = error(variants) - plain
        start = end
    return plain, growth
