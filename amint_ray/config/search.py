"""A search file: a recipe, what may vary, what counts, and how much may be spent.

`docs/search.md` explains it; the text under a field is its documentation.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from amint_ray.config import space as spaces
from amint_ray.config.load import (
    explain,
    fingerprint,
    load_config,
    merge_override,
    nearest_key,
    read_tree,
)
from amint_ray.config.schema import Config
from amint_ray.config.section import Section
from amint_ray.config.space import Settings, Space, parse_space
from amint_ray.contracts import UserError, first_line

RECIPE = "recipe"
"""Beside the configuration's keys, a space can have this one: another recipe."""
_OTHER_IMAGES = (
    *("data.source", "data.path", "data.limit", "data.split_seed", "data.shares"),
    *("data.external", "data.near_duplicates", "data.image_column", "data.label_column"),
)
_NOT_SEARCHED = {
    **dict.fromkeys(_OTHER_IMAGES, "trials with other images or roles cannot be compared"),
    "train.seed": "`seeds: N` trains each configuration so many times",
    "evaluation": "what is measured must be the same for all trials",
    "cluster": "where a trial runs does not change it",
    "storage": "where a trial is kept does not change it",
    "tracking": "where a trial is recorded does not change it",
    "name": "the search names its trials",
}
_MOST_PROBED = 500
Metric = Annotated[str, Field(min_length=1)]


class Objective(Section):
    """One thing to be made large or small."""

    metric: Metric
    """As the run's document has it, such as `membership.member.auc` or `task.accuracy`."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""


class Constraint(Section):
    """What a winner must keep; one limit."""

    metric: Metric
    """As in `objective`."""
    at_least: float | None = None
    """The least it may be."""
    at_most: float | None = None
    """The most it may be."""
    most_below_plain: Annotated[float, Field(ge=0)] | None = None
    """How far it may be below the same recipe with λ₂ = 0, which is then trained first (`seeds`
    times) and compared at each epoch with what it had at that epoch."""
    most_above_plain: Annotated[float, Field(ge=0)] | None = None
    """The same for what is better when small."""

    @model_validator(mode="after")
    def _one(self) -> Constraint:
        limits = [name for name, value in self if name != "metric" and value is not None]
        if len(limits) != 1:
            raise ValueError(
                "give one of at_least, at_most, most_below_plain, most_above_plain "
                f"({' and '.join(limits) or 'none is there'})"
            )
        return self

    @property
    def wants_plain(self) -> bool:
        """Whether the plain model is needed."""
        return self.most_below_plain is not None or self.most_above_plain is not None

    def violation(self, value: float, plain: float | None) -> float:
        """How far the limit is passed; 0 where it is kept.

        Args:
            value: the metric of a trial.
            plain: the same of the plain model, where it is wanted.
        """
        if self.at_least is not None:
            return max(0.0, self.at_least - value)
        if self.at_most is not None:
            return max(0.0, value - self.at_most)
        assert plain is not None
        if self.most_below_plain is not None:
            return max(0.0, plain - self.most_below_plain - value)
        assert self.most_above_plain is not None
        return max(0.0, value - plain - self.most_above_plain)


class Algorithm(Section):
    """Who proposes configurations."""

    name: Literal["random", "grid", "tpe", "nsga2", "pbt"] = "tpe"
    """`random`; `grid`: all combinations; `tpe`: Optuna's tree-structured Parzen estimator
    (Bergstra et al. 2011), for one objective or several; `nsga2`: Optuna's genetic algorithm for
    several (Deb et al. 2002); `pbt`: population-based training (Jaderberg et al. 2017), which
    changes λ₂ and the learning rate of trials under way."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of what is drawn."""
    startup: Annotated[int, Field(ge=1)] = 10
    """Configurations that `tpe` draws at random first; the size of `nsga2`'s population."""
    perturb: tuple[str, ...] = Field(default=("loss.lambda_mint", "train.lr"), strict=False)
    """Keys that `pbt` changes; they must be in the space, as numbers."""
    perturb_every: Annotated[int, Field(ge=1)] = 5
    """Epochs between two changes (`pbt`)."""


