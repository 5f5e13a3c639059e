"""What a search keeps as JSON, read again: by another version, or after a disk was full."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from amint_ray.contracts import first_line

Kept = TypeVar("Kept")


def read_kept(kind: type[Kept], text: bytes) -> Kept:
    """A dataclass from what `asdict` made of it; each field is there and of its type.

    Args:
        kind: the dataclass.
        text: JSON.

    Raises:
        ValueError: it is damaged; one line says how.
    """
    values: Any = json.loads(text)
    try:
        # As it is checked a whole number becomes a real one where a field may have either; what is
        # read must be what was written.
        TypeAdapter(kind).validate_json(text, strict=True)
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error
    except TypeError as error:  # a field that this version does not have
        raise ValueError(first_line(error)) from error
