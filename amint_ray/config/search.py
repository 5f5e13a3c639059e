"""From a search file and overrides to a search that can be begun."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from amint_ray.config import space as spaces
from amint_ray.config.load import (
    configured,
    fingerprint,
    nearest_key,
    read_tree,
)
from amint_ray.config.points import grid, probes
from amint_ray.config.schema import Config
from amint_ray.config.search_file import read_search
from amint_ray.config.search_schema import SearchSpec
from amint_ray.config.space import Settings, Space, parse_space
from amint_ray.contracts import UserError, first_line

RECIPE = "recipe"
"""Beside the configuration's keys, a space can have this one: another recipe."""
_OTHER_IMAGES = (
    *("data.source", "data.path", "data.limit", "data.split_seed", "data.shares"),
    *("data.external", "data.near_duplicates", "data.image_column", "data.label_column"),
    *("data.max_megapixels", "data.max_bad_fraction"),
)
_READING = (
    *("data.mode", "data.memory_gib", "data.readers", "data.streams", "data.timeout_seconds"),
    "data.confounder_check",
)
_NOT_SEARCHED = {
    **dict.fromkeys(_OTHER_IMAGES, "trials with other images or roles cannot be compared"),
    **dict.fromkeys(_READING, "images are read once for all trials"),
    **dict.fromkeys(
        ("mint.key_file", "mint.key_env", "mint.keyed.fingerprint", "mint.keyed.code_from"),
        "codes are made once for all trials; name it in `settings`",
    ),
    "train.seed": "`seeds: N` trains each configuration so many times",
    "evaluation": "what is measured must be the same for all trials",
    "cluster": "where a trial runs does not change it",
    "storage": "where a trial is kept does not change it",
    "tracking": "where a trial is recorded does not change it",
    "name": "the search names its trials",
}
_EACH_ITS_OWN = ("name", "train.seed")
"""What recipes of one space may have otherwise, though it is not searched."""
_MOST_PROBED = 500
_NOT_IDENTITY = {
    *("name", "budget", "final", "paper"),  # the name is that of the folder that is looked into
    *("recipe", "settings", "variables"),  # the configuration has what comes of these
}


@dataclass(frozen=True)
class Search:
    """A search that can be begun.

    Attributes:
        spec: the file's content, with what the command line changed.
        overrides: what the command line sets in every trial's configuration.
        trees: by name, what each recipe of the search held when it was loaded; a file that is
            edited later changes no trial.
        space: the parsed `spec.space`.
        base: the configuration that every trial starts from.
    """

    spec: SearchSpec
    overrides: tuple[str, ...]
    trees: Mapping[str, DictConfig]
    space: Space
    base: Config

    def config(self, settings: Settings, *, seed: int | None = None) -> Config:
        """A trial's configuration.

        Args:
            settings: what the space gave.
            seed: of training; None: the recipe's.

        Raises:
            UserError: the settings do not go together.
        """
        own = {"train.seed": seed} if seed is not None else {}
        return _config(self.spec, self.overrides, self.trees, {**settings, **own})

    @property
    def recipes(self) -> dict[str, Config]:
        """The configurations, by recipe, that the space starts from; empty where it has none."""
        return {name: self.config({RECIPE: name}) for name in _recipes(self.space)}

    @property
    def seed(self) -> int:
        """Of the first trial of each configuration."""
        return self.base.train.seed


def _config(
    spec: SearchSpec,
    overrides: Sequence[str],
    trees: Mapping[str, DictConfig],
    settings: Settings,
) -> Config:
    drawn = dict(settings)
    recipe = drawn.pop(RECIPE, spec.recipe)
    fixed = {**drawn, "evaluation.select_every": spec.report_every}
    return configured(
        trees[str(recipe)],
        [
            *(f"{key}={_written(value)}" for key, value in spec.settings.items()),
            *overrides,
            *(f"{key}={_written(value)}" for key, value in fixed.items()),
        ],
    )