class Scheduler(Section):
    """Who stops trials that lag behind."""

    name: Literal["asha", "none"] = "asha"
    """`asha`: asynchronous successive halving (Li et al. 2020) on the first objective, infeasible
    trials behind all others. `none`: every trial runs to its end."""
    grace: Annotated[int, Field(ge=1)] = 1
    """Epochs that every trial has."""
    reduction: Annotated[float, Field(gt=1)] = 3
    """One in so many goes on at each rung; each rung has so many times the epochs of the last."""


class Budget(Section):
    """How much may be spent."""

    trials: Annotated[int, Field(ge=1)] | None = None
    """Configurations; null: all of a grid, 16 otherwise."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """After which no trial goes on; what was found by then counts."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time; null: as many as the cluster has room for."""
    retries: Annotated[int, Field(ge=0)] = 1
    """How often a trial that failed is tried again, from its last checkpoint. A loss that is not
    finite is not tried again."""


class Final(Section):
    """What becomes of the winner."""

    seeds: Annotated[int, Field(ge=0)] = 3
    """How often it is trained again from scratch, with seeds that no trial had, and measured on
    `test`; the first one's model is registered. 0: it is not."""
    default: bool = False
    """Train the recipe as it is with the same seeds, too, and compare."""


class Paper(Section):
    """Published figures to be shown beside those of the trials."""

    source: str
    """Where they are from."""
    rows: str
    """Parameter whose value names the row."""
    columns: str
    """Parameter whose value names the column."""
    figures: tuple[str, ...] = Field(strict=False)
    """What a cell holds: metrics of ours, in the order of its numbers."""
    cells: dict[str, dict[str, tuple[Annotated[float, Field(strict=False)], ...]]] = Field(
        strict=False
    )
    """By row and column."""

    @field_validator("cells", mode="before")
    @classmethod
    def _tuples(cls, cells: Any) -> Any:
        if not isinstance(cells, Mapping):
            return cells
        return {
            row: {column: tuple(cell) for column, cell in columns.items()}
            for row, columns in cells.items()
        }


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, Mapping) else value


class SearchSpec(Section):
    """Everything in a search file."""

    name: Annotated[str, Field(max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "search"
    """Names its folder in `storage.path` and its MLflow run; by default the file's name."""
    recipe: Annotated[str, Field(min_length=1)]
    """Name of a recipe, or a YAML file."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keys of the configuration that all trials have otherwise than the recipe."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """For `${variables.NAME}` elsewhere in the file, to be set on the command line."""
    space: dict[str, Any]
    """What may vary; see the top of config/space.py."""
    objective: Annotated[
        tuple[Objective, ...],
        Field(strict=False, min_length=1, max_length=3),
        BeforeValidator(_one_or_several),
    ] = (Objective(metric="membership.member.auc"),)
    """One to three of them; with several, the winner is the one of their Pareto front that is
    nearest to the best of each."""
    constraint: Constraint | None = None
    """What a winner must keep."""
    algorithm: Algorithm = Algorithm()
    scheduler: Scheduler = Scheduler()
    budget: Budget = Budget()
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Trials of each configuration, with seeds of their own; what counts is their mean."""
    report_every: Annotated[int, Field(ge=1)] = 1
    """Epochs between two looks at a trial's figures."""
    final: Final = Final()
    paper: Paper | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> SearchSpec:
        metrics = [objective.metric for objective in self.objective]
        if len(set(metrics)) < len(metrics):
            raise ValueError("objective: the same metric stands there twice")
        name = self.algorithm.name
        if name == "nsga2" and len(metrics) == 1:
            raise ValueError("algorithm.name = nsga2 is for several objectives; take tpe")
        if name == "pbt":
            if self.scheduler.name != "none":
                raise ValueError("algorithm.name = pbt decides itself; set scheduler.name=none")
            if self.algorithm.perturb_every % self.report_every:
                raise ValueError(
                    f"algorithm.perturb_every = {self.algorithm.perturb_every} must be a multiple "
                    f"of report_every = {self.report_every}"
                )
            if self.seeds > 1 or len(metrics) > 1:
                raise ValueError("algorithm.name = pbt takes one objective and seeds = 1")
        return self


@dataclass(frozen=True)
class Search:
    """A search that can be begun.

    Attributes:
        spec: the file's content, with what the command line changed.
        overrides: what the command line sets in every trial's configuration.
        space: the parsed `spec.space`.
        base: the configuration that every trial starts from.
    """

    spec: SearchSpec
    overrides: tuple[str, ...]
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
        return _config(self.spec, self.overrides, {**settings, **own})

    @property
    def seed(self) -> int:
        """Of the first trial of each configuration."""
        return self.base.train.seed

    @property
    def runs(self) -> int | None:
        """Trials in all; None: not known before the grid is."""
        trials = self.spec.budget.trials
        return None if trials is None else trials * self.spec.seeds


def _config(spec: SearchSpec, overrides: Sequence[str], settings: Settings) -> Config:
    drawn = dict(settings)
    recipe = drawn.pop(RECIPE, spec.recipe)
    fixed = {**drawn, "evaluation.select_every": spec.report_every}
    return load_config(
        str(recipe),
        [
            *(f"{key}={_written(value)}" for key, value in spec.settings.items()),
            *overrides,
            *(f"{key}={_written(value)}" for key, value in fixed.items()),
        ],
    )


def _written(value: Any) -> str:
    """A value as an override has it; JSON is YAML, and OmegaConf must see no reference in it."""
    return json.dumps(value).replace("${", "\\${")


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
    if Path(file).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"search: {file!r} is no YAML file; give the path of a search file, such as "
            "tune_configs/digits.yaml"
        )
    tree = read_tree(file)
    own: list[str] = []
    others: list[str] = []
    for override in overrides:
        section = override.partition("=")[0].strip().partition(".")[0]
        (own if section in SearchSpec.model_fields else others).append(override)
    for override in own:
        tree = merge_override(tree, override)
    spec = _validated(tree, file)
    if unknown := [key for key in spec.settings if _at(key) is None]:
        raise UserError(
            f"search: {file}: settings: unknown key {unknown[0]!r}{nearest_key(unknown[0])}"
        )
    base = _config(spec, others, {})
    if base.loss.lambda_mint == 0:
        raise UserError(
            "search: loss.lambda_mint = 0 in all trials: there is no MINT head to search for; "
            "leave it out (a constraint against the plain model trains that by itself)"
        )
    space = _checked_space(spec, others)
    return Search(spec, tuple(others), space, base)


def _validated(tree: DictConfig, file: str) -> SearchSpec:
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"search: {file}: {first_line(error)}") from error
    try:
        return SearchSpec.model_validate(values)
    except ValidationError as error:
        lines = explain(error, SearchSpec)
        raise UserError("\n".join(f"search: {file}: {line}" for line in lines)) from error


