"""Pictures of a run: losses, ROC, scores, calibration. Matplotlib without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amint_ray.contracts import Role, ScoreTable
from amint_ray.evaluation import metrics
from amint_ray.evaluation.calibration import p_values

_POINTS = 200
"""Of a band: more would not be seen."""
_GROUPS, _NAME = 40, 24
"""Groups that one picture has room for, and letters of their names."""

_COLOURS = {
    Role.MEMBER: "#0072b2",
    Role.WITHHELD: "#d55e00",
    Role.EXTERNAL: "#999999",
    Role.CALIBRATION: "#009e73",
    Role.TEST: "#000000",
}


def roc_curves(table: ScoreTable, figures: Mapping[str, Any]) -> Figure:
    """TPR over FPR with a logarithmic FPR axis, one curve a question, with the interval of its TPR.

    Args:
        table: the scores.
        figures: what `evaluation.report.evaluate` made of them.
    """
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    negatives = table.of(Role.TEST).mint_logit
    floor = 0.5 / max(1, len(negatives))
    for role in (Role.MEMBER, Role.WITHHELD):
        area = figures["membership"][role.value]["auc"]
        if area["value"] is None:
            continue
        scores = table.of(role).mint_logit
        fpr, tpr = metrics.roc(scores, negatives)
        fpr = np.maximum(fpr, floor)
        _band(axes, fpr, tpr, len(scores), figures["confidence"], colour=_COLOURS[role])
        axes.step(
            fpr,
            tpr,
            where="post",
            color=_COLOURS[role],
            label=f"{role}: AUC {area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]",
        )
    diagonal = np.geomspace(floor, 1, 200)
    axes.plot(diagonal, diagonal, color="#bbbbbb", linestyle=":", label="chance")
    axes.set(xscale="log", xlim=(floor, 1), ylim=(0, 1.02))
    axes.set_xlabel("false-positive rate on test")
    axes.set_ylabel("true-positive rate")
    axes.set_title("MINT head")
    axes.legend(loc="upper left", fontsize="small")
    return figure


def _band(
    axes: Axes,
    x: npt.NDArray[np.float64],
    rates: npt.NDArray[np.float64],
    trials: int,
    confidence: float,
    *,
    colour: str,
) -> None:
    """The Clopper-Pearson interval of rates, each of so many trials, point by point."""
    at = np.unique(np.linspace(0, len(x) - 1, _POINTS).astype(int))
    intervals = [
        metrics.proportion(round(rates[i] * trials), trials, confidence=confidence) for i in at
    ]
    low, high = ([getattr(each, end) for each in intervals] for end in ("low", "high"))
    axes.fill_between(x[at], low, high, step="post", color=colour, alpha=0.15, linewidth=0)


def calibration_curve(table: ScoreTable, figures: Mapping[str, Any]) -> Figure:
    """How often images of `test`, which were not trained on, get a p-value of at most α.

    On the diagonal where p-values mean what they say; what is above it accuses too many. The two
    sets are finite: the band, which is of `test` alone, need not hold the diagonal everywhere.
    """
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    p = np.sort(p_values(table.of(Role.TEST).mint_logit, table.of(Role.CALIBRATION).mint_logit))
    levels = np.geomspace(max(p.min(initial=1.0), 1e-5), 1, _POINTS)
    rates = np.searchsorted(p, levels, side="right") / max(len(p), 1)
    _band(axes, levels, rates, len(p), figures["confidence"], colour=_COLOURS[Role.TEST])
    axes.step(levels, rates, where="post", color=_COLOURS[Role.TEST], label=f"test ({len(p)})")
    axes.plot(levels, levels, color="#bbbbbb", linestyle=":", label="as promised")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("α")
    axes.set_ylabel("share of p-values at or below α")
    axes.set_title("Calibration of membership p-values")
    axes.legend(loc="upper left", fontsize="small")
    return figure


def loss_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Both losses and the accuracies by epoch.

    Args:
        history: one entry an epoch, as `train.loop.Trained` has them.
    """
    figure = Figure(figsize=(5.5, 6), layout="constrained")
    losses, accuracies = figure.subplots(2, sharex=True)
    epochs = [entry["epoch"] for entry in history]
    for axes, names in (
        (losses, ("train/task_loss", "train/mint_loss", "calibration/task_loss")),
        (accuracies, ("train/task_accuracy", "calibration/task_accuracy")),
    ):
        for name in names:
            if all(name in entry for entry in history):
                axes.plot(epochs, [entry[name] for entry in history], label=name)
        axes.legend(fontsize="small")
    losses.set_ylabel("loss in nats")
    losses.set_yscale("log")
    accuracies.set_ylabel("accuracy")
    accuracies.set_xlabel("epoch")
    return figure