def _written(value: Any) -> str:
    """A value as an override has it; JSON is YAML, and OmegaConf must see no reference in it."""
    return json.dumps(value).replace("${", "\\\\${")


def load_search(file: str, overrides: Sequence[str] = ()) -> Search:
    """A search file with overrides applied.

    Args:
        file: path of a YAML file.
        overrides: `key.path=value` each; keys of the search file itself (`budget.trials=4`), and
            keys of the configuration, for all trials (`data.path=FOLDER`).

    Raises:
        UserError: no such file, an unknown key (of the file, or of the configuration in `space`),
            a value that the configuration does not take, an empty choice … The text says where.
    """
    spec, others = read_search(file, overrides)
    if unknown := [key for key in spec.settings if _at(key) is None]:
        raise UserError(
            f"search: {file}: settings: unknown key {unknown[0]!r}{nearest_key(unknown[0])}"
        )
    trees = {spec.recipe: read_tree(spec.recipe)}
    base = _config(spec, others, trees, {})
    if base.loss.lambda_mint == 0:
        raise UserError(
            "search: loss.lambda_mint = 0 in all trials: there is no MINT head to search for; "
            "leave it out (a constraint against the plain model trains that by itself)"
        )
    space = _parsed_space(spec, others)
    for name in _recipes(space):
        if name not in trees:
            try:
                trees[name] = read_tree(name)
            except UserError as error:
                raise UserError(f"search: space: {first_line(error)}") from error
    search = Search(spec, tuple(others), trees, space, base)
    _check_values(search)
    return search


def _recipes(space: Space) -> list[str]:
    """Names of the recipes that a space has."""
    return list(dict.fromkeys(str(p[RECIPE]) for p in probes(space) if RECIPE in p))


def _parsed_space(spec: SearchSpec, overrides: Sequence[str]) -> Space:
    """The space, all of whose keys are there and may be searched.

    Raises:
        UserError: one is not.
    """
    try:
        space = parse_space(spec.space)
    except ValueError as error:
        raise UserError(f"search: {error}") from error
    for key, parameter in spaces.leaves(space):
        if key != RECIPE:
            _check_key(key)
            _check_kind(key, parameter)
    _check_set_once(spec, overrides, space)
    if spec.algorithm.name == "pbt":
        _check_perturbed(spec, space)
    if spec.algorithm.name == "grid" and not spaces.has_modules(space):
        try:
            grid(space)
        except ValueError as error:
            raise UserError(f"search: {error}") from error
    return space


def _check_set_once(spec: SearchSpec, overrides: Sequence[str], space: Space) -> None:
    """Whether what is set for all trials counts in some, and from the command line in all.

    Raises:
        UserError: it does not; the space goes before it.
    """
    told = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    for tree, drawn in ((told, set(spaces.keys(space))), (spec.settings, spaces.always(space))):
        for key in _leaves_of(tree):
            for other in sorted(drawn):
                if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                    raise UserError(
                        f"search: {key} is set for all trials and is in the space, too; leave out "
                        "one"
                    )


