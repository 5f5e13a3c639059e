"""What a search found: configurations, their front, the best of them. NumPy and SciPy only.

A *trial* is one training run, told as a JSON-like mapping
(`id`, `configuration`, `seed`, `state`, `parameters`, `settings`, `figures`, `violation`, …); a
*configuration* is what its trials, which differ by seed alone, have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from amint_ray.evaluation.objectives import (
    Objective,
    figure_value,
    goodness,
)

Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Configuration:
    """Trials that differ by seed alone, put together.

    Attributes:
        number: what the search calls it.
        parameters: as sampled, by name.
        settings: configuration keys that differ from the recipe.
        figures: by flat dotted name `{value, low, high, seeds}`: the mean over the trials that
            state it, and how many those are.
        trials: their ids, by seed.
        seeds: one a trial.
        states: one a trial.
        violation: how far the constraint is broken, on average; None: there is none, or nothing is
            known.
        feasible: whether the constraint, where there is one, is known to be kept by every trial.
        complete: whether every trial is done and states every objective.
    """

    number: int
    parameters: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Figures
    trials: tuple[str, ...]
    seeds: tuple[int, ...]
    states: tuple[str, ...]
    violation: float | None
    feasible: bool
    complete: bool

    @property
    def state(self) -> str:
        """`done` where every trial is; else what keeps it from that."""
        return next((s for s in _UNFINISHED if s in self.states), "done")

    def value(self, metric: str) -> float | None:
        """A figure's mean, or None."""
        return figure_value(self.figures, metric)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


_UNFINISHED = ("running", "waiting", "failed", "stopped")


@dataclass(frozen=True)
class Choice:
    """What a search would take.

    Attributes:
        configuration: the best; None where none is complete.
        feasible: whether it keeps the constraint. Where none does, it is the one that breaks it
            least.
    """

    configuration: Configuration | None
    feasible: bool


def configurations(
    trials: Sequence[Mapping[str, Any]],
    objectives: Sequence[Objective],
    *,
    constrained: bool = False,
    confidence: float = 0.95,
) -> list[Configuration]:
    """The candidates of a search, by number; baselines are none.

    The interval of a figure is, over two or more trials, Student's t-interval of their mean, which
    tells how training seeds differ; of a single trial it is the trial's own, which tells how images
    do. Where all trials' own limits lie within 0 and 1, as a rate's do, so do the mean's.

    Args:
        trials: in any order.
        objectives: what a complete configuration has to state.
        constrained: whether there is a constraint, of which each trial's `violation` has to tell.
        confidence: of the t-intervals.
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for trial in trials:
        if not trial["baseline"]:
            groups.setdefault(trial["configuration"], []).append(trial)
    return [
        _put_together(groups[n], objectives, confidence, constrained=constrained)
        for n in sorted(groups)
    ]


def baseline(
    trials: Sequence[Mapping[str, Any]], *, confidence: float = 0.95
) -> Configuration | None:
    """The baselines' trials put together in the same way; None without any."""
    group = [trial for trial in trials if trial["baseline"]]
    return _put_together(group, (), confidence, constrained=False) if group else None


def _put_together(
    trials: Sequence[Mapping[str, Any]],
    objectives: Sequence[Objective],
    confidence: float,
    *,
    constrained: bool,
) -> Configuration:
    ordered = sorted(trials, key=lambda trial: (trial["seed"], trial["id"]))
    first = ordered[0]
    names = dict.fromkeys(name for trial in ordered for name in trial["figures"])
    figures = {}
    for name in names:
        stated = [t["figures"] for t in ordered if figure_value(t["figures"], name) is not None]
        figures[name] = _mean([each[name] for each in stated], confidence)
    broken = [trial["violation"] for trial in ordered if trial["violation"] is not None]
    return Configuration(
        number=first["configuration"],
        parameters=first["parameters"],
        settings=first["settings"],
        figures=figures,
        trials=tuple(trial["id"] for trial in ordered),
        seeds=tuple(trial["seed"] for trial in ordered),
        states=tuple(trial["state"] for trial in ordered),
        violation=float(np.mean(broken)) if broken else None,
        feasible=not any(broken) and (not constrained or len(broken) == len(ordered)),
        complete=all(
            trial["state"] == "done"
            and all(figure_value(trial["figures"], m) is not None for m, _ in objectives)
            for trial in ordered
        ),
    )


