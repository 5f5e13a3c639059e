"""The keys' pages, written from the schemas.

`python -m amint_ray.config.reference` gives docs/config.md; with `search` behind it,
docs/search_keys.md; with `attack`, docs/attack_keys.md; with `audit`, docs/audit_keys.md.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from amint_ray.config.attack import AttackSettings
from amint_ray.config.audit import AuditSettings
from amint_ray.config.schema import Config
from amint_ray.config.search_schema import SearchSpec

_HEAD = """# Configuration

Written by `make docs` from `amint_ray/config/schema.py`; edit the docstrings there.

A run is decided by a recipe (`amint train --help` names them) or a YAML file of the same form, then
by `key.path=value` overrides. `amint config RECIPE [overrides]` prints the result. A file may begin
with `extends: RECIPE` (or a file, or a list of them) and give only what differs.
"""
_SEARCH_HEAD = """# Keys of a search file

Written by `make docs` from `amint_ray/config/search_schema.py`; edit the docstrings there.
[search.md](search.md) says how they work together.

A file may begin with `extends: FILE` and give only what differs. Any key can be set on the command
line, for instance `budget.trials=8`. A key that is none of these is one of the configuration
([config.md](config.md)), for all trials.
"""
_ATTACK_HEAD = """# Keys of an attack

Written by `make docs` from `amint_ray/config/attack.py`; edit the docstrings there.
[attacks.md](attacks.md) says how they work together.

They are set on the command line of `amint attack`, for instance `attack.shadows=32`. Beside them,
where a run's images and storage are now may be given (`data.path`, `storage.path` …).
"""

_AUDIT_HEAD = """# Keys of an audit

Written by `make docs` from `amint_ray/config/audit.py`; edit the docstrings there.
[audit.md](audit.md) says what an audit is.

They are set on the command line of `amint audit`, for instance `audit.evidence=head`. Beside
them the keys of `cluster` may be given ([config.md](config.md)).
"""


def reference() -> str:
    """All keys of the configuration, as Markdown."""
    return "\n".join([_HEAD, *_section(Config, "")]) + "\n"


def search_reference() -> str:
    """All keys of a search file, as Markdown."""
    return "\n".join([_SEARCH_HEAD, *_section(SearchSpec, "")]) + "\n"


def attack_reference() -> str:
    """All keys of an attack, as Markdown."""
    return "\n".join([_ATTACK_HEAD, *_section(AttackSettings, "attack.")]) + "\n"


def audit_reference() -> str:
    """All keys of an audit, as Markdown."""
    return "\n".join([_AUDIT_HEAD, *_section(AuditSettings, "audit.")]) + "\n"


def _section(section: type[BaseModel], prefix: str, said: str = "") -> list[str]:
    """A heading, what the section is, a table of its keys, and the sections below.

    Args:
        section: its schema.
        prefix: of its keys, with a dot at the end.
        said: of this use of it.
    """
    lines = [f"## `{prefix.rstrip('.')}`" if prefix else "## Top level", ""]
    lines += [f"{_one_line(inspect.getdoc(section) or '')} {said}".rstrip(), ""]
    nested: list[tuple[type[BaseModel], str, str]] = []
    rows: list[str] = []
    for name, field in section.model_fields.items():
        meaning = _one_line(field.description or "")
        default = "must be given"
        if not field.is_required():
            default = f"`{json.dumps(_plain(field.get_default(call_default_factory=True)))}`"
        if (model := _model_of(field.annotation)) is not None:
            of_it = "" if model is field.annotation else f"{meaning} Default: {default}."
            nested.append((model, f"{prefix}{name}.", of_it))
            continue
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {default} | {meaning} |")
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    for model, below, of_it in nested:
        lines += _section(model, below, of_it)
    return lines


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: one, none or one, or several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_of(a)) is not None), None)


def _type(field: FieldInfo) -> str:
    """The type in words, with the bounds that its metadata set."""
    text = _type_name(field.annotation)
    for bound in field.metadata:
        for kind, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
            if isinstance(bound, kind):
                value = getattr(bound, kind.__name__.lower())
                shown = str(value) if isinstance(value, int) else f"{value:g}"
                text += f", {sign} {shown}" if abs(value) < 2**53 else ""
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
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    pages = {"search": search_reference, "attack": attack_reference, "audit": audit_reference}
    print(pages.get(" ".join(sys.argv[1:]), reference)(), end="")
