"""`docs/config.md`, written from the schema: `python -m amint_ray.config.reference`."""

from __future__ import annotations

import inspect
import json
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from amint_ray.config.schema import Config

_HEAD = """# Configuration

Written by `make docs` from `amint_ray/config/schema.py`; edit the docstrings there.

A run is decided by a recipe (`amint train --help` names them) or a YAML file of the same form, then
by `key.path=value` overrides. `amint config RECIPE [overrides]` prints the result. A file may begin
with `extends: RECIPE` (or a file, or a list of them) and give only what differs.
"""


def reference() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *_section(Config, "")]) + "\n"


def _section(section: type[BaseModel], prefix: str) -> list[str]:
    lines = [f"## `{prefix.rstrip('.')}`" if prefix else "## Top level", ""]
    lines += [_one_line(inspect.getdoc(section) or ""), ""]
    nested: list[tuple[type[BaseModel], str]] = []
    rows: list[str] = []
    for name, field in section.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            nested.append((model, f"{prefix}{name}."))
            continue
        default = json.dumps(_plain(field.get_default(call_default_factory=True)))
        meaning = _one_line(field.description or "")
        rows.append(f"| `{prefix}{name}` | {_type(field)} | `{default}` | {meaning} |")
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    for model, below in nested:
        lines += _section(model, below)
    return lines


def _type(field: FieldInfo) -> str:
    """The type in words, with the bounds that its metadata set."""
    text = _type_name(field.annotation)
    for bound in field.metadata:
        for kind, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
            if isinstance(bound, kind):
                value = getattr(bound, kind.__name__.lower())
                text += f", {sign} {value:g}" if abs(value) < 2**53 else ""
    return text


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    if arguments:
        return " or ".join(_type_name(a) for a in arguments)
    names = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(annotation, str(annotation))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