def _checked_space(spec: SearchSpec, overrides: Sequence[str]) -> Space:
    """The space, each of whose values the configuration takes.

    Raises:
        UserError: it does not.
    """
    try:
        space = parse_space(spec.space)
    except ValueError as error:
        raise UserError(f"search: {error}") from error
    for key in spaces.keys(space):
        if key != RECIPE:
            _check_key(key)
    if spec.algorithm.name == "pbt":
        _check_perturbed(spec, space)
    if spec.algorithm.name == "grid" and not spaces.has_modules(space):
        try:
            spaces.grid(space)
        except ValueError as error:
            raise UserError(f"search: {error}") from error
    for settings in spaces.probes(space)[:_MOST_PROBED]:
        try:
            config = _config(spec, overrides, settings)
        except UserError as error:
            raise UserError(f"search: space: {first_line(error)}") from error
        if config.loss.lambda_mint == 0:
            raise UserError(
                "search: space.loss.lambda_mint: 0 is the model without the head, which says "
                "nothing about membership; a constraint against the plain model trains it"
            )
    return space


def _check_key(key: str) -> None:
    at = _at(key)
    if at is None:
        raise UserError(f"search: space: unknown key {key!r}{nearest_key(key)}")
    if isinstance(at, dict) and at:
        raise UserError(
            f"search: space: {key!r} is a section; write its keys with dots, such as "
            f"{key}.{next(iter(at))}"
        )
    for refused, reason in _NOT_SEARCHED.items():
        if key == refused or key.startswith(f"{refused}."):
            raise UserError(f"search: space.{key}: cannot be searched: {reason}")


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


def search_fingerprint(search: Search) -> str:
    """16 hex digits over everything that decides what a search proposes and how it judges.

    How much is spent is left out: a search can go on with a larger budget.
    """
    values = identity(search)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def identity(search: Search) -> dict[str, Any]:
    """What the fingerprint is over, by key."""
    values = search.spec.model_dump(mode="json", exclude={"budget", "final", "paper", "variables"})
    return {**values, "configuration": fingerprint(search.base), "overrides": None}
