"""Before Ray starts: everything about a search that can be found wrong without training."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from amint_ray.config import space as spaces
from amint_ray.config.points import grid, probes
from amint_ray.config.schema import Config
from amint_ray.config.search import Search
from amint_ray.config.search_schema import SearchSpec
from amint_ray.config.space import Settings, Space
from amint_ray.contracts import Role, ScoreTable, UserError, Watcher, first_line
from amint_ray.data.loading import smallest_step
from amint_ray.data.roles import Manifest
from amint_ray.evaluation.selection import selection_figures, selection_metrics
from amint_ray.launch.cluster import address_of
from amint_ray.launch.codes import with_key
from amint_ray.launch.ledger import Ledger, TrialRecord
from amint_ray.launch.prepare import check_labels, worker_rows
from amint_ray.model.backbone import create_backbone
from amint_ray.model.blocks import blocks
from amint_ray.model.joint import Architecture, plan_architecture
from amint_ray.model.placement import landmarks
from amint_ray.model.survey import Site, survey
from amint_ray.train.update import create_update

_ON_READING = ("data.image_size", "data.channels", "data.crop_pct")
"""What must be the same for images that are held in memory."""
_CHECKPOINTS_FOR_OTHERS = 4
_MOST_ARCHITECTURES = 64
_MOST_METRICS = 5


@dataclass(frozen=True)
class Plan:
    """A search whose parts fit.

    Attributes:
        search: as it was asked for.
        space: its space, the backbone's modules filled in.
        base: the configuration that the trials start from, workers settled.
    """

    search: Search
    space: Space
    base: Config

    def trial(self, trial: TrialRecord, settled: Config) -> Config:
        """A trial's configuration.

        Args:
            trial: tells settings and seed.
            settled: tells how the images are read.

        Raises:
            UserError: the settings do not go together.
        """
        config = self.search.config(trial.settings, seed=trial.seed)
        data = config.data.model_copy(
            update={"mode": settled.data.mode, "streams": settled.data.streams}
        )
        changes: dict[str, Any] = {"data": data, "cluster": self.base.cluster}
        algorithm = self.search.spec.algorithm
        if algorithm.name == "pbt":
            every = {"checkpoint_every": algorithm.perturb_every}
            keep = max(config.storage.keep, _CHECKPOINTS_FOR_OTHERS)
            changes["train"] = config.train.model_copy(update=every)
            changes["storage"] = config.storage.model_copy(update={"keep": keep})
        return config.model_copy(update=changes)


def base_of(search: Search) -> Config:
    """What the trials start from: one worker each, unless more are asked for."""
    base = search.base
    # A trial's process has not the environment that may name the cluster here.
    settled = {"workers": base.cluster.workers or 1, "address": address_of(base.cluster)}
    base = base.model_copy(update={"cluster": base.cluster.model_copy(update=settled)})
    recipes = list(search.recipes.values())
    if varied := [
        key
        for key in _ON_READING
        if key in spaces.keys(search.space)
        or any(_of_data(config, key) != _of_data(base, key) for config in recipes)
    ]:
        if base.data.mode == "memory":
            raise UserError(
                f"search: space: {', '.join(varied)} is not the same in all trials and changes how "
                "images are decoded, and data.mode=memory decodes them once; take "
                "data.mode=streamed"
            )
        data = base.data.model_copy(update={"mode": "streamed"})
        base = base.model_copy(update={"data": data})
    return base


def _of_data(config: Config, key: str) -> Any:
    return getattr(config.data, key.removeprefix("data."))


def with_its_key(search: Search) -> Search:
    """A search with its key's fingerprint in all configurations, where any of them asks for codes.

    Raises:
        UserError: as `with_key`.
    """
    tried = [
        search.base,
        *(search.config(settings) for settings in probes(search.space)[:_MOST_ARCHITECTURES]),
    ]
    keyed = next((config for config in tried if config.wants_codes), None)
    if keyed is None:
        return search
    own = f"mint.keyed.fingerprint={with_key(keyed).mint.keyed.fingerprint}"
    return replace(search, overrides=(*search.overrides, own), base=with_key(search.base))


def plan_search(search: Search, watcher: Watcher) -> Plan:
    """Whether each value of the space gives a model that can be trained, and names are right.

    Args:
        search: what is asked for.
        watcher: is told what goes on.

    Raises:
        UserError: one does not.
    """
    watcher.phase("checking the space")
    base, space = base_of(search), search.space
    if spaces.has_modules(space):
        if "model.backbone" in set(spaces.keys(space)) or "recipe" in set(spaces.keys(space)):
            raise UserError(
                "search: space: `modules` are those of one backbone, and the space has several; "
                "give mint.taps as placements, or search one backbone at a time"
            )
        sites = _Modules(base)
        try:
            space = spaces.with_modules(space, sites.names)
        except ValueError as error:
            raise UserError(f"search: {error}") from error
    if search.spec.algorithm.name == "grid":
        try:
            grid(space)
        except ValueError as error:
            raise UserError(f"search: {error}") from error
    plan = Plan(search, space, base)
    _check_names(search)
    architectures: dict[str, Architecture] = {}
    for settings, config in _probed(plan):
        watcher.heartbeat()
        shape = (config.data.image_size, config.data.channels)
        key = f"{config.model!r} {config.mint!r} {shape}"
        with _at(settings):
            create_update(torch.nn.Linear(1, 1), config.train, steps_per_epoch=1)
            if key not in architectures and len(architectures) < _MOST_ARCHITECTURES:
                architectures[key] = plan_architecture(config, num_classes=2)
            if key in architectures:
                _check_rows(config, architectures[key], _fewest_workers(plan))
    return plan


def _probed(plan: Plan) -> Iterator[tuple[Settings, Config]]:
    """Trials that together have every option, and both ends, of every key."""
    for settings in probes(plan.space):
        yield settings, plan.search.config(settings)


@contextmanager
def _at(settings: Settings) -> Iterator[None]:
    """Say where in the space something is wrong."""
    try:
        yield
    except UserError as error:
        told = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise UserError(f"search: space: {told}: {first_line(error)}") from error


def _fewest_workers(plan: Plan) -> int:
    workers = plan.base.cluster.workers
    return workers[0] if isinstance(workers, tuple) else workers or 1


def _check_rows(
    config: Config, architecture: Architecture, workers: int, smallest: int | None = None
) -> None:
    """Whether a trial's steps have images for all its workers.

    Raises:
        UserError: they have not.
    """
    rows = worker_rows(config, architecture, smallest)
    if workers > rows:
        raise UserError(
            f"cluster.workers = {workers}: more workers than images of D in a step or micro-batch "
            f"(train.batch_size / train.accumulate has enough for {rows}); ask for fewer workers, "
            "a larger batch or a smaller train.accumulate"
        )


class _Modules:
    """What can be tapped of a backbone."""

    def __init__(self, config: Config) -> None:
        size = config.data.image_size
        with torch.device("meta"):
            model = create_backbone(
                config.model.backbone,
                num_classes=2,
                channels=config.data.channels,
                options=config.model.options,
            )
            sites = survey(model, (config.data.channels, size, size))
        usual = {site.name for site in landmarks(model, sites)} | set(blocks(model))
        self._sites = sorted((s for s in sites if not s.fault), key=lambda site: site.depth)
        self._usual = [site for site in self._sites if site.name in usual]

    def names(self, among: str | None) -> Sequence[str]:
        """Stages and blocks, or those that match a glob; by depth."""
        found: list[Site] = self._usual
        if among is not None:
            found = [site for site in self._sites if fnmatchcase(site.name, among)]
        return [site.name for site in found]


def _check_names(search: Search) -> None:
    """Whether a trial can report what is asked for, given enough images.

    Raises:
        UserError: it cannot; the text lists what it can.
    """
    text, number, real = np.array([], np.str_), np.array([], np.int64), np.array([], np.float64)
    nothing = ScoreTable(text, text, number, number, real, real)
    # What is not known for want of images has its name there nevertheless.
    figures = selection_figures(nothing, search.base.evaluation, head_trained=True)
    known = list(_names(figures))
    _check_asked(search.spec, known, hint=True)
    for metric in () if search.spec.paper is None else search.spec.paper.figures:
        _check_metric(f"paper.figures {metric!r}", metric, known, hint=True)
    constraint = search.spec.constraint
    if constraint is not None and constraint.wants_plain and "membership" in constraint.metric:
        raise UserError(
            f"search: constraint on {constraint.metric!r}: the plain model has no MINT head to "
            "compare with; give at_least or at_most"
        )


def _names(figures: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The path of every figure, known or not."""
    for key, value in figures.items():
        if isinstance(value, dict) and "value" in value:
            yield f"{prefix}{key}"
        elif isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")


