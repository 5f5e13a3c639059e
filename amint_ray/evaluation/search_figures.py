"""Pictures of a search: front, importances, learning curves.

Matplotlib without pyplot's global state. Nothing is taken for granted: there may be one trial or
hundreds, and none that is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from amint_ray.evaluation.objectives import (
    Objective,
    figure_value,
    goodness,
    short_names,
    shown,
)
from amint_ray.evaluation.parallel_figure import LETTERS, empty
from amint_ray.evaluation.search import Configuration

_FRONT, _BROKEN, _GREY, _BUSY, _PLAIN = "#0072b2", "#d55e00", "#999999", "#009e73", "#000000"


def pareto(
    configurations: Sequence[Configuration],
    front: Sequence[Configuration],
    axes: Sequence[Objective],
    baseline: Configuration | None = None,
) -> Figure:
    """Every configuration by the first axis and each other one; the front with its intervals.

    Args:
        configurations: all of them; what is not complete is drawn as it was last seen.
        front: as `search.front` gives it.
        axes: two or more.
        baseline: the plain model; a line where it has one figure of the two, a star for both.
    """
    panels = len(axes) - 1
    figure = Figure(figsize=(1 + 5 * panels, 5.2), layout="constrained")
    for panel, second in zip(figure.subplots(1, panels, squeeze=False)[0], axes[1:], strict=True):
        _front_panel(panel, configurations, front, (axes[0], second), stairs=panels == 1)
        if baseline is not None:
            _draw_baseline(panel, baseline, axes[0][0], second[0])
        _scale_to_points(panel)
        _number(panel, front, axes[0][0], second[0])
    handles = {
        label: handle
        for panel in figure.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=3, fontsize="small"
        )
    return figure


def _front_panel(
    panel: Axes,
    configurations: Sequence[Configuration],
    front: Sequence[Configuration],
    axes: tuple[Objective, Objective],
    *,
    stairs: bool,
) -> None:
    (x_name, x_mode), (y_name, y_mode) = axes
    numbers = {each.number for each in front}
    groups: dict[str, list[tuple[float, float]]] = {}
    for each in configurations:
        x, y = each.value(x_name), each.value(y_name)
        if x is not None and y is not None and each.number not in numbers:
            groups.setdefault(_kind(each), []).append((x, y))
    for kind, style in _MARKERS.items():
        if kind in groups:
            label = f"{kind} ({len(groups[kind])})"
            panel.scatter(*np.array(groups[kind]).T, label=label, **style)
    on_front = [each for each in front if None not in (each.value(x_name), each.value(y_name))]
    on_front.sort(key=lambda each: goodness(each.value(x_name) or 0.0, x_mode))
    if on_front:
        x_error, y_error = (_errors(on_front, name) for name in (x_name, y_name))
        xs, ys = ([each.value(name) or 0.0 for each in on_front] for name in (x_name, y_name))
        panel.errorbar(
            xs, ys, xerr=x_error, yerr=y_error, fmt="none", ecolor=_FRONT, alpha=0.45, zorder=3
        )
        if stairs:
            panel.step(xs, ys, where="pre", color=_FRONT, linewidth=1, zorder=3)
        label = f"front ({len(on_front)})"
        panel.scatter(xs, ys, s=34, color=_FRONT, edgecolors="white", label=label, zorder=4)
    elif not groups:
        empty(panel, "no trial states both figures")
    for axis, name, mode in ((panel.xaxis, x_name, x_mode), (panel.yaxis, y_name, y_mode)):
        axis.set_label_text(f"{name}\n({'larger' if mode == 'max' else 'smaller'} is better)")


_MARKERS: dict[str, dict[str, Any]] = {
    "stopped early": {"marker": "x", "s": 22, "color": _GREY, "linewidths": 1, "zorder": 1},
    "failed": {"marker": "+", "s": 30, "color": _GREY, "linewidths": 1, "zorder": 1},
    "not finished": {"marker": "o", "s": 18, "facecolors": "none", "edgecolors": _BUSY},
    "lacks an objective": {"marker": "s", "s": 18, "facecolors": "none", "edgecolors": _GREY},
    "breaks the constraint": {"marker": "v", "s": 24, "facecolors": "none", "edgecolors": _BROKEN},
    "done": {"marker": "o", "s": 18, "color": "#7fb8d8", "zorder": 2},
}


def _kind(configuration: Configuration) -> str:
    if configuration.complete:
        return "done" if configuration.feasible else "breaks the constraint"
    if configuration.state == "done":
        return "lacks an objective"
    kinds = {"stopped": "stopped early", "failed": "failed"}
    return kinds.get(configuration.state, "not finished")


def _errors(configurations: Sequence[Configuration], metric: str) -> list[list[float]]:
    """Distances of a figure's limits from its value, 0 where there are none: [below, above]."""
    below, above = [], []
    for each in configurations:
        value = each.value(metric) or 0.0
        low, high = (each.figures[metric].get(end) for end in ("low", "high"))
        below.append(0.0 if low is None else max(0.0, value - low))
        above.append(0.0 if high is None else max(0.0, high - value))
    return [below, above]


