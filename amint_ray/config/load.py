"""From a recipe or a YAML file and `key.path=value` overrides to a checked `Config`."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
import re
import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from amint_ray.config.mint_schema import SET_FOR_CODES, set_for_codes
from amint_ray.config.schema import Config
from amint_ray.contracts import MAYBE_KEY, UserError, first_line

_MOST_LINES = 5
_LARGEST_FILE = 1_000_000
_PARTS = "parts/"
NAME_IN_WORDS = "has letters from a to z, digits, '_' and '-', and begins with a letter or digit"
"""What `is_name` asks for."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def recipe_names() -> list[str]:
    """Recipes that ship with the package, sorted."""
    folder = resources.files("amint_ray") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def load_config(recipe: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe with overrides applied.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file; None: the defaults.
        overrides: `key.path=value` each, in OmegaConf's dotlist syntax; later ones win. A mapping
            of free keys (`model.options={}`) takes the place of the recipe's.

    Raises:
        UserError: no such recipe, a file that does not parse, an unknown key, a wrong type, a
            value out of range. The text names key, value and what is allowed.
    """
    tree = OmegaConf.create() if recipe is None else read_tree(recipe)
    return configured(tree, overrides, shipped=recipe in recipe_names())


def load_run(recipe: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run of its own, which uses what it names.

    Raises:
        UserError: as `load_config`; or it names a key and learns no codes, as some trials of a
            search may.
    """
    mint = (config := load_config(recipe, overrides)).mint
    if mint.names_key and not mint.coded:
        named = "mint.key_env" if mint.key_file is None else "mint.key_file"
        raise UserError(
            f"{named} names a key, and mint.objective=binary learns no codes; take "
            "mint.objective=keyed or both, or leave the key out"
        )
    return config


def configured(tree: DictConfig, overrides: Sequence[str], *, shipped: bool = False) -> Config:
    """The same from a recipe's tree, which stays as it is.

    Args:
        tree: as `read_tree` gives it.
        overrides: as for `load_config`.
        shipped: whether nobody but us wrote it; what a user writes stays as it is.

    Raises:
        UserError: likewise.
    """
    tree, given = copy.deepcopy(tree), OmegaConf.create()
    for override in overrides:
        tree, given = merge_override(tree, override), merge_override(given, override)
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_unresolved(error)}") from error
    if shipped:
        told = {key for key in SET_FOR_CODES if OmegaConf.select(given, key) is not None}
        values = set_for_codes(values, told)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"config: {line}" for line in explain(error, Config))) from error


def _unresolved(error: OmegaConfBaseException) -> str:
    """What a `${…}` lacks, in words."""
    missing = re.match(r"Interpolation key '(.+)' not found", first_line(error))
    if missing is None:
        return first_line(error)
    return f"${{{missing[1]}}}: there is no key {missing[1]!r} to refer to{nearest_key(missing[1])}"


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """A line for each of the first few things that pydantic found wrong with a `root`."""
    lines = [_explain(e, root) for e in _roots(error.errors())]
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return lines[:_MOST_LINES] + more


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text.replace("${", "\\${")  # to be read as it stands, not as a reference


def fingerprint(config: Config) -> str:
    """16 hex digits over everything that can change the trained model or its figures.

    Where data and key lie and where the run is computed and recorded is left out.
    """
    elsewhere = {"cluster": True, "storage": True, "tracking": True}
    reading = {"path", "memory_gib", "readers", "timeout_seconds"}
    data = dict.fromkeys(reading, True) | {"external": {"path"}}
    named = {"key_file", "key_env"}
    values = config.model_dump(mode="json", exclude={**elsewhere, "data": data, "mint": named})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


