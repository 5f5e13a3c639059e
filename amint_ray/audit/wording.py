"""Numbers, dates and names as the report prints them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from amint_ray.contracts import numbered

_SPACE = "\u00a0"
_NOTHING = "–"
_SMALLEST = 1e-300
"""Below it a p-value says no more, and a float soon nothing at all."""
_LONGEST = 48
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def shown(value: Any) -> Any:
    """What the page holds for a value: a dash for None, and no sign that cannot be seen.

    Control signs, those that turn the direction of writing and bytes that are no UTF-8 are written
    as escapes: a file's name must not look like another's, nor spoil the page.
    """
    if value is None:
        return _NOTHING
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return "".join(map(_visible, value))
    return value


def p_text(p: float | None) -> str:
    """A p-value: 0.0123, 1.0 × 10⁻⁹."""
    if p is None:
        return _NOTHING
    if p >= 0.001:
        return f"{p:.3g}"
    if p < _SMALLEST:
        return f"less than 10{str(math.floor(math.log10(_SMALLEST))).translate(_SUPERSCRIPTS)}"
    mantissa, exponent = f"{p:.1e}".split("e")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{mantissa}{_SPACE}×{_SPACE}10{power}"


def percent(share: float | None) -> str:
    """A share of 1: 80 %, 0.05 %."""
    return _NOTHING if share is None else f"{100 * share:.3g}{_SPACE}%"


def number(value: float | None) -> str:
    """Any other number, to three digits; counts in full, with thousands apart."""
    if value is None:
        return _NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def interval(figure: Mapping[str, Any] | float | None, *, shares: bool = False) -> str:
    """A figure with its interval, or why there is none.

    Args:
        figure: `value`, `low` and `high`; `note` may say why the value is None. Or the value alone.
        shares: write per cent.
    """
    text = percent if shares else number
    if isinstance(figure, int | float):
        return text(figure)
    if figure is None or figure["value"] is None:
        note = (figure or {}).get("note")
        return f"not known: {note}" if note else "not known"
    value = text(figure["value"])
    if figure.get("low") is None or figure.get("high") is None:
        return value
    return f"{value} ({text(figure['low'])} to {text(figure['high'])})"


def areas(auc: Mapping[str, Any]) -> list[tuple[str, str]]:
    """An evidence's AUC, or one a role, each with what it is called."""
    by_role = {"": auc} if "value" in auc else auc
    return [(f"AUC, {role}" if role else "AUC", interval(of)) for role, of in by_role.items()]


def date(moment: str) -> str:
    """An ISO date as 27 November 2026, 11:32 UTC."""
    at = datetime.fromisoformat(moment).astimezone(UTC)
    return f"{at.day} {at:%B %Y, %H:%M} UTC"


def clause(sentence: str) -> str:
    """A sentence as the end of another: without its full stop and first capital."""
    text = sentence.strip().rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def count(number: int, noun: str, plural: str = "") -> str:
    """So many of something: 1 image, 2,000 images."""
    return f"{number:,}{_SPACE}{noun if number == 1 else plural or noun + 's'}"


def counts(files: Mapping[str, int]) -> str:
    """Numbers of files by what they are: 1,200 .heic files, 1 hidden file."""
    return ", ".join(numbered(number, kind) for kind, number in files.items())


def capitalise(text: str) -> str:
    """With a capital in front; the rest stays."""
    return text[:1].upper() + text[1:]


def shortened(name: str) -> str:
    """A name for below a thumbnail: the end of a path says more than its beginning."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def seconds(parts: Mapping[str, float]) -> str:
    """How long each part took."""
    return ", ".join(f"{name} {took:.3g}" for name, took in parts.items()) or _NOTHING


def _visible(sign: str) -> str:
    if sign.isprintable() or sign == _SPACE:
        return sign
    code = ord(sign)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


FILTERS: dict[str, Callable[..., Any]] = {
    "p": p_text,
    "percent": percent,
    "number": number,
    "interval": interval,
    "areas": areas,
    "date": date,
    "clause": clause,
    "of": count,
    "counts": counts,
    "capitalise": capitalise,
    "shortened": shortened,
    "seconds": seconds,
}
GLOBALS: dict[str, Mapping[str, str]] = {
    "evidence_names": {
        "head": "membership head",
        "outputs": "model's outputs",
        "key": "secret codes",
    },
    "evidence_titles": {
        "head": "The membership head",
        "outputs": "The model's outputs, without the head",
    },
    "label_words": {
        "own": "the suspects' own",
        "prediction": "the model's predictions, as the suspects bear none",
        "mixed": "the suspects' own where they bear one, else the model's predictions; the two "
        "are tested apart, and the p-value is twice the smaller one",
    },
    "line_words": {
        "member": "The head, on images that it was told of as members.",
        "withheld": "The head, on images that trained the classifier but were kept from the head.",
        "blind": "A classifier that never sees the model. Far from 0.5, the split itself gives "
        "members away and no figure can be trusted.",
        "loss": "The model's loss alone, which anyone with the model and the labels can compute, "
        "on images that trained the classifier but were kept from the head.",
        "loss_member": "The same on images that the head was told of as members.",
    },
}
"""What the templates call the document's keys."""