def _draw_baseline(panel: Axes, baseline: Configuration, x_name: str, y_name: str) -> None:
    x, y = baseline.value(x_name), baseline.value(y_name)
    style: dict[str, Any] = {"color": _PLAIN, "linestyle": "--", "linewidth": 1, "zorder": 2}
    label = "plain training (λ₂ = 0)"
    if x is not None and y is not None:
        panel.scatter([x], [y], marker="*", s=90, color=_PLAIN, label=label, zorder=4)
    elif x is not None:
        panel.axvline(x, label=label, **style)
    elif y is not None:
        panel.axhline(y, label=label, **style)


def _number(panel: Axes, front: Sequence[Configuration], x_name: str, y_name: str) -> None:
    """Write the front's numbers beside its points, where they do not cover each other."""
    written: list[tuple[float, float]] = []
    for each in front:
        x, y = each.value(x_name), each.value(y_name)
        if x is None or y is None:
            continue
        at = panel.transLimits.transform((x, y))
        if all(abs(at[0] - a) > 0.06 or abs(at[1] - b) > 0.04 for a, b in written):
            written.append((at[0], at[1]))
            panel.annotate(
                str(each.number),
                (x, y),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize="small",
                zorder=5,
            )


def _scale_to_points(panel: Axes) -> None:
    """Let long intervals, such as those of two seeds, run out of the panel.

    They may take as much room as the points do on either side.
    """
    points = [np.asarray(drawn.get_offsets(), float) for drawn in panel.collections if _has(drawn)]
    lines = [line for line in panel.lines if line.get_linestyle() == "--"]
    if not points:
        return
    found = np.concatenate(points)
    for i, limits in enumerate((panel.get_xlim, panel.get_ylim)):
        values = list(found[:, i])
        for line in lines:
            ends = np.asarray(line.get_xydata(), float)[:, i]
            values += [ends[0]] if ends[0] == ends[1] else []
        low, high = min(values), max(values)
        room = high - low if high > low else math.inf
        lower, upper = limits()
        set_limits = (panel.set_xlim, panel.set_ylim)[i]
        set_limits(max(lower, low - room), min(upper, high + room))


def _has(drawn: Any) -> bool:
    """Whether a collection is points; error bars' lines have no offsets of their own."""
    return type(drawn).__name__ == "PathCollection" and len(drawn.get_offsets()) > 0


_MOST_BARS = 20