HARMLESS = (
    "data.confounder_check",
    "data.external.path",
    "data.max_bad_fraction",
    "data.memory_gib",
    "data.path",
    "data.readers",
    "data.timeout_seconds",
    "evaluation",
    "mint.key_env",
    "mint.key_file",
    "train.checkpoint_every",
    "train.checkpoint_steps",
)
"""Keys and sections that do not touch the weights: a run that goes on may have them otherwise."""
ELSEWHERE = ("cluster", "storage", "tracking")
"""Sections that say where a run is computed and kept."""


def training_fingerprint(config: Config) -> str:
    """16 hex digits over everything that can change the weights."""
    values = config.model_dump(mode="json", exclude=set(ELSEWHERE))
    for key in HARMLESS:
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, values).pop(name)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def is_name(text: str) -> bool:
    """Whether runs and searches can be called so."""
    return _NAME.fullmatch(text) is not None


def keys_of_file(file: str) -> dict[str, Any]:
    """What a file that `read_tree` has taken says itself; values are text, lists or mappings."""
    return yaml.load(_read_text(file)[1], yaml.BaseLoader) or {}


def read_tree(recipe: str, within: tuple[str, ...] = ()) -> DictConfig:
    """A recipe or file as a tree, on top of what it extends.

    Args:
        recipe: name or path.
        within: the files that extend it, outermost first.
    """
    where, text = _read_text(recipe)
    if where in within:
        raise UserError(
            f"config: {' extends '.join([*within, where])}, in a circle; take one `extends` out"
        )
    try:
        # Everything is text to the base loader: it tells the shape and trips over no value.
        if not isinstance(yaml.load(text, yaml.BaseLoader) or {}, dict):
            raise UserError(
                f"config: {where}: holds no mapping; write `key: value` lines, such as `train: "
                "{epochs: 3}`"
            )
        tree = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"config: {where}{place}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"config: {where}: not valid YAML: {first_line(error)}") from error
    assert isinstance(tree, DictConfig)
    bases = tree.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list | ListConfig) or not all(isinstance(base, str) for base in bases):
        raise UserError(
            f"config: {where}: extends = {bases}: name a recipe, a file, or a list of them"
        )
    if "name" not in tree:
        tree["name"] = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(recipe).stem).strip("-_") or "custom"
    below = [read_tree(_beside(recipe, base), (*within, where)) for base in bases]
    merged = OmegaConf.merge(*below, tree)
    assert isinstance(merged, DictConfig)
    return merged


def _beside(recipe: str, base: str) -> str:
    """A file that a file extends is looked for beside it."""
    beside = Path(recipe).parent / base
    return str(beside) if _is_file_name(base) and not Path(base).is_absolute() else base


def _is_file_name(recipe: str) -> bool:
    return Path(recipe).suffix in (".yaml", ".yml") or (
        "/" in recipe and not recipe.startswith(_PARTS)
    )


def _read_text(recipe: str) -> tuple[str, str]:
    """What to call a recipe or file in an error, and its text."""
    path = Path(recipe)
    if _is_file_name(recipe):
        try:
            if not path.is_file():
                raise UserError(f"config: there is no file {recipe!r}")
            if path.stat().st_size > _LARGEST_FILE:
                raise UserError(
                    f"config: {recipe}: over a megabyte: no configuration; name another file"
                )
            return recipe, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise UserError(
                f"config: {recipe}: cannot be read as text ({reason}); name a YAML file that can be"
            ) from error
    shipped = resources.files("amint_ray") / "recipes" / f"{recipe}.yaml"
    if recipe in recipe_names() or (recipe.startswith(_PARTS) and shipped.is_file()):
        return f"recipe {recipe}", shipped.read_text("utf-8")
    raise UserError(
        f"config: there is no recipe {recipe!r}{did_you_mean(recipe, recipe_names())}; there "
        f"are {', '.join(recipe_names())}, and any path that ends in .yaml"
    )