def score_histograms(table: ScoreTable) -> Figure:
    """The MINT logit's distribution in every role, as densities over common bins."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    bins = np.histogram_bin_edges(table.mint_logit, bins=40)
    for role in Role:
        scores = table.of(role).mint_logit
        if len(scores):
            axes.hist(
                scores,
                bins=list(bins),
                density=True,
                histtype="step",
                linewidth=1.5,
                color=_COLOURS[role],
                label=f"{role} ({len(scores)})",
            )
    axes.set_xlabel("MINT logit")
    axes.set_ylabel("density")
    axes.set_title("Membership scores by role")
    axes.legend(fontsize="small")
    return figure


def group_intervals(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Figure:
    """Each group's AUC and false-positive rate with their intervals, beside those of all images.

    Args:
        found: what `by_group.group_figures` gave; of many groups those that stand out are drawn.
        figures: what `evaluation.report.evaluate` gave of all images.
    """
    whole = figures["membership"]["member"]
    shown = most_apart(found["groups"], whole["realised_fpr"]["value"], _GROUPS)
    figure = Figure(figsize=(7, 1.6 + 0.22 * len(shown)), layout="constrained")
    areas, rates = figure.subplots(1, 2, sharey=True)
    for axes, name, colour in (
        (areas, "member", _COLOURS[Role.MEMBER]),
        (areas, "withheld", _COLOURS[Role.WITHHELD]),
        (rates, "realised_fpr", _COLOURS[Role.TEST]),
    ):
        shift = 0.15 * (axes is areas) * (1 if name == "withheld" else -1)
        rows = [(i + shift, group[name]) for i, group in enumerate(shown)]
        rows = [(y, leaf) for y, leaf in rows if leaf["value"] is not None]
        values = [leaf["value"] for _, leaf in rows]
        lengths = [
            [value - leaf["low"] for value, (_, leaf) in zip(values, rows, strict=True)],
            [leaf["high"] - value for value, (_, leaf) in zip(values, rows, strict=True)],
        ]
        y = [y for y, _ in rows]
        axes.errorbar(values, y, xerr=lengths, fmt="o", markersize=3, color=colour, label=name)
        leaf = whole["realised_fpr"] if axes is rates else figures["membership"][name]["auc"]
        if leaf["value"] is not None:
            axes.axvline(leaf["value"], color=colour, linestyle=":", linewidth=1)
    areas.set_yticks(range(len(shown)), [group["group"][:_NAME] for group in shown])
    areas.invert_yaxis()
    areas.set(xlabel="AUC against the group's test images", xlim=(0, 1))
    areas.legend(fontsize="x-small", loc="lower left")
    rates.set_xlabel("false-positive rate on test")
    rates.set_xlim(left=0)
    figure.suptitle("MINT head by group; dotted: all images", fontsize="medium")
    return figure


def most_apart(
    groups: Sequence[Mapping[str, Any]], rate: float | None, most: int
) -> list[Mapping[str, Any]]:
    """Of many groups those whose false-positive rates differ most from that of all, in their order.

    Args:
        groups: as from `by_group.group_figures`.
        rate: of all images of `test`; None: not known.
        most: groups.
    """

    def distance(at: int) -> float:
        value = groups[at]["realised_fpr"]["value"]
        return -1.0 if value is None or rate is None else abs(value - rate)

    chosen = sorted(range(len(groups)), key=distance, reverse=True)[:most]
    return [groups[at] for at in sorted(chosen)]
