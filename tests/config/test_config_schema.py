"""The schema: documented, frozen, and a fingerprint over all that changes the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from amint_ray.config import reference
from amint_ray.config.attack import AttackSettings
from amint_ray.config.audit import AuditSettings
from amint_ray.config.load import fingerprint, load_config
from amint_ray.config.schema import Config
from amint_ray.config.search_schema import SearchSpec
from amint_ray.config.section import Section

LEFT_OUT = ("cluster", "storage", "tracking", "data.path", "data.memory_gib", "data.readers")
LEFT_OUT += ("data.timeout_seconds", "data.external.path", "mint.key_env", "mint.key_file")


def sections(model: type[BaseModel] = Config, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every section with its dotted path, the root first."""
    yield path, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{path}.{name}".lstrip("."))


def fields() -> list[str]:
    """Dotted paths of all keys that hold a value."""
    inner = {path for path, _ in sections()}
    return [
        key
        for path, section in sections()
        for name in section.model_fields
        if (key := f"{path}.{name}".lstrip(".")) not in inner
    ]


def altered(model: BaseModel, path: str) -> Any:
    """A copy with another value of the right type at `path`."""
    head, _, rest = path.partition(".")
    value = getattr(model, head)
    annotation: Any = type(model).model_fields[head].annotation
    new: Any
    if rest:
        new = altered(value, rest)
    elif get_origin(annotation) is Literal:
        new = next(v for v in get_args(annotation) if v != value)
    elif value is None:
        new = "something" if str in get_args(annotation) else 5
    elif isinstance(value, bool):
        new = not value
    elif isinstance(value, int | float):
        new = value + 1
    elif isinstance(value, str):
        new = value + "x"
    elif isinstance(value, tuple):
        new = value + value[:1] or ("something",)
    else:
        new = {**value, "something": 1}
    return model.model_copy(update={head: new})


def test_the_walk_over_the_schema_finds_keys_of_all_depths() -> None:
    assert {"name", "train.lr", "data.shares.external", "tracking.experiment"} <= set(fields())
    assert len(fields()) > 40


@pytest.mark.parametrize("path", fields())
def test_fingerprint_changes_with_all_but_the_place_of_the_run(path: str) -> None:
    config = Config()
    other = altered(config, path)
    assert other != config
    same = fingerprint(other) == fingerprint(config)
    assert same == path.startswith(LEFT_OUT)


def test_fingerprint_is_of_values_however_they_were_given() -> None:
    config = load_config("digits")
    plain = fingerprint(config)
    same = [f"train.epochs={config.train.epochs}", f"loss.lambda_mint={config.loss.lambda_mint:g}"]
    assert fingerprint(load_config("digits", same)) == plain
    assert len(plain) == 16
    assert int(plain, 16) >= 0


def test_every_key_is_documented() -> None:
    inner = {path for path, _ in sections()}
    for path, section in sections():
        assert (section.__doc__ or "").strip(), f"section {path} has no docstring"
        for name, field in section.model_fields.items():
            key = f"{path}.{name}".lstrip(".")
            assert key in inner or (field.description or "").strip(), f"{key} has no docstring"


def test_written_reference_is_up_to_date_and_complete() -> None:
    page = reference.reference()
    for key in fields():
        assert f"| `{key}` |" in page
    stored = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert stored.read_text(encoding="utf-8") == page, "run `make docs`"


def test_written_reference_of_search_files_is_up_to_date_and_complete() -> None:
    page = reference.search_reference()
    schema = SearchSpec.model_json_schema()
    inner = {name.lower(): sorted(s["properties"]) for name, s in schema["$defs"].items()}
    assert "objective" in inner and "paper" in inner
    keys = {f"{section}.{name}" for section, names in inner.items() for name in names}
    for key in keys | set(schema["properties"]) - set(inner):
        assert re.search(rf"^\| `{key}` \| .+ \| .+ \| \S.+ \|$", page, re.MULTILINE), key
    stored = Path(__file__).resolve().parents[2] / "docs" / "search_keys.md"
    assert stored.read_text(encoding="utf-8") == page, "run `make docs`"


@pytest.mark.parametrize(
    ("name", "page", "settings"),
    [
        ("attack", reference.attack_reference(), AttackSettings),
        ("audit", reference.audit_reference(), AuditSettings),
    ],
    ids=["attack", "audit"],
)
def test_written_reference_of_a_command_is_up_to_date_and_complete(
    name: str, page: str, settings: type[Section]
) -> None:
    for key in settings.model_fields:
        assert re.search(rf"^\| `{name}\.{key}` \| .+ \| .+ \| \S.+ \|$", page, re.MULTILINE), key
    stored = Path(__file__).resolve().parents[2] / "docs" / f"{name}_keys.md"
    assert stored.read_text(encoding="utf-8") == page, "run `make docs`"


def test_config_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.train.lr = 0.5  # type: ignore[misc]


def test_registered_model_name() -> None:
    assert load_config("cifar10_resnet50").registered_model == "amint-cifar10-resnet50"
    assert load_config("digits", ["tracking.model_name=mine"]).registered_model == "mine"


@pytest.mark.parametrize(
    ("batch_size", "ratio", "rows"), [(64, 1.0, 64), (9, 0.25, 2), (64, 4.0, 256), (10, 0.04, 0)]
)
def test_rows_of_e_in_a_batch(batch_size: int, ratio: float, rows: int) -> None:
    train = {"batch_size": batch_size, "external_ratio": ratio}
    assert Config.model_validate({"train": train}).external_rows == rows
    plain = Config.model_validate({"train": train, "loss": {"lambda_mint": 0.0}})
    assert plain.external_rows == 0


@pytest.mark.parametrize(
    ("augment", "views", "lambda_mint", "rows"),
    [
        ("crop_flip", "plain", 1.0, 64),
        ("timm", "plain", 1.0, 64),
        ("crop_flip", "task", 1.0, 0),
        ("crop_flip", "plain", 0.0, 0),
        ("none", "plain", 1.0, 0),
    ],
)
def test_d_has_rows_of_its_own_for_the_head_where_its_views_differ(
    augment: str, views: str, lambda_mint: float, rows: int
) -> None:
    values = {
        "data": {"augment": augment},
        "mint": {"views": views},
        "loss": {"lambda_mint": lambda_mint},
    }
    assert Config.model_validate(values).plain_rows == rows
