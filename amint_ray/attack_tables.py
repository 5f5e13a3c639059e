"""What a person sees of an attack's result: tables and lines on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amint_ray.tables import interval

_FPR = "0.01"
_LEAST_HOURS = 0.001
"""Core hours below which it does not matter how many."""
_EDITS = {
    "jpeg_90": "JPEG 90",
    "jpeg_75": "JPEG 75",
    "jpeg_50": "JPEG 50",
    "resize_0.9": "resize",
    "shift_1": "shift",
    "flip": "flip",
}


def print_attack(document: Mapping[str, Any], console: Console) -> None:
    """All methods beside each other, how they take edited images, and whether aMINT leaks more."""
    console.print(_methods(document))
    for note, titles in _dashes(document).items():
        text = f"{', '.join(titles)}: {note}"
        console.print(f"{'–':<23} {text}", highlight=False, markup=False, soft_wrap=True)
    edits = [edit for edit in _EDITS if any(edit in m["robustness"] for m in _rows(document))]
    if edits:
        console.print(_robustness(document, edits))
    if document["leak"] is not None:
        console.print(_leak(document["leak"]))
    lines = {
        "[…, …]": f"{document['confidence']:.0%} intervals given the threshold; one model",
        "shadow models": _shadow_models(document["shadows"]),
        "MLflow run": f"{document['run_id']}, artifacts in {document['artifacts']}"
        if document["recorded"]
        else "not told",
        "kept in": document["kept"],
        "seconds": f"{document['seconds']['total']:.1f}, {document['seconds']['reused']} parts of "
        "an earlier attack used again",
    }
    for label, text in lines.items():
        if text:
            console.print(f"{label:<23} {text}", highlight=False, markup=False, soft_wrap=True)


def _shadow_models(shadows: Mapping[str, Any]) -> str:
    """How many tell something; empty where none were asked for."""
    if not shadows["asked"]:
        return ""
    text, failed = f"{shadows['used']} of {shadows['asked']} used", len(shadows["failed"])
    if failed:
        text += f", {failed} {'training' if failed == 1 else 'trainings'} came to nothing"
    return text


def _dashes(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Why figures are not there: the methods' titles by reason."""
    found: dict[str, list[str]] = {}
    for method in _rows(document):
        for question in ("member", "withheld"):
            figures = method[question]
            for figure in (figures["auc"], figures["tpr_at_fpr"].get(_FPR, _NONE)):
                if figure["value"] is None and figure.get("note"):
                    titles = found.setdefault(figure["note"], [])
                    titles += [] if method["title"] in titles else [method["title"]]
    return found


def _rows(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(document["methods"].values())


def _methods(document: Mapping[str, Any]) -> Table:
    counts = document["counts"]
    table = Table(
        title=Text(
            f"{document['model']}: {counts['member']} member and {counts['withheld']} withheld "
            f"images, each against {counts['test']} of test"
        )
    )
    table.add_column("method", overflow="fold")
    for heading in ("member: AUC", "TPR at 1 % FPR", "withheld: AUC", "TPR at 1 % FPR", "core h"):
        table.add_column(heading, justify="right")
    for method in _rows(document):
        cells = []
        for question in ("member", "withheld"):
            figures = method[question]
            cells += [interval(figures["auc"]), interval(figures["tpr_at_fpr"].get(_FPR, _NONE))]
        hours = method["cost"]["core_hours"] + method["cost"]["seconds"] / 3600
        table.add_row(
            method["title"],
            *cells,
            f"{hours:.2g}" if hours >= _LEAST_HOURS else f"< {_LEAST_HOURS:g}",
        )
    return table


_NONE: Mapping[str, Any] = {"value": None, "low": None, "high": None}


def _robustness(document: Mapping[str, Any], edits: list[str]) -> Table:
    table = Table(title="AUC where the suspects were edited: member / withheld")
    table.add_column("method", overflow="fold")
    for heading in ("as it is", *(_EDITS[edit] for edit in edits)):
        table.add_column(heading, justify="right")
    for method in _rows(document):
        if not method["robustness"]:
            continue
        cells = [_pair(method["member"], method["withheld"])]
        for edit in edits:
            figures = method["robustness"][edit]
            cells.append(_pair(figures["member"], figures["withheld"]))
        table.add_row(method["title"], *cells)
    return table


def _pair(member: Mapping[str, Any], withheld: Mapping[str, Any]) -> str:
    return " / ".join(
        "–" if each["auc"]["value"] is None else f"{each['auc']['value']:.3f}".removeprefix("0")
        for each in (member, withheld)
    )


def _leak(leak: Mapping[str, Any]) -> Table:
    table = Table(title="Does aMINT tell an outsider more? All of D against test")
    table.add_column("method", overflow="fold")
    for heading in ("AUC, this model", "λ₂ = 0", "difference", "mean over trainings"):
        table.add_column(heading, justify="right")
    for name, found in leak["pair"].items():
        trainings = (leak["trainings"] or {}).get(name)
        over = "–"
        if trainings is not None:
            over = f"{interval(trainings['auc'])} ({trainings['auc']['pairs']} pairs)"
        table.add_row(
            name,
            interval(found["joint"]["auc"]),
            interval(found["plain"]["auc"]),
            interval(found["difference"]["auc"]),
            over,
        )
    return table
