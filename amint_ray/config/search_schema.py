"""A search file: a recipe, what may vary, what counts, and how much may be spent.

`docs/search.md` explains it; the text under a field is its documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from amint_ray.config.section import Section

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


TRIALS_BY_DEFAULT = 16
"""Configurations, but of a grid."""


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
            row: {c: tuple(cell) if isinstance(cell, list) else cell for c, cell in columns.items()}
            if isinstance(columns, Mapping)
            else columns
            for row, columns in cells.items()
        }

    @model_validator(mode="after")
    def _a_number_for_each_figure(self) -> Paper:
        if len(set(self.figures)) < len(self.figures):
            raise ValueError("figures: the same metric stands there twice")
        for row, columns in self.cells.items():
            for column, cell in columns.items():
                if len(cell) != len(self.figures):
                    raise ValueError(
                        f"cells.{row}.{column} = {list(cell)}: one number for each of "
                        f"`figures` is needed ({', '.join(self.figures)})"
                    )
        return self


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
    """What may vary; docs/search.md has the notation."""
    objective: Annotated[
        tuple[Objective, ...],
        Field(strict=False, min_length=1, max_length=3),
        BeforeValidator(_one_or_several),
    ] = (Objective(metric="membership.member.auc"),)
    """One to three of them; with several, the winner is the one of their Pareto front that is
    nearest to the best of each."""
    constraint: Constraint | None = None
    """null: any may win."""
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