def _mean(figures: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """Several trials' figure as one."""
    n = len(figures)
    if n == 0:
        return {"value": None, "low": None, "high": None, "seeds": 0}
    values = np.array([figure["value"] for figure in figures], float)
    low, high = figures[0].get("low"), figures[0].get("high")
    if n > 1:
        error = values.std(ddof=1) / math.sqrt(n)
        half = float(stdtrit(n - 1, (1 + confidence) / 2) * error)
        low, high = float(values.mean() - half), float(values.mean() + half)
        limits = [figure.get(end) for figure in figures for end in ("low", "high")]
        if all(limit is not None and 0 <= limit <= 1 for limit in limits):
            low, high = max(0.0, low), min(1.0, high)
    return {"value": float(values.mean()), "low": low, "high": high, "seeds": n}


def front(
    configurations: Sequence[Configuration], axes: Sequence[Objective]
) -> list[Configuration]:
    """The complete, feasible configurations that none is better than on one axis, worse on none.

    Equal ones are all on the front. One that lacks the figure of an axis is not.

    Args:
        configurations: candidates.
        axes: as `objectives.front_axes` gives them.

    Returns:
        the best on the first axis first.
    """
    able = [
        each
        for each in configurations
        if each.complete
        and each.feasible
        and all(each.value(metric) is not None for metric, _ in axes)
    ]
    points = _points(able, axes)
    kept = [
        each
        for each, point in zip(able, points, strict=True)
        if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
    ]
    return sorted(kept, key=lambda each: (-_points([each], axes)[0, 0], each.number))


def best(configurations: Sequence[Configuration], objectives: Sequence[Objective]) -> Choice:
    """The configuration to take.

    With one objective the best feasible one. With several, the one of the front that is nearest to
    the ideal point (the best value of each axis, which none may have together), by Euclid's
    distance where each axis runs from 0 to 1 over the front. Equals go by number. Where none is
    feasible, the one that breaks the constraint least, and those of which that is not known last;
    equals by the first objective.
    """
    complete = [
        each
        for each in configurations
        if each.complete and all(each.value(metric) is not None for metric, _ in objectives)
    ]
    if not complete:
        return Choice(None, feasible=False)
    feasible = [each for each in complete if each.feasible]
    if not feasible:
        first = _points(complete, objectives[:1])[:, 0].tolist()
        worst = [
            (math.inf if c.violation is None else c.violation, -x, c.number)
            for c, x in zip(complete, first, strict=True)
        ]
        return Choice(complete[worst.index(min(worst))], feasible=False)
    able = front(feasible, objectives)
    points = _points(able, objectives)
    ideal = points.max(axis=0)
    width = ideal - points.min(axis=0)
    distance = np.linalg.norm((ideal - points) / np.where(width > 0, width, 1), axis=1)
    # Rounded: what is equally far may differ in the last bit.
    ranked = [(d, c.number) for d, c in zip(distance.round(12).tolist(), able, strict=True)]
    return Choice(able[ranked.index(min(ranked))], feasible=True)


def _points(
    configurations: Sequence[Configuration], axes: Sequence[Objective]
) -> npt.NDArray[np.float64]:
    """(n, axes): figures, all of which are there, larger is better."""
    rows = []
    for each in configurations:
        values = [(each.value(metric), mode) for metric, mode in axes]
        rows.append([goodness(v, mode) for v, mode in values if v is not None])
    return np.array(rows, float).reshape(len(configurations), len(axes))
