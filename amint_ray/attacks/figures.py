"""Pictures of the attacks: all ROC curves of a question on one log-log plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.method import Method
from amint_ray.attacks.table import measured_on
from amint_ray.contracts import Role
from amint_ray.evaluation import metrics
from amint_ray.evaluation.outputs import Scores

# Okabe and Ito's colours, told apart by the colour-blind; then the same with other dashes.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":")


def attack_curves(
    methods: Sequence[Method],
    evidence: Evidence,
    scores: Mapping[str, Scores],
    figures: Mapping[str, Any],
    *,
    question: Role,
) -> Figure:
    """TPR over FPR of every method that has scores, both axes logarithmic.

    Both axes begin at 1 / images of `test`, the smallest rate that can be seen but none. A method
    keeps its colour and dashes whatever the others are.

    Args:
        methods: in the order of the table.
        evidence: tells the roles, and what fitted methods knew.
        scores: by method (n,).
        figures: by method, what `table.measure` gave.
        question: `member` or `withheld`.
    """
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    floor = 1 / max(1, int(evidence.of(Role.TEST).sum()))
    for i, method in enumerate(methods):
        area = figures.get(method.name, {}).get(question.value, {}).get("auc", {"value": None})
        if area["value"] is None:
            continue
        values = scores[method.name]
        kept = measured_on(method, evidence, values)
        fpr, tpr = metrics.roc(
            values[kept & evidence.of(question)], values[kept & evidence.of(Role.TEST)]
        )
        axes.step(
            np.maximum(fpr, floor / 2),
            np.maximum(tpr, floor / 2),
            where="post",
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_DASHES[i // len(_COLOURS) % len(_DASHES)],
            linewidth=1.3,
            label=f"{method.title}: {area['value']:.3f}",
        )
    diagonal = np.array([floor, 1.0])
    axes.plot(diagonal, diagonal, color="#bbbbbb", linewidth=1, label="chance: 0.500")
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.05))
    axes.set_xlabel("false-positive rate on test")
    axes.set_ylabel(f"true-positive rate on {question.value}")
    axes.set_title(f"Attacks: {question.value} against test")
    # Beside the plot: fifteen lines of text would hide what is drawn.
    figure.legend(loc="outside right upper", fontsize="x-small", title="AUC")
    return figure
