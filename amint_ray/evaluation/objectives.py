"""What a search is after, and how its metrics and parameters are named where room is short."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Objective = tuple[str, str]
"""A metric's flat dotted name, and "max" or "min"."""

TASK: Objective = ("task.accuracy", "max")
AUDIT: Objective = ("membership.member.auc", "max")
HEADLINE = (
    TASK[0],
    AUDIT[0],
    "membership.member.tpr_at_fpr.0.01",
    "membership.withheld.auc",
    "membership.withheld.tpr_at_fpr.0.01",
)
"""Figures that are told of a model whatever a search was after."""


def front_axes(objectives: Sequence[Objective]) -> list[Objective]:
    """The axes of a search's front: its objectives, or its only one and the task accuracy.

    Where the task accuracy is the only objective, the other axis is the AUC of the MINT head.
    """
    if len(objectives) != 1:
        return list(objectives)
    return [objectives[0], AUDIT if objectives[0][0] == TASK[0] else TASK]


def goodness(value: float, mode: str) -> float:
    """The value, or for "min" its negative: more is better.

    Raises:
        ValueError: the mode is neither "max" nor "min".
    """
    if mode not in ("max", "min"):
        raise ValueError(f"a mode is max or min, not {mode!r}")
    return value if mode == "max" else -value


def figure_value(figures: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
    """A figure's value; None where it is not reported, not stated or not finite."""
    value = figures.get(metric, {}).get("value")
    return None if value is None or not math.isfinite(value) else float(value)


def spans_decades(values: Iterable[float]) -> bool:
    """Whether positive numbers span more than two powers of ten, so that a log scale suits them."""
    numbers = list(values)
    return bool(numbers) and min(numbers) > 0 and max(numbers) > 100 * min(numbers)


def is_number(value: Any) -> bool:
    """Whether a parameter's value is a finite number; True and False are categories."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each dotted name's shortest ending that no other one has: `loss.lambda_mint` → `lambda_mint`.

    An ending does not begin with a number: of `tpr_at_fpr.0.01` all is kept.
    """
    endings = {name: _endings(name) for name in dict.fromkeys(names)}
    return {
        name: next(
            (e for e in own if not any(e in others for n, others in endings.items() if n != name)),
            name,
        )
        for name, own in endings.items()
    }


def metric_names(metrics: Iterable[str]) -> dict[str, str]:
    """What metrics are called: short, and never like one of `HEADLINE` that is not meant."""
    wanted = dict.fromkeys(metrics)
    names = short_names([*wanted, *HEADLINE])
    return {metric: names[metric] for metric in wanted}


def _endings(name: str) -> list[str]:
    """The endings that may stand for a name, shortest first."""
    parts = name.split(".")
    starts = [i for i in reversed(range(len(parts))) if not parts[i].isdigit()]
    return [".".join(parts[i:]) for i in starts]


def shown(value: Any, width: int | None = None) -> str:
    """A parameter's value as one would type it, numbers to three digits, cut to so many letters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, float):
        text = f"{value:.3g}"
    else:
        text = str(value)
        if text.startswith("["):
            text = text.replace('"', "")
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def shown_parameters(parameters: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """`placement=entry lambda_mint=0.01`.

    Args:
        parameters: by name.
        names: what to call them, as from `short_names`; without it these names are shortened.
    """
    names = short_names(parameters) if names is None else names
    return " ".join(f"{names[key]}={shown(value)}" for key, value in parameters.items())
