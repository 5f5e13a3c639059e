"""Pictures of a run: ROC curves and score histograms. Matplotlib without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from amint_ray.contracts import Role, ScoreTable
from amint_ray.evaluation import metrics

_COLOURS = {
    Role.MEMBER: "#0072b2",
    Role.WITHHELD: "#d55e00",
    Role.EXTERNAL: "#999999",
    Role.CALIBRATION: "#009e73",
    Role.TEST: "#000000",
}


def roc_curves(table: ScoreTable, figures: Mapping[str, Any]) -> Figure:
    """TPR over FPR with a logarithmic FPR axis, one curve a question.

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
        fpr, tpr = metrics.roc(table.of(role).mint_logit, negatives)
        axes.step(
            np.maximum(fpr, floor),
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