def _leaves_of(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a nested mapping's values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_values(search: Search) -> None:
    """Whether the configuration takes every value of the space.

    Raises:
        UserError: it does not.
    """
    _check_recipes(search)
    for settings in probes(search.space)[:_MOST_PROBED]:
        try:
            config = search.config(settings)
        except UserError as error:
            raise UserError(f"search: space: {first_line(error)}") from error
        if config.loss.lambda_mint == 0:
            raise UserError(
                "search: space.loss.lambda_mint: 0 is the model without the head, which says "
                "nothing about membership; a constraint against the plain model trains it"
            )


def _check_recipes(search: Search) -> None:
    """Whether the recipes agree on what must be the same for all trials.

    Raises:
        UserError: one does not.
    """
    base = search.base.model_dump()
    try:
        recipes = search.recipes
    except UserError as error:
        raise UserError(f"search: space: {first_line(error)}") from error
    for name, config in recipes.items():
        own = config.model_dump()
        for key, reason in _NOT_SEARCHED.items():
            here, there = (functools.reduce(_below, key.split("."), tree) for tree in (own, base))
            if key not in _EACH_ITS_OWN and here != there:
                key, here, there = _first_difference(key, here, there)
                raise UserError(
                    f"search: space.recipe: {name} has {key} = {here!r}, and {search.spec.recipe} "
                    f"{there!r}: {reason}; give `settings` one for all"
                )


def _below(tree: dict[str, Any], key: str) -> Any:
    return tree[key]


def _first_difference(key: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The first key at or below this one at which two unequal values differ, and both."""
    if not isinstance(a, dict) or not isinstance(b, dict) or set(a) != set(b):
        return key, a, b
    name = next(name for name in a if a[name] != b[name])
    return _first_difference(f"{key}.{name}", a[name], b[name])


def _check_key(key: str) -> None:
    at = _at(key)
    if at is None:
        own = "" if "." in key else "; a name of your own needs `branches`"
        raise UserError(f"search: space: unknown key {key!r}{nearest_key(key)}{own}")
    if isinstance(at, dict) and at:
        raise UserError(
            f"search: space: {key!r} is a section; write its keys with dots, such as "
            f"{key}.{next(iter(at))}"
        )
    for refused, reason in _NOT_SEARCHED.items():
        if key == refused or key.startswith(f"{refused}."):
            raise UserError(f"search: space.{key}: cannot be searched: {reason}")


def _check_kind(key: str, parameter: spaces.Parameter) -> None:
    """Whether a mapping stands where the configuration takes one.

    Raises:
        UserError: it does not: a kind was meant.
    """
    value = parameter.value if isinstance(parameter, spaces.Constant) else None
    if isinstance(value, dict) and not isinstance(_at(key), dict):
        kinds = ", ".join(spaces.KINDS)
        raise UserError(
            f"search: space.{key} = {value}: not what may vary; write one of {kinds}, such as "
            "{choice: [1, 2]}"
        )


@functools.cache
def _key_tree() -> dict[str, Any]:
    dumped: dict[str, Any] = Config().model_dump(mode="json")
    return dumped


def _at(key: str) -> Any:
    """What the configuration has there by default, {} below free keys; None: no such key."""
    at: Any = _key_tree()
    for part in key.split("."):
        if not isinstance(at, dict) or (at and part not in at):
            return None
        at = at.get(part, {})
    return {} if at is None else at


def _check_perturbed(spec: SearchSpec, space: Space) -> None:
    for key in spec.algorithm.perturb:
        if not isinstance(space.parameters.get(key), spaces.Real):
            raise UserError(
                f"search: algorithm.perturb: {key!r} must be in the space, as uniform or "
                "loguniform, outside of branches"
            )
        if key not in ("loss.lambda_mint", "loss.lambda_task", "train.lr", "train.weight_decay"):
            raise UserError(
                f"search: algorithm.perturb: {key!r} cannot change in mid-run; there are "
                "loss.lambda_mint, loss.lambda_task, train.lr and train.weight_decay"
            )
    if others := [key for key in space.parameters if key not in spec.algorithm.perturb]:
        raise UserError(
            f"search: space.{others[0]}: members of a population take over each other's weights; "
            "they may differ in algorithm.perturb alone, so take it out of the space"
        )


def search_fingerprint(search: Search) -> str:
    """16 hex digits over everything that decides what a search proposes and how it judges.

    How much is spent is left out: a search can go on with a larger budget.
    """
    values = identity(search)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def identity(search: Search) -> dict[str, Any]:
    """What the fingerprint is over, by key."""
    values = search.spec.model_dump(mode="json", exclude=_NOT_IDENTITY)
    configurations = {name: fingerprint(config) for name, config in search.recipes.items()}
    return {**values, "configuration": configurations or fingerprint(search.base)}
