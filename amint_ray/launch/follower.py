"""Ray Tune's part of a search: its schedulers, and what it says of the trials."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from amint_ray.config.schema import Config
from amint_ray.config.search import Search
from amint_ray.config.space import Real
from amint_ray.contracts import UserError
from amint_ray.launch.children import Children
from amint_ray.launch.ledger import Ledger, TrialRecord
from amint_ray.launch.proposals import Proposals
from amint_ray.launch.trial import Given, judged, penalty, run_trial
from amint_ray.storage import Location

_ENOUGH_FAILURES = 5
"""Trials that fail alike, with none that does not, after which no more are tried."""
_MOST_EPOCHS = 1_000_000
"""A trial ends by itself, after as many epochs as its own configuration has."""
_TRIAL_BYTES = 1 << 20
"""Ray wants a trial to ask for something. A core, or a hundredth of one, would be missing to the
workers, who need whole ones."""


@dataclass(frozen=True)
class Settings:
    """How Tune is to run.

    Attributes:
        planned: trials in all.
        concurrent: trials at a time.
        name: of Tune's own folder.
        folder: what that lies in.
        deadline: by `time.monotonic`, when all trials are stopped; None: never.
        retries: of a trial that failed.
    """

    planned: int
    concurrent: int
    name: str
    folder: Location
    deadline: float | None
    retries: int


def run_tune(
    search: Search, given: Given, proposals: Proposals, follower: Follower, settings: Settings
) -> None:
    """Run trials until no more are proposed; all that is learned of them is in the ledger.

    Raises:
        Exception: whatever Tune raises.
    """
    if search.spec.algorithm.name != "pbt":
        scheduler = create_scheduler(search, follower)
        _tune(given, follower, settings, scheduler, search_alg=proposals)
        return
    # Tune lets no searcher work beside population-based training: all trials are there at once.
    if plain := proposals.take(baselines=True):
        _tune(given, follower, settings, FIFOScheduler(), listed=plain)
    if population := proposals.take(baselines=False):
        _tune(given, follower, settings, _population(search), listed=population)


def _tune(
    given: Given,
    follower: Follower,
    settings: Settings,
    scheduler: TrialScheduler,
    *,
    search_alg: Proposals | None = None,
    listed: Sequence[dict[str, Any]] = (),
) -> None:
    """Run the trials that a searcher proposes, or those that are listed."""
    folder = settings.folder
    left = None
    if settings.deadline is not None:
        left = max(1.0, settings.deadline - time.monotonic())
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, given=given), {"memory": _TRIAL_BYTES}
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"proposal": tune.grid_search(list(listed))} if listed else None,
        tune_config=tune.TuneConfig(
            search_alg=search_alg,
            scheduler=scheduler,
            num_samples=1 if listed else settings.planned,
            max_concurrent_trials=settings.concurrent,
            time_budget_s=left,
            trial_name_creator=_proposed,
            trial_dirname_creator=_proposed,
        ),
        run_config=tune.RunConfig(
            name=settings.name,
            storage_path=folder.path,
            storage_filesystem=folder.filesystem if folder.remote else None,
            verbose=0,
            callbacks=[follower],
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            stop=_Hopeless(follower),
        ),
    )
    tuner.fit()


def _proposed(trial: Any) -> str:
    """What a trial that Tune creates is to be called: as in the ledger."""
    return str(trial.config["proposal"]["id"])


def _identity(trial: Any) -> str:
    """The trial's name in the ledger; a member of a population may have another's proposal."""
    return str(trial.custom_trial_name)


class _Hopeless(tune.Stopper):  # type: ignore[misc]
    """Ends a search of which nothing can come."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """No trial by itself."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials so far failed, and enough did; or nobody listens any more."""
        return self._follower.hopeless or self._follower.closed


