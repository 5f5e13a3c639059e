"""What a search tries next: Optuna's samplers, all combinations, or chance, as a searcher of Tune.

All that it knows is in the ledger. A search that goes on hands the sampler what the ledger has, and
proposes first what was under way.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from amint_ray.config.points import all_points, grid, point_name
from amint_ray.config.schema import Config
from amint_ray.config.search import Search
from amint_ray.config.search_schema import TRIALS_BY_DEFAULT
from amint_ray.config.space import Settings, Space, draw
from amint_ray.contracts import UserError, first_line
from amint_ray.launch.ledger import PLAIN, Ledger, TrialRecord
from amint_ray.launch.samplers import Recorded, by_chance, create_sampler

_CONSTRAINT = "constraint"
_MOST_DRAWS = 20
"""Of one configuration: a sampler may insist on what has been tried."""
REPEATED = "repeated"
"""What Optuna's trials that were drawn and not run are marked with."""


class Proposals(Searcher):  # type: ignore[misc]
    """Proposes trials, and learns from those that ended.

    Args:
        search: what is searched.
        space: its space, modules filled in.
        ledger: of its trials; new ones are added.
        configure: gives a trial's configuration; may raise UserError.
    """

    def __init__(
        self,
        search: Search,
        space: Space,
        ledger: Ledger,
        configure: Callable[[TrialRecord], Config],
    ) -> None:
        super().__init__(metric="score", mode="max")
        self._search, self._space, self._ledger = search, space, ledger
        self._configure = configure
        self._grid = grid(space) if search.spec.algorithm.name == "grid" else None
        points = all_points(space)
        self._size = None if points is None else len(points)
        self._asked: dict[int, optuna.Trial] = {}
        before = ledger.where(lambda trial: not trial.baseline)
        self._interrupted = [trial.id for trial in before if not trial.ended]
        self._plain = self._plain_trials()
        self._unbegun = [trial.id for trial in self._plain if not trial.ended]
        self._taken = {trial.configuration for trial in before}
        self._tried = {point_name(trial.settings) for trial in before}
        self._untried = (
            None
            if points is None
            else {name: points[name] for name in points if name not in self._tried}
        )
        self._seeds: list[tuple[int, Settings, Settings, int]] = []
        self._study = optuna.create_study(
            sampler=create_sampler(search, already=len(before)),
            directions=[
                "maximize" if objective.mode == "max" else "minimize"
                for objective in search.spec.objective
            ],
        )
        for number in sorted(self._taken):
            self._remember(number)

    @property
    def planned(self) -> int:
        """Trials in all."""
        return len(self._plain) + self._configurations * self._search.spec.seeds

    @property
    def left(self) -> bool:
        """Whether there is anything to be run."""
        new = self._next is not None
        return not self._in_vain and bool(self._unbegun or self._interrupted or self._seeds or new)

    @property
    def _in_vain(self) -> bool:
        """Whether there is no plain model to judge trials by, and will be none."""
        if any(trial.state == "failed" for trial in self._plain):
            return True
        return bool(self._plain) and all(t.ended for t in self._plain) and not self._curve()

    def _plain_trials(self) -> list[TrialRecord]:
        """The plain models that the constraint refers to; what failed before is tried again."""
        constraint = self._search.spec.constraint
        if constraint is None or not constraint.wants_plain:
            return []
        for number in range(self._search.spec.seeds):
            identity = f"{PLAIN}{number}"
            if identity not in self._ledger.trials:
                seed, without = self._search.seed + number, {"loss.lambda_mint": 0}
                self._ledger.add(TrialRecord(identity, -1, seed, {}, without, baseline=True))
        for trial in self._ledger.where(lambda trial: trial.baseline and trial.state == "failed"):
            # What broke it may be put right by now; without it nothing can be judged.
            with self._ledger.changing(trial.id) as record:
                record.state, record.reason = "waiting", None
        return self._ledger.where(lambda trial: trial.baseline)

    @property
    def exhausted(self) -> str | None:
        """What to say where all of the space was tried before the budget was spent; else None."""
        if self._size is None or self._size >= self._wanted or self.left or self._in_vain:
            return None
        if self._size == 1:
            return "the only configuration of the space was tried"
        return f"all {self._size} configurations of the space were tried"

    @property
    def _wanted(self) -> int:
        """Configurations, if there are so many."""
        whole = TRIALS_BY_DEFAULT if self._grid is None else len(self._grid)
        return self._search.spec.budget.trials or whole

    @property
    def _configurations(self) -> int:
        if self._grid is not None:
            return min(self._wanted, len(self._grid))
        if self._untried is not None:
            return min(self._wanted, len(self._taken) + len(self._untried))
        return self._wanted

    @property
    def _next(self) -> int | None:
        """Number of the next configuration, or of one whose trials were forgotten; None: no more.

        A grid's numbers are its points.
        """
        numbers = range(self._configurations)
        return next((number for number in numbers if number not in self._taken), None)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial: its id in the ledger, and its configuration as JSON.

        None while the plain models are trained: trials are judged by them. The end where one of
        them failed, or nothing is known of any.
        """
        if self._in_vain:
            return str(Searcher.FINISHED)
        if self._unbegun:
            return self._begun(self._unbegun.pop(0))
        if not all(trial.ended for trial in self._plain):
            return None
        if self._interrupted:
            return self._begun(self._interrupted.pop(0))
        if not self._seeds:
            if (new := self._next) is None:
                return str(Searcher.FINISHED)
            self._seeds = self._new_configuration(new)
        number, parameters, settings, seed = self._seeds.pop(0)
        identity = f"t{number * self._search.spec.seeds + seed - self._search.seed:04d}"
        noted = self._noted(number)
        record = TrialRecord(identity, number, seed, parameters, settings, attributes=noted)
        self._ledger.add(record)
        return self._begun(identity)

    def take(self, *, baselines: bool) -> list[dict[str, Any]]:
        """All that is still to be run, at once: what Tune gives each trial."""
        if baselines:
            return [self._begun(name)["proposal"] for name in self._unbegun]
        self._unbegun, found = [], []
        while isinstance(proposed := self.suggest(""), dict):
            found.append(proposed["proposal"])
        return found

    def _begun(self, identity: str) -> dict[str, Any]:
        """What Tune gives the trial, as `proposal`.

        `id`; `config`, or why there is none as `invalid`; `baseline`, whether it is a plain model;
        and `plain`, what those had by epoch.
        """
        trial, config, invalid = self._ledger.trials[identity], None, None
        try:
            config = self._configure(trial)
        except UserError as error:
            invalid = first_line(error)
        else:
            with self._ledger.changing(identity) as record:
                record.epochs = config.train.epochs
        proposal = {
            "id": identity,
            "config": None if config is None else config.model_dump(mode="json"),
            "invalid": invalid,
            "baseline": trial.baseline,
            "plain": {} if trial.baseline else self._curve(),
        }
        return {"proposal": proposal}

    def _curve(self) -> dict[str, float]:
        """The constraint's metric of the plain models by epoch: means over their seeds."""
        constraint = self._search.spec.constraint
        assert constraint is not None or not self._plain
        found: dict[str, list[float]] = {}
        for trial in self._plain:
            for entry in trial.history:
                if constraint is not None and constraint.metric in entry:
                    epoch = str(int(entry["epoch"]))
                    found.setdefault(epoch, []).append(entry[constraint.metric])
        return {epoch: statistics.fmean(values) for epoch, values in found.items()}

    def _new_configuration(self, number: int) -> list[tuple[int, Settings, Settings, int]]:
        self._taken.add(number)
        if self._grid is not None:
            parameters, settings = self._grid[number]
        else:
            parameters, settings = self._draw(number)
        return [
            (number, parameters, settings, self._search.seed + i)
            for i in range(self._search.spec.seeds)
        ]

    def _draw(self, number: int) -> tuple[Settings, Settings]:
        """A point that has not been tried: the sampler's, or by chance where it insists on others.

        Where a space has few points beside those of a branch, that may fail, too.
        """
        for draws in range(_MOST_DRAWS + 1):
            if draws == _MOST_DRAWS:
                self._study.enqueue_trial(self._other())
            asked = self._study.ask()
            parameters, settings = draw(self._space, asked)
            if (name := point_name(settings)) not in self._tried:
                break
            if draws < _MOST_DRAWS:
                asked.set_user_attr(REPEATED, True)
                self._study.tell(asked, state=TrialState.FAIL)
        self._tried.add(name)
        if self._untried is not None:
            self._untried.pop(name, None)
        self._asked[number] = asked
        return parameters, settings

    def _other(self) -> Settings:
        """Parameters of a point that has not been tried."""
        if self._untried:
            return next(iter(self._untried.values()))
        points = list(itertools.islice(by_chance(self._space, len(self._tried)), _MOST_DRAWS))
        untried = (point for point, sets in points if point_name(sets) not in self._tried)
        return next(untried, points[0][0])

    def _noted(self, number: int) -> dict[str, Any]:
        """What the sampler noted of a configuration when it was asked for it (its generation)."""
        asked = self._asked.get(number)
        if asked is None:
            return {}
        return dict(self._study._storage.get_trial_system_attrs(asked._trial_id))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: Tune calls this before the ledger knows how the trial ended."""

    def learn(self, trial: str) -> None:
        """Tell the sampler of a trial that ended, once all seeds of its configuration have."""
        record = self._ledger.trials[trial]
        if not record.baseline:
            self._learn(record.configuration)

    def _learn(self, number: int) -> None:
        asked = self._asked.get(number)
        told = self._outcome(number)
        if asked is None or told is None:
            return
        values, state, violation = told
        if violation is not None:
            asked.set_constraint(_CONSTRAINT, violation)
        if state == TrialState.PRUNED:
            asked.report(values[0], self._reached(number))
        self._study.tell(asked, values if state == TrialState.COMPLETE else None, state=state)
        del self._asked[number]

    def _outcome(self, number: int) -> tuple[Any, TrialState, float | None] | None:
        """Means over the seeds, and how it ended; None: not all of them have.

        Seeds that were stopped at different epochs are compared at the last that all have reached.
        """
        trials = self._of(number)
        if len(trials) < self._search.spec.seeds or not all(trial.ended for trial in trials):
            return None
        names = [objective.metric for objective in self._search.spec.objective]
        looked = [trial for trial in trials if trial.state != "failed" and trial.history]
        reached = min((trial.epoch for trial in looked), default=0)
        looks = [_look(trial, reached) for trial in looked]
        measured = [look for look in looks if all(name in look for name in names)]
        if not measured:
            return [], TrialState.FAIL, None
        values = [statistics.fmean(look[name] for look in measured) for name in names]
        broken = [look["violation"] for look in measured if "violation" in look]
        violation = statistics.fmean(broken) if broken else None
        stopped = any(trial.state == "stopped" for trial in looked)
        # Only of one objective can Optuna's samplers take that it was not seen to the end.
        pruned = stopped and len(names) == 1
        return values, TrialState.PRUNED if pruned else TrialState.COMPLETE, violation

    def _reached(self, number: int) -> int:
        """The last epoch that all seeds which did not fail have reached."""
        return min(t.epoch for t in self._of(number) if t.state != "failed" and t.history)

    def _of(self, number: int) -> list[TrialRecord]:
        return self._ledger.where(lambda t: not t.baseline and t.configuration == number)

    def _remember(self, number: int) -> None:
        """Hand the sampler a configuration that an earlier driver proposed."""
        trials = self._of(number)
        parameters, settings = trials[0].parameters, trials[0].settings
        for seed in range(self._search.seed, self._search.seed + self._search.spec.seeds):
            if seed not in {trial.seed for trial in trials}:
                self._seeds.append((number, parameters, settings, seed))
        if self._grid is not None:
            return
        recorded = Recorded(parameters)
        draw(self._space, recorded)
        told = self._outcome(number)
        noted = trials[0].attributes
        if told is None:  # under way: the sampler is asked for the same again
            self._study.enqueue_trial(recorded.values)
            self._asked[number] = asked = self._study.ask()
            draw(self._space, asked)
            for name, value in noted.items():
                self._study._storage.set_trial_system_attr(asked._trial_id, name, value)
            return
        values, state, violation = told
        pruned = state == TrialState.PRUNED
        known = create_trial(
            params=recorded.values,
            distributions=recorded.distributions,
            values=values or None,
            state=state,
            intermediate_values={self._reached(number): values[0]} if pruned else None,
            system_attrs=dict(noted),
        )
        if violation is not None:
            known.set_constraint(_CONSTRAINT, violation)
        self._study.add_trial(known)

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file; what is to be kept is in the ledger."""
        Path(checkpoint_path).write_text(str(len(self._taken)))

    def __getstate__(self) -> dict[str, Any]:
        """Tune stores the searcher, too; it is never read."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Proposals:
        """Tune works with what it was given."""
        return self

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search that goes on makes a new one of these from the ledger."""


def _look(trial: TrialRecord, epoch: int) -> dict[str, float]:
    """A trial's last look up to an epoch; empty before its first."""
    return next((look for look in reversed(trial.history) if look["epoch"] <= epoch), {})
