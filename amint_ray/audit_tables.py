"""An audit's result as a person reads it; the report has more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amint_ray.contracts import numbered
from amint_ray.tables import interval as told

_VERDICTS = {
    "member": "[bold]member[/]: the collection contains images that the model was trained on",
    "not_member": (
        "[bold]not member[/]: no sign that the model was trained on images of the collection"
    ),
    "no_verdict": "[bold]no verdict[/]",
}
_LINES = {
    "member": "MINT head (codes: their right bits), members against calibration",
    "withheld": "MINT head, training images it was not told of",
    "blind": "blind classifier, members against test",
    "loss": "loss, training images the head was not told of",
    "loss_member": "loss, members",
}


def print_audit(document: Mapping[str, Any], console: Console) -> None:
    """The verdict and why, each kind of evidence, the four lines, and where the report is."""
    suspects, p_value = document["suspects"], document["p_value"]
    p = "" if p_value is None else f" (p = {p_value:.3g}, α = {document['alpha']:g})"
    console.print(_VERDICTS[document["verdict"]] + p)
    for reason in document["reasons"]:
        console.print(f"  because {escape(reason['text'])}; {escape(reason['help'])}")
    for reason in document["reservations"]:
        console.print(f"  but {escape(reason['text'])}; {escape(reason['help'])}")
    unread = f", {suspects['unreadable']:,} unreadable" if suspects["unreadable"] else ""
    console.print(
        f"{numbered(suspects['images'], 'images')} in {escape(suspects['source'])}, "
        f"{suspects['unique']:,} different{unread}; {suspects['flagged']:,} called members at a "
        f"false-discovery rate of {document['fdr']:g}"
    )
    share = document["share"]
    of = f" ({share['of']})" if share["of"] else ""
    console.print(f"share of training images in it{of}: {_share(share)}")
    table = Table("evidence", "p of the collection", "share", "images for power", "method")
    for name, part in document["evidence"].items():
        if not part["available"]:
            table.add_row(name, "–", "–", "–", escape(part["why_not"]))
            continue
        value, needed = part["p_value"], part["power"]["images_for_power"]
        table.add_row(
            name,
            "–" if value is None else f"{value:.3g}",
            told(part["share"]),
            "–" if needed is None else f"{needed:,} ({part['power']['of']})",
            escape(part["method"]),
        )
    console.print(table)
    if "key" in document["evidence"]:
        _print_key(document["evidence"]["key"], console)
    lines = Table("of this model", "AUC")
    for name, words in _LINES.items():
        lines.add_row(words, told(document["lines"][name]))
    console.print(lines)
    console.print(f"report: {escape(document['report'])}")


def _share(share: Mapping[str, Any]) -> str:
    """With its interval, or why it is not known."""
    note = share.get("note")
    return f"not known: {escape(note)}" if share["value"] is None and note else told(share)


def _print_key(key: Mapping[str, Any], console: Console) -> None:
    """What the verdict rests on where the key was asked."""
    rate, known = key["match_rate"], key["known_match_rate"]["member"]
    if rate["value"] is not None:
        console.print(
            f"{key['matched']:,} of {key['bits']:,} bits of the secret codes match "
            f"({rate['value']:.2%}; luck gives half, known members {told(known)})"
        )
    console.print(f"key's fingerprint: {key['key_fingerprint']}")
    console.print(f"it cannot show {escape(key['cannot_show'])}")