class Follower(tune.Callback):  # type: ignore[misc]
    """Keeps the ledger and the MLflow runs; Tune calls it in its own thread.

    Attributes:
        hopeless: whether trials fail, and fail alike.
        closed: set to have it hear nothing more, and Tune end: trials that are under way go on
            when the search does.
    """

    def __init__(
        self,
        ledger: Ledger,
        children: Children,
        proposals: Proposals,
        configure: Callable[[TrialRecord], Config],
    ) -> None:
        self.ledger = ledger
        self.hopeless = self.closed = False
        self._children, self._proposals, self._configure = children, proposals, configure
        self._notices: SimpleQueue[str] = SimpleQueue()

    def __getstate__(self) -> dict[str, Any]:
        """Tune stores its callbacks, too; they are never read."""
        return {}

    def notices(self) -> list[str]:
        """What is to be shown, once."""
        return [self._notices.get() for _ in range(self._notices.qsize())]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or begins again."""
        if self.closed:
            return
        identity = _identity(trial)
        self.ledger.begin(identity)
        with contextlib.suppress(UserError):  # it has no configuration, as it is about to report
            self._children.begin(identity, self._configure(self.ledger.trials[identity]))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A look at a trial, or that it failed for good."""
        identity = _identity(trial)
        if "failed" in result:
            self._end(identity, "failed", result["failed"])
            return
        if "figures" not in result or self.closed:
            return
        with self.ledger.changing(identity) as record:
            record.looked(result["epoch"], result["figures"], result["violation"])
            record.training = result["training"]
            record.settings |= result["perturbed"]
            record.parameters |= result["perturbed"]
        for text in result["notices"]:
            self._notices.put(f"{identity}: {text}")
        named = {f"perturbed/{key}": value for key, value in result["perturbed"].items()}
        for entry in result["entries"]:
            self._children.hear(identity, {**entry, **named})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended, or was stopped."""
        record = self.ledger.trials[_identity(trial)]
        whole = record.epoch == record.epochs
        self._end(record.id, "done" if whole else "stopped", None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed, and is not tried again."""
        error = trial.get_error()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = lines[-1] if lines else "unknown"
        for kind in ("amint_ray.contracts.RunError: ", "amint_ray.contracts.UserError: "):
            last = last.removeprefix(kind)
        self._end(_identity(trial), "failed", last)

    def _end(self, trial: str, state: Any, reason: str | None) -> None:
        if self.ledger.trials[trial].ended or self.closed:
            return
        self.ledger.end(trial, state, reason)
        self._children.end(trial, state, reason)
        self._proposals.learn(trial)
        if state == "failed":
            failed = self.ledger.where(lambda t: t.state == "failed" and not t.baseline)
            alike = len({_without_names(record.reason or "") for record in failed}) == 1
            some = self.ledger.where(lambda t: bool(t.history) and not t.baseline)
            self.hopeless |= len(failed) >= _ENOUGH_FAILURES and alike and not some

    def settle(self) -> None:
        """End what Tune stopped without a word: its time was up, or nothing could come of it."""
        for record in self.ledger.where(lambda trial: trial.state == "running"):
            self._end(record.id, "stopped", "the search ended")


def _without_names(reason: str) -> str:
    """Of actors and the like, which differ from trial to trial."""
    return re.sub(r"\b[0-9a-f]{8,}\b", "…", reason)


def create_scheduler(search: Search, follower: Follower) -> TrialScheduler:
    """Tune's scheduler; ASHA knows of all trials that have ended already."""
    spec = search.spec
    if spec.scheduler.name == "none":
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric="score",
        mode="max",
        max_t=_MOST_EPOCHS,
        grace_period=spec.scheduler.grace,
        reduction_factor=spec.scheduler.reduction,
    )
    for record in follower.ledger.where(lambda t: t.ended and not t.baseline and bool(t.history)):
        remembered = SimpleNamespace(trial_id=record.id)
        scheduler.on_trial_add(None, remembered)
        for entry in record.history:
            score = _score(search, entry)
            scheduler.on_trial_result(
                None, remembered, {"epoch": int(entry["epoch"]), "score": score}
            )
    return scheduler


def _score(search: Search, entry: Mapping[str, float]) -> float:
    """Of a look that is in the ledger, as the trial reported it."""
    spec = search.spec
    score: float = judged(spec.objective[0], None, entry, plain=None)["score"]
    return score - penalty(entry.get("violation"))


class _Population(PopulationBasedTraining):  # type: ignore[misc]  # Ray tells no types
    """Lets those go on who wait for one that ended, which Tune, looking at reports alone, does not.

    A member of a search that was started again may have no checkpoint left to report, and one that
    fails reports nothing more.
    """

    _next_perturbation_sync: int

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self._no_longer_wait_for(trial, tune_controller)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, trial)
        self._no_longer_wait_for(trial, tune_controller)

    def _no_longer_wait_for(self, ended: Any, tune_controller: Any) -> None:
        others = [trial for trial in tune_controller.get_live_trials() if trial is not ended]
        rounds = [self._trial_state[trial].last_train_time for trial in others]
        if rounds and min(rounds) >= self._next_perturbation_sync:
            self._next_perturbation_sync = max(rounds) + 1


def _population(search: Search) -> PopulationBasedTraining:
    algorithm = search.spec.algorithm
    mutations: dict[str, Any] = {}
    bounds: dict[str, Real] = {}
    for key in algorithm.perturb:
        parameter = search.space.parameters[key]
        assert isinstance(parameter, Real)
        bounds[key] = parameter
        *sections, name = key.split(".")
        at = mutations
        for section in sections:
            at = at.setdefault(section, {})
        drawn = tune.loguniform if parameter.log else tune.uniform
        at[name] = drawn(parameter.low, parameter.high)
    # Which of several it draws from; it takes no seed of its own.
    random.seed(algorithm.seed)
    np.random.seed(algorithm.seed)

    def within(arguments: dict[str, Any]) -> dict[str, Any]:
        for key, parameter in bounds.items():
            *sections, name = key.split(".")
            at = arguments["proposal"]["config"]
            for section in sections:
                at = at[section]
            at[name] = min(max(at[name], parameter.low), parameter.high)
        return arguments

    return _Population(
        # Not its epoch: members of a search that was started again are not at the same one, and
        # Tune would wait for ever for somebody to reach one that all have passed.
        time_attr="round",
        metric="score",
        mode="max",
        perturbation_interval=1,
        hyperparam_mutations={"proposal": {"config": mutations}},
        custom_explore_fn=within,
        require_attrs=False,
        # One that is ahead would have nobody to compare with, and exchange nothing.
        synch=True,
        log_config=False,
    )