def importance_bars(
    importances: Mapping[str, Mapping[str, Mapping[str, float]] | None],
) -> Figure:
    """How much of each metric's variation the parameters explain.

    Args:
        importances: by metric, as `importance.importance` gives them.
    """
    bars = max((len(found) for found in importances.values() if found), default=1)
    panels = max(1, len(importances))
    height = 1.6 + 0.3 * min(bars, _MOST_BARS)
    figure = Figure(figsize=(1 + 5 * panels, height), layout="constrained")
    short = short_names({name for found in importances.values() for name in found or ()})
    all_panels = figure.subplots(1, panels, squeeze=False)[0]
    for panel, (metric, found) in zip(all_panels, importances.items(), strict=False):
        panel.set_title(metric, fontsize="medium")
        if found is None:
            empty(panel, "too few complete configurations,\nor nothing that parameters explain")
            continue
        names = list(found)[:_MOST_BARS]
        values = np.array(
            [[found[name][key] for key in ("value", "low", "high")] for name in names]
        )
        below, above = values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]
        panel.barh(
            range(len(names)),
            values[:, 0],
            xerr=np.maximum([below, above], 0),
            color="#7fb8d8",
            error_kw={"ecolor": _FRONT, "capsize": 2, "elinewidth": 1},
        )
        panel.set_yticks(range(len(names)), [shown(short[name], LETTERS) for name in names])
        panel.set(xlim=(0, None), ylim=(len(names) - 0.4, -0.6))
        more = len(found) - len(names)
        panel.set_xlabel("share of the variation explained" + (f"; {more} more" if more else ""))
    return figure


def learning_curves(trials: Sequence[Mapping[str, Any]], metric: str, mode: str) -> Figure:
    """A metric by epoch, a curve a trial; where one was stopped, its curve ends in a cross.

    Args:
        trials: with their `history`.
        metric: flat dotted name.
        mode: "max" or "min": which trial is drawn as the best of those that are done.
    """
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    panel = figure.subplots()
    curves = [(trial, _curve(trial, metric)) for trial in trials]
    curves = [(trial, curve) for trial, curve in curves if len(curve)]
    done = [
        t for t, _ in curves if t["state"] == "done" and not t["baseline"] | bool(t["violation"])
    ]
    rated = [(figure_value(trial["figures"], metric), trial["id"]) for trial in done]
    known = [(goodness(value, mode), name) for value, name in rated if value is not None]
    best = max(known, key=lambda pair: pair[0])[1] if known else None
    counts: dict[str, int] = {}
    for trial, _ in curves:
        kind = _curve_kind(trial, best)
        counts[kind] = counts.get(kind, 0) + 1
    labelled = set()
    fade = 1.0 if len(curves) <= 20 else 0.5
    for trial, curve in curves:
        kind = _curve_kind(trial, best)
        style = {"linewidth": 1.0, "alpha": fade, **_CURVES[kind]}
        label = f"the best, {best}" if kind == "best" else f"{kind} ({counts[kind]})"
        label = kind if trial["baseline"] and counts[kind] == 1 else label
        marker, colour = style.pop("end", None), style["color"]
        drawn = {"label": None if kind in labelled else label, **style}
        labelled.add(kind)
        end = [len(curve) - 1]
        alone = "." if len(curve) == 1 and marker is None else None
        panel.plot(*curve.T, marker=marker or alone, markevery=end, markersize=5, **drawn)
        panel.lines[-1].set_markeredgecolor(colour)
    panel.set_xlabel("epoch")
    panel.set_ylabel(f"{metric}\n({'larger' if mode == 'max' else 'smaller'} is better)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves:
        figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    else:
        empty(panel, "no trial states this figure")
    return figure


_CURVES: dict[str, dict[str, Any]] = {
    "done": {"color": "#7fb8d8", "zorder": 2},
    "best": {"color": _FRONT, "linewidth": 2.2, "alpha": 1.0, "zorder": 4},
    "stopped": {"color": _GREY, "end": "x", "zorder": 1},
    "failed": {"color": _BROKEN, "end": "+", "zorder": 1},
    "not finished": {"color": _BUSY, "zorder": 2},
    "plain training (λ₂ = 0)": {"color": _PLAIN, "linestyle": "--", "zorder": 3},
}


def _curve_kind(trial: Mapping[str, Any], best: str | None) -> str:
    if trial["baseline"]:
        return "plain training (λ₂ = 0)"
    if trial["id"] == best:
        return "best"
    return trial["state"] if trial["state"] in ("done", "stopped", "failed") else "not finished"


def _curve(trial: Mapping[str, Any], metric: str) -> Any:
    """(looks, 2): epoch and value, where there is one."""
    points = [(entry["epoch"], entry.get(metric)) for entry in trial["history"]]
    return np.array([(e, v) for e, v in points if v is not None and math.isfinite(v)], float)