def _check_asked(spec: SearchSpec, reported: Sequence[str], *, hint: bool = False) -> None:
    asked = [(f"objective {o.metric!r}", o.metric) for o in spec.objective]
    if spec.constraint is not None:
        asked.append((f"constraint on {spec.constraint.metric!r}", spec.constraint.metric))
    for what, metric in asked:
        _check_metric(what, metric, reported, hint=hint)


def _check_metric(what: str, metric: str, reported: Sequence[str], *, hint: bool) -> None:
    """Whether a metric is reported.

    Args:
        what: asks for it, in words.
        metric: its name.
        reported: what is.
        hint: name what is most like it: the name itself may be wrong.

    Raises:
        UserError: it is not.
    """
    if metric in reported:
        return
    # The last part of a name is what is remembered of it.
    alike = [name for name in reported if name.rpartition(".")[2] == metric.rpartition(".")[2]]
    near = difflib.get_close_matches(metric, alike or reported, n=1, cutoff=0.4)
    told = f", did you mean {near[0]!r}?" if hint and near else ";"
    nearest = [*near, *difflib.get_close_matches(metric, reported, n=_MOST_METRICS, cutoff=0.0)]
    shown = list(dict.fromkeys(nearest))[:_MOST_METRICS]
    more = len(reported) - len(shown)
    raise UserError(
        f"search: {what}: no trial reports that{told} there are {', '.join(shown)}"
        + (f" and {more} more" if more > 0 else "")
    )


