"""A search as parallel coordinates. Matplotlib without pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from amint_ray.evaluation.objectives import (
    Objective,
    goodness,
    is_number,
    metric_names,
    short_names,
    shown,
    spans_decades,
)
from amint_ray.evaluation.search import Configuration


@dataclass(frozen=True)
class _Scale:
    """A vertical axis of the parallel coordinates.

    Attributes:
        name: what stands above it.
        heights: by configuration, from 0 to 1.
        ticks: heights and texts.
        gaps: whether a configuration has no value; its height is 0.
    """

    name: str
    heights: list[float]
    ticks: list[tuple[float, str]]
    gaps: bool


_ABSENT = 0.0
_LOWEST = 0.12
"""Heights of the tick for "no value" and of the smallest value, if there is the former."""
_FEW = 6
"""Numbers that are all told beside their axis, if they are not too close."""
LETTERS = 22
"""Of a value or name that is longer; the tables have it whole."""


def parallel_coordinates(
    configurations: Sequence[Configuration], objectives: Sequence[Objective]
) -> Figure:
    """A line a configuration through its parameters and figures, coloured by the first objective.

    Parameters that do not vary are left out. What is not complete is grey, as its figures are of
    another epoch.
    """
    names = sorted({name for each in configurations for name in each.parameters})
    short = short_names(names) | metric_names(metric for metric, _ in objectives)
    scales = []
    for name in names:
        values = [each.parameters.get(name, _MISSING) for each in configurations]
        if len({repr(value) for value in values}) > 1 or len(configurations) == 1:
            scales.append(_scale(short[name], values))
    for metric, _ in objectives:
        figures = [each.value(metric) for each in configurations]
        scales.append(_scale(short[metric], [_MISSING if v is None else v for v in figures]))
    width = max(6.0, 1.6 + 1.35 * len(scales))
    figure = Figure(figsize=(width, 5), layout="constrained")
    panel = figure.subplots()
    panel.set_axis_off()
    panel.set(xlim=(-0.75, len(scales) - 0.6), ylim=(-0.06, 1.03))
    if not configurations:
        empty(panel, "no trial yet")
        return figure
    _draw_lines(figure, panel, configurations, scales, objectives[0], short)
    for x, scale in enumerate(scales):
        panel.plot([x, x], [0, 1], color="#000000", linewidth=0.8, zorder=5)
        panel.text(
            x,
            1.05,
            shown(scale.name, LETTERS),
            ha="left",
            va="bottom",
            rotation=25,
            fontsize="small",
        )
        if scale.gaps:
            panel.text(x, -0.03, "–", ha="center", va="top", fontweight="bold")
        for height, text in scale.ticks:
            panel.text(
                x - 0.04,
                height,
                text,
                ha="right",
                va="center",
                fontsize="x-small",
                zorder=6,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            )
    return figure


_MISSING: Any = object()


def _scale(name: str, values: Sequence[Any]) -> _Scale:
    """Where values lie on an axis: numbers by size or its logarithm, categories evenly."""
    here = [value for value in values if value is not _MISSING]
    gaps = len(here) < len(values)
    floor = _LOWEST if gaps else 0.0
    numeric = all(is_number(value) for value in here)
    at, ticks = (_number_ticks if numeric else _category_ticks)(here)
    heights = [
        _ABSENT if value is _MISSING else floor + (1 - floor) * at[repr(value)] for value in values
    ]
    ticks = [(floor + (1 - floor) * height, text) for height, text in ticks]
    return _Scale(name, heights, ticks, gaps)


_Ticks = tuple[dict[str, float], list[tuple[float, str]]]
"""Heights by a value's `repr`, and the ticks' heights and texts."""


def _number_ticks(values: Sequence[float]) -> _Ticks:
    if not values:
        return {}, []
    log = spans_decades(values)
    numbers = {value: math.log10(value) if log else float(value) for value in values}
    ordered = sorted({*numbers.values()})
    low, high = ordered[0], ordered[-1]
    apart = min((b - a for a, b in pairwise(ordered)), default=0.0)
    if len(ordered) <= _FEW and apart >= 0.05 * (high - low):
        marks = [(number, shown(value)) for value, number in numbers.items()]
    elif log:
        marks = [(float(e), f"1e{e}") for e in range(math.ceil(low), math.floor(high) + 1)]
        marks = marks[:: math.ceil(len(marks) / 8)]
    else:
        whole = all(isinstance(value, int) for value in values)
        found = np.asarray(MaxNLocator(5, integer=whole).tick_values(low, high))
        marks = [(t, f"{t:.4g}") for t in found.tolist() if low <= t <= high]

    def height(number: float) -> float:
        return 0.5 if high == low else (number - low) / (high - low)

    at = {repr(value): height(numbers[value]) for value in values}
    return at, [(height(mark), text) for mark, text in marks]


def _category_ticks(values: Sequence[Any]) -> _Ticks:
    kinds = dict(sorted((repr(value), value) for value in values))
    at = {kind: (i + 0.5) / len(kinds) for i, kind in enumerate(kinds)}
    every = math.ceil(len(kinds) / 16)
    return at, [(at[kind], shown(kinds[kind], LETTERS)) for kind in list(kinds)[::every]]


def _draw_lines(
    figure: Figure,
    panel: Axes,
    configurations: Sequence[Configuration],
    scales: Sequence[_Scale],
    objective: Objective,
    short: Mapping[str, str],
) -> None:
    metric, mode = objective
    values = [each.value(metric) if each.complete else None for each in configurations]
    known = [value for value in values if value is not None]
    colours = ScalarMappable(Normalize(*((min(known), max(known)) if known else (0, 1))), "viridis")
    many = len(configurations) > 60
    for i, (each, value) in enumerate(zip(configurations, values, strict=True)):
        style: dict[str, Any] = {"color": "#c8c8c8", "linewidth": 0.6, "zorder": 1}
        if value is not None:
            rank = sum(goodness(other, mode) < goodness(value, mode) for other in known)
            style = {
                "color": colours.to_rgba(np.array(value)),
                "linewidth": 0.9 if many else 1.4,
                "zorder": 2 + rank / len(known),
                "linestyle": "-" if each.feasible else ":",
            }
        # Of categories many share a height: apart a little, so that each can be seen.
        apart = 0.02 * (2 * ((i * 0.618034) % 1) - 1) if len(configurations) > 1 else 0.0
        heights = [scale.heights[i] for scale in scales]
        panel.plot(
            range(len(scales)),
            [height + apart for height in heights],
            marker="o" if len(scales) == 1 else None,
            **style,
        )
    if len(set(known)) > 1:
        bar = figure.colorbar(colours, ax=panel, shrink=0.8, pad=0.01)
        bar.set_label(short[metric])
    told = [f"{len(known)} complete"]
    if len(known) < len(configurations):
        told.append(f"{len(configurations) - len(known)} not complete (grey)")
    if any(
        value is not None and not c.feasible
        for c, value in zip(configurations, values, strict=True)
    ):
        told.append("dotted: breaks the constraint")
    panel.text(
        0.5,
        -0.06,
        "; ".join(told),
        transform=panel.transAxes,
        ha="center",
        va="top",
        fontsize="small",
    )


def empty(panel: Axes, text: str) -> None:
    """Say why there is nothing in a panel."""
    panel.set(xticks=[], yticks=[])
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#999999")
