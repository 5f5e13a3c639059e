"""What all sections of the configuration have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Unknown keys and lax types are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def listed(value: Any) -> Any:
    """One name may stand without its list."""
    return (value,) if isinstance(value, str) else value


# YAML has lists only; a tuple cannot be changed behind the frozen config's back.
Names = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(listed)]