def check_on_images(plan: Plan, manifest: Manifest) -> None:
    """What depends on how many images there are, and on their labels.

    Raises:
        UserError: a trial would not report what is asked for (the text lists what it does report),
            or a value of the space does not go with these images.
    """
    told = (Role.MEMBER, Role.WITHHELD, Role.CALIBRATION)
    rows = np.isin(manifest.role, [role.value for role in told])
    number = int(rows.sum())
    random = np.random.default_rng(0)
    table = ScoreTable(
        sample_id=manifest.sample_id[rows],
        role=manifest.role[rows],
        label=manifest.label[rows],
        prediction=manifest.label[rows],
        task_loss=random.random(number),
        mint_logit=random.standard_normal(number),
    )
    reported = [
        name.removeprefix("selection.")
        for name in selection_metrics(table, plan.base.evaluation, head_trained=True)
        if not name.endswith((".low", ".high"))
    ]
    _check_asked(plan.search.spec, reported)
    workers = _fewest_workers(plan)
    for settings, config in _probed(plan):
        with _at(settings):
            check_labels(manifest, config)
            smallest = smallest_step(manifest, config)
            # Only where rows are few does it matter whether the backbone needs two a worker.
            if smallest // config.train.accumulate < 2 * workers:
                architecture = plan_architecture(config, num_classes=2)
                _check_rows(config, architecture, workers, smallest)


def first_trials(plan: Plan) -> tuple[list[TrialRecord], int]:
    """What a search would begin with, and how many trials there are in all.

    Beside the plain models up to ten configurations that no ended trial can influence.
    """
    from amint_ray.launch.proposals import Proposals

    ledger = Ledger(None)
    proposals = Proposals(
        plan.search, plan.space, ledger, lambda trial: plan.trial(trial, plan.base)
    )
    constraint = plan.search.spec.constraint
    for trial in ledger.where(lambda trial: trial.baseline):
        assert constraint is not None
        with ledger.changing(trial.id) as record:
            record.state = "done"
            record.history = [{"epoch": 0.0, constraint.metric: 0.0}]
    algorithm = plan.search.spec.algorithm
    free = algorithm.startup if algorithm.name in ("tpe", "nsga2") else proposals.planned
    shown = len(ledger.trials) + min(10, free) * plan.search.spec.seeds
    for count in range(shown):
        if isinstance(proposals.suggest(str(count)), str):
            break
    return ledger.where(lambda trial: True), proposals.planned
