"""The figures of a registered version, as its tags.

A version carries its headline figures as tags, so that whoever sees the registry can compare
versions without their runs. `figure_tags` says how a figure is written; the tags are:

    amint.recipe                    the recipe's name
    amint.task_accuracy             on `test`
    amint.member_auc                MINT head, `member` against `test`
    amint.member_tpr_at_fpr_1pct    the same: TPR at 1 % FPR, threshold from `calibration`
    amint.withheld_auc              MINT head, `withheld` against `test`
    amint.withheld_tpr_at_fpr_1pct  the same
    amint.confidence                of the figures' intervals
    amint.confounders_clean         true, false, or unknown where the check was not made
    amint.manifest_fingerprint      of the images and their roles
    amint.config_fingerprint        of all that can change the model or its figures
    amint.key_fingerprint           SHA-256 of the key, of a head that says codes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FIGURES = {
    "task_accuracy": ("task accuracy", ("task", "accuracy")),
    "member_auc": ("AUC, member", ("membership", "member", "auc")),
    "member_tpr_at_fpr_1pct": (
        "TPR at 1 % FPR, member",
        ("membership", "member", "tpr_at_fpr", "0.01"),
    ),
    "withheld_auc": ("AUC, withheld", ("membership", "withheld", "auc")),
    "withheld_tpr_at_fpr_1pct": (
        "TPR at 1 % FPR, withheld",
        ("membership", "withheld", "tpr_at_fpr", "0.01"),
    ),
}
"""Tag without `amint.`: what the figure is called, and where a run's document has it."""
_NOT_REPORTED = "not reported: "

Figure = Mapping[str, Any]
"""`{value, low, high}`, all None with a `note` where the figure is not reported."""


def headline_tags(document: Mapping[str, Any]) -> dict[str, str]:
    """What a version registered from a run says about itself; see the top of this module.

    Args:
        document: the run's, as `launch.record.record` returns it.
    """
    tags = {"amint.recipe": str(document["recipe"])}
    for name, (_, path) in FIGURES.items():
        found: Any = document
        for key in path:
            found = found.get(key, {})
        tags |= figure_tags(name, found)
    confounders = document["confounders"]
    clean = None if confounders is None else confounders["clean"]
    return tags | {
        "amint.confidence": f"{document['confidence']:g}",
        "amint.confounders_clean": "unknown" if clean is None else str(clean).lower(),
        "amint.manifest_fingerprint": document["manifest_fingerprint"],
        "amint.config_fingerprint": document["config_fingerprint"],
        **({"amint.key_fingerprint": key} if (key := document["key_fingerprint"]) else {}),
    }


def figure_tags(name: str, figure: Figure) -> dict[str, str]:
    """A figure as `amint.NAME`, `amint.NAME.low` and `amint.NAME.high`, to the last digit.

    One that is not reported has `amint.NAME` alone: `not reported: ` and why.
    """
    if figure.get("value") is None:
        why = figure.get("note") or "the run did not measure it (evaluation.fprs)"
        return {f"amint.{name}": f"{_NOT_REPORTED}{why}"}
    keys = {"": "value", ".low": "low", ".high": "high"}
    return {f"amint.{name}{end}": repr(float(figure[key])) for end, key in keys.items()}


def read_figure(name: str, tags: Mapping[str, str]) -> dict[str, Any]:
    """A figure from tags; one that is not there, or no number, is not reported."""
    text = tags.get(f"amint.{name}", "no such tag")
    if text.startswith(_NOT_REPORTED) or text == "no such tag":
        return _unknown(text.removeprefix(_NOT_REPORTED))
    value, low, high = (_number(tags.get(f"amint.{name}{end}")) for end in ("", ".low", ".high"))
    if value is None:
        return _unknown(f"the tag amint.{name} is no number: {text!r}")
    return {"value": value, "low": low, "high": high}


def _unknown(note: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "note": note}


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def told(figure: Figure) -> str:
    """`value [low, high]`; with so many digits that a difference which decides can be seen."""
    low, high = figure["low"], figure["high"]
    limits = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{figure['value']:.6g}{limits}"
