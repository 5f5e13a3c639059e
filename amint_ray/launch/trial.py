"""What Ray Tune runs for each trial: a whole training on Ray Train, and its news to the search."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from amint_ray.config.load import training_fingerprint
from amint_ray.config.schema import Config
from amint_ray.config.search_schema import Constraint, Objective
from amint_ray.contracts import RunError, UserError, Watcher, first_line
from amint_ray.launch.fit import DivergedError, Job, fit
from amint_ray.model.joint import plan_architecture
from amint_ray.storage import Location, open_input

SELECTION = "selection."
"""What the names of the figures that a search selects by begin with in an epoch's entry."""
_LINEAGE = "lineage.json"
_INFEASIBLE = 1e6
_SECONDS_TO_COMMIT = 120.0


@dataclass(frozen=True)
class Given:
    """What all trials of a search share.

    Attributes:
        name: unique among all searches of the cluster; begins the names of the trainings.
        data: references to what the workers read, as `worker.open_streams` takes it.
        manifest: fingerprint of images and roles.
        classes: how many there are.
        runs: where the trials' trainings are kept.
        workers: of each.
        use_gpu: whether each worker has one.
        sign: path of a file in storage, which all nodes of a cluster must see.
        objectives: of the search.
        constraint: of the search.
        hand_over: epochs after which the trial leaves a checkpoint that others can take over; 0:
            it leaves none.
        perturbed: keys of the configuration that may change in mid-run.
    """

    name: str
    data: Mapping[str, Any]
    manifest: str
    classes: int
    runs: Location
    workers: int | tuple[int, int]
    use_gpu: bool
    sign: str
    objectives: Sequence[Objective]
    constraint: Constraint | None
    hand_over: int = 0
    perturbed: Sequence[str] = ()


def run_trial(config: dict[str, Any], given: Given) -> None:
    """Train one configuration, and report each look at its figures to Tune.

    A report has `epoch`, `score` (the first objective, larger is better, infeasible below all
    others; of a plain model there is none, and of a member of a population only where others can
    take over its checkpoint, with `round`, how often it has left one), `violation`, `figures`
    (flat, by name), `entries` (those of the epochs since the last report, for MLflow), `training`
    (its name), `perturbed` (the values of those keys) and `notices`. A trial that cannot succeed
    reports `failed`, and why, and is not tried again.

    Args:
        config: Tune's name for what it hands a trial; `proposal` has what `Proposals` made.
        given: the same for all trials.

    Raises:
        RunError: it failed, and may succeed if it is tried again.
        SystemExit: Tune stops it.
    """
    proposal = config["proposal"]
    if proposal["invalid"] is not None:
        tune.report({"failed": proposal["invalid"]})
        return
    trained = Config.model_validate(proposal["config"])
    # Of steps and machines the search is told nothing; Ray would keep it.
    silent = trained.tracking.model_copy(update={"enabled": False})
    trained = trained.model_copy(update={"tracking": silent})
    # Its own name: a member of a population may have been given another's proposal.
    run_name, inherit, rounds = _life(given.name, tune.get_context().get_trial_name(), trained)
    reporter = _Reporter(given, proposal, run_name, rounds)
    try:
        job = Job(
            config=trained,
            run_name=run_name,
            architecture=replace(
                plan_architecture(trained, num_classes=2), num_classes=given.classes
            ),
            manifest=given.manifest,
            storage=given.runs,
            goes_on=True,
            score=False,
            inherit=inherit,
        )
        fit(
            job,
            given.data,
            reporter,
            reporter,
            workers=given.workers,
            use_gpu=given.use_gpu,
            sign=given.sign,
        )
    except (DivergedError, UserError) as error:
        tune.report({"failed": first_line(error)})


def _life(search: str, trial: str, config: Config) -> tuple[str, ray.train.Checkpoint | None, int]:
    """Name of the training, the checkpoint of another one that it goes on from, and its round.

    A trial whose configuration was changed begins a training of its own, from the weights that it
    took over; one that was only interrupted goes on with what it had. The round is that of the
    checkpoint that Tune holds of the trial; of a search that was started again it holds none: 0.
    """
    run_name = f"{search}-{trial}-{training_fingerprint(config)[:8]}"
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return run_name, None, 0
    with checkpoint.as_directory() as folder:
        lineage = json.loads((Path(folder) / _LINEAGE).read_text())
    if lineage["run_name"] == run_name:
        return run_name, None, lineage["round"]
    inherit = ray.train.Checkpoint(checkpoint.path, checkpoint.filesystem)
    return run_name, inherit, lineage["round"]