def merge_override(tree: DictConfig, override: str) -> DictConfig:
    """The tree with one `key.path=value` applied.

    Raises:
        UserError: it is of another form, or gives no value.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"config: override {override!r} is not of the form key.path=value")
    if value.strip() == "???":  # OmegaConf's sign for "to be filled in", which it skips
        raise UserError(f"config: override {override!r} gives no value")
    path = key.strip().split(".")
    try:
        given = OmegaConf.from_dotlist([override])
        whole = isinstance(OmegaConf.select(given, key), DictConfig)
        if whole and len(path) > 1 and not _keys_at(path):
            # A mapping of free keys, such as `model.options={}`, takes the place of the recipe's.
            OmegaConf.update(tree, key, {}, merge=False)
        merged = OmegaConf.merge(tree, given)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"config: override {override!r}: {problem}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _roots(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without the complaint that a list is too short because its items were refused."""
    told = [error["loc"] for error in errors if error["type"] != "too_short"]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(loc[: len(error["loc"])] == error["loc"] for loc in told)
    ]


def _explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    value = _shown(error["input"])
    if error["type"] == "extra_forbidden":
        valid = _keys_at(path[:-1], root)
        hint = _nearest(path, valid, root)
        where = f"in {'.'.join(path[:-1])!r}" if path[:-1] else "at the top level"
        return f"unknown key {key!r} (value {value}){hint}; keys {where}: {', '.join(valid)}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] in ("model_type", "dict_type"):
        message = "input should be a mapping of keys to values"
    if error["type"] == "tuple_type":
        message = f"input should be a list, such as [{error['input']}]"
    if error["type"] == "too_short":
        message = "the list is empty"
    if error["type"] == "string_pattern_mismatch" and path == ["name"]:
        message = f"a name {NAME_IN_WORDS}"
    if path[-1:] == ["[key]"]:
        return f"{'.'.join(path[:-2])}: the key {value} is no text; write keys such as train.lr"
    if error["type"] == "missing":
        return f"{key} is missing"
    if not path:
        return message
    if isinstance(error["input"], dict | BaseModel) and error["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} = {value}: {message}"


def _shown(value: Any) -> str:
    """A value cut to what fits into a line; what may be a key of codes is not repeated."""
    text = MAYBE_KEY.sub("(not shown: it looks like a key)", repr(value))
    return textwrap.shorten(text, 80, placeholder=" …")[:80]


def is_key(key: str) -> bool:
    """Whether the configuration has such a key or section, or takes any key there."""
    *path, name = key.split(".")
    valid = _keys_at(path)
    return name in valid if valid else bool(path) and is_key(".".join(path))


def nearest_key(key: str) -> str:
    """The configuration's key that was probably meant, in words; empty where none is like it."""
    path = key.split(".")
    return _nearest(path, _keys_at(path[:-1]), Config)


def _nearest(path: Sequence[str], valid: Sequence[str], root: type[BaseModel]) -> str:
    """The key that was probably meant: the same word elsewhere, or a like one here or anywhere."""
    key, every = ".".join(path), _all_keys(root)
    same = [known for known in every if known.rsplit(".", 1)[-1] == path[-1]]
    here = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
    candidates = [
        *(same if len(same) == 1 else []),
        *(".".join([*path[:-1], near]) for near in here),
        *same,
        *difflib.get_close_matches(key, every, n=1, cutoff=0.5),
    ]
    return f", did you mean {candidates[0]!r}" if candidates else ""


def _keys_at(path: Sequence[str], root: type[BaseModel] = Config) -> list[str]:
    section = root
    for part in path:
        field = section.model_fields.get(part)
        annotation = field.annotation if field else None
        candidates = [annotation, *get_args(annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return []
        section = models[0]
    return list(section.model_fields)


def _all_keys(root: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[str]:
    keys: list[str] = []
    for name in _keys_at(prefix, root):
        below = _all_keys(root, (*prefix, name)) if _keys_at((*prefix, name), root) else []
        keys += below or [".".join((*prefix, name))]
    return keys


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The known word that was probably meant, in words; empty where none is like it."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}" if near else ""
