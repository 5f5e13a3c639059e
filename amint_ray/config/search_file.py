"""A search file as it was written, with what the command line changes in it, checked by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import ValidationError

from amint_ray.config.load import (
    NAME_IN_WORDS,
    did_you_mean,
    explain,
    is_name,
    keys_of_file,
    merge_override,
    read_tree,
)
from amint_ray.config.schema import Config
from amint_ray.config.search_schema import SearchSpec
from amint_ray.contracts import UserError, first_line

_WHOLE = ("objective", "constraint")
"""What the command line replaces: half of the file's and half of another mean nothing."""
_REFERENCE = re.compile(r"\$\{\s*variables\.([A-Za-z0-9_-]+)")
_MISSING = re.compile(r"Interpolation key '(?:variables\.)?(.+)' not found")


def read_search(file: str, overrides: Sequence[str]) -> tuple[SearchSpec, list[str]]:
    """What a search file asks for.

    Args:
        file: path of a YAML file.
        overrides: `key.path=value` each.

    Returns:
        The file's content with what the command line changes in it, and those overrides that are
        meant for the configuration.

    Raises:
        UserError: no such file, an unknown key, a bad value. The text says where.
    """
    if Path(file).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"search: {file!r} is no YAML file; give the path of a search file, such as "
            "tune_configs/digits.yaml"
        )
    tree, written = read_tree(file), keys_of_file(file)
    _check_kind(file, tree, written)
    own, others = _sorted_out(overrides)
    named = "name" in written or "name" in map(key_of, own)
    if not named and not is_name(Path(file).stem):
        raise UserError(
            f"search: {file}: the file's name cannot be that of the search: a name "
            f"{NAME_IN_WORDS}; give it one with name=OTHER"
        )
    variables = {str(name) for name in tree.get("variables") or {}}
    variables |= set(_REFERENCE.findall(str(OmegaConf.to_container(tree))))
    for override in own:
        _check_variable(override, variables)
        tree = _changed(tree, override)
    return _validated(tree, file, own), others


def key_of(override: str) -> str:
    """The dotted key that an override sets."""
    return override.partition("=")[0].strip()


def _check_kind(file: str, tree: DictConfig, written: Mapping[str, Any]) -> None:
    """Whether it is a search file.

    Args:
        file: its path.
        tree: with all that it extends.
        written: what it says itself.

    Raises:
        UserError: it is a recipe, or is written as if it were one.
    """
    keys = {str(key) for key in tree} - {"name"}
    of_configuration = keys & set(Config.model_fields)
    if of_configuration and not keys & set(SearchSpec.model_fields):
        raise UserError(
            f"search: {file}: is a recipe, not a search file; `amint train {file}` takes it"
        )
    if "extends" in written and of_configuration - set(written):
        base = written["extends"]
        raise UserError(
            f"search: {file}: a search file names a recipe and extends none: write `recipe: "
            f"{base if isinstance(base, str) else 'NAME'}` instead of `extends`"
        )


def _sorted_out(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the search file, and of the configuration.

    Raises:
        UserError: one is of neither.
    """
    own: list[str] = []
    others: list[str] = []
    for override in overrides:
        section = key_of(override).partition(".")[0]
        if "=" in override and section not in {**SearchSpec.model_fields, **Config.model_fields}:
            raise UserError(
                f"search: override {override!r}: unknown key; the search file has "
                f"{', '.join(SearchSpec.model_fields)}, the configuration "
                f"{', '.join(Config.model_fields)}"
            )
        (own if section in SearchSpec.model_fields else others).append(override)
    return own, others


def _check_variable(override: str, known: set[str]) -> None:
    """Whether a variable that is set is one of the file's.

    Raises:
        UserError: it is not.
    """
    section, _, name = key_of(override).partition(".")
    name = name.partition(".")[0]
    if section == "variables" and name and name not in known:
        there = f"there are {', '.join(sorted(known))}" if known else "it has none"
        raise UserError(
            f"search: override {override!r}: the file uses no variable {name!r}"
            f"{did_you_mean(name, sorted(known))}; {there}"
        )


def _changed(tree: DictConfig, override: str) -> DictConfig:
    """The tree with one override of its own; what can only be given whole takes the old's place."""
    if key_of(override) in _WHOLE:
        tree.pop(key_of(override), None)
    if key_of(override) == "space" and isinstance(there := tree.get("space"), DictConfig):
        given = merge_override(OmegaConf.create(), override)["space"]
        for key in given if isinstance(given, DictConfig) else ():
            there.pop(key, None)
    return merge_override(tree, override)


def _validated(tree: DictConfig, file: str, overrides: Sequence[str]) -> SearchSpec:
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"search: {file}: {_unresolved(error, tree)}") from error
    try:
        return SearchSpec.model_validate(values)
    except ValidationError as error:
        lines = explain(error, SearchSpec)
        told = [f"search: {_source(line, file, overrides)}: {line}" for line in lines]
        raise UserError("\n".join(told)) from error


def _unresolved(error: OmegaConfBaseException, tree: DictConfig) -> str:
    """What a reference lacks, in words."""
    missing = _MISSING.match(first_line(error))
    if missing is None or not isinstance(error, InterpolationKeyError):
        return first_line(error)
    names = ", ".join(sorted(map(str, tree.get("variables") or {}))) or "none"
    return (
        f"there is no variable {missing[1]!r} to refer to (`variables` has {names}); set it there, "
        f"or with variables.{missing[1]}=VALUE"
    )


def _source(line: str, file: str, overrides: Sequence[str]) -> str:
    """Who set what a complaint is about: the last override of that key, or the file."""
    for override in reversed(overrides):
        key = re.escape(key_of(override))
        if re.match(rf"(unknown key ')?{key}(?![A-Za-z0-9_])", line):
            return f"override {override!r}"
    return file