class _Reporter:
    """Passes a training's news on to Tune; both its listener and its watcher."""

    def __init__(
        self, given: Given, proposal: Mapping[str, Any], run_name: str, rounds: int = 0
    ) -> None:
        self._given, self._proposal, self._run_name = given, proposal, run_name
        self._rounds = rounds
        self._epoch = 0
        self._entries: list[dict[str, float]] = []
        self._notices: list[str] = []

    def hear(self, event: Mapping[str, Any]) -> None:
        """Report an epoch that was looked at."""
        if event["phase"] != "epoch" or event["epoch"] <= self._epoch:
            return
        self._epoch = int(event["epoch"])
        entry = {name: value for name, value in event.items() if name != "phase"}
        self._entries.append(entry)
        figures = {
            name.removeprefix(SELECTION): value
            for name, value in entry.items()
            if name.startswith(SELECTION)
        }
        if not figures:
            return
        report = {
            "epoch": self._epoch,
            **judged(
                self._given.objectives[0],
                self._given.constraint,
                figures,
                plain=plain_at(self._proposal["plain"], self._epoch),
            ),
            "figures": figures,
            "training": self._run_name,
            "perturbed": {key: _at(self._proposal["config"], key) for key in self._given.perturbed},
            "entries": self._entries,
            "notices": self._notices,
        }
        self._entries, self._notices = [], []
        every = self._given.hand_over
        if every and not self._proposal["baseline"]:
            self._exchange(report, whole=self._epoch % every == 0)
            return
        if self._proposal["baseline"]:  # the scheduler would compare it with the trials
            del report["score"]
        tune.report(report)

    def _exchange(self, report: dict[str, Any], *, whole: bool) -> None:
        """Report as a member of a population; with a score only if others can take over this epoch.

        Tune would have the others wait for one without a checkpoint, and exchange nothing. A member
        that is done has none: it would take over another's weights, to do nothing with them.

        Args:
            report: of this epoch.
            whole: whether as many epochs have passed as lie between two exchanges.
        """
        last = self._epoch == self._proposal["config"]["train"]["epochs"]
        run = self._given.runs.below(self._run_name)
        checkpoint = _committed(run, self._epoch) if whole and not last else None
        if checkpoint is None:
            del report["score"]
            tune.report(report)
            return
        self._rounds += 1
        lineage = {"run_name": self._run_name, "round": self._rounds}
        with checkpoint.as_directory() as folder, tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            (copy / _LINEAGE).write_text(json.dumps(lineage))
            report["round"] = self._rounds
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(copy))

    def notice(self, text: str) -> None:
        """Kept for the next report."""
        self._notices.append(text)

    def check(self, watcher: Watcher) -> None:
        """Nothing to be seen to."""

    def phase(self, text: str) -> None:
        """Nobody looks."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Nobody looks."""

    def heartbeat(self) -> None:
        """Tune ends a trial when it reports."""


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


def judged(
    objective: Objective,
    constraint: Constraint | None,
    figures: Mapping[str, float],
    *,
    plain: float | None,
) -> dict[str, Any]:
    """`score` and `violation` of a look.

    Args:
        objective: the first one.
        constraint: of the search.
        figures: by name; one that a look does not report leaves it behind all others.
        plain: the constraint's metric of the plain models at that epoch.
    """
    violation = None
    told = constraint is not None and constraint.metric in figures
    if constraint is not None and told and (plain is not None or not constraint.wants_plain):
        violation = constraint.violation(figures[constraint.metric], plain)
    value = figures.get(objective.metric)
    if value is None:
        return {"score": -(_INFEASIBLE**2), "violation": violation}
    score = value if objective.mode == "max" else -value
    return {"score": score - penalty(violation), "violation": violation}


def plain_at(curve: Mapping[str, float], epoch: int) -> float | None:
    """What the plain models had at their last look up to an epoch, or at their first.

    A trial whose configuration has other epochs than theirs is looked at when they were not.
    """
    looks = [int(look) for look in curve]
    before = [look for look in looks if look <= epoch]
    return curve[str(max(before) if before else min(looks))] if looks else None


def penalty(violation: float | None) -> float:
    """What puts a trial that breaks the constraint behind all that keep it."""
    return _INFEASIBLE * (1 + violation) if violation else 0.0


def _committed(run: Location, epoch: int) -> ray.train.Checkpoint | None:
    """A training's checkpoint of an epoch, once Ray Train lists it; None if it never does."""
    deadline = time.monotonic() + _SECONDS_TO_COMMIT
    while time.monotonic() < deadline:
        for result in _listed(run):
            if result["metrics"].get("epoch") == epoch:
                path = run.below(result["checkpoint_dir_name"])
                return ray.train.Checkpoint(path.path, path.filesystem)
            if result["metrics"].get("epoch", 0) > epoch:
                return None
        time.sleep(0.2)
    raise RunError(f"the checkpoint of epoch {epoch} did not reach storage in time")


def _listed(run: Location) -> list[dict[str, Any]]:
    """Checkpoints that Ray Train lists, oldest first."""
    try:
        with open_input(run, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME) as file:
            found: list[dict[str, Any]] = json.loads(file.read())["checkpoint_results"]
            return found
    except (OSError, ValueError, LookupError):  # not there yet, or being written
        return []
