"""How a trial's looks are judged, and which trials ASHA stops for it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launch.searches import ACCURACY, AUC, ask, ledger_in, place, play, proposing, searched
from ray import tune

from amint_ray.config.search import Search
from amint_ray.config.search_schema import Constraint, Objective
from amint_ray.launch import trial as trials
from amint_ray.launch.children import Children, Where
from amint_ray.launch.follower import Follower, _population, create_scheduler
from amint_ray.launch.ledger import Ledger, TrialRecord
from amint_ray.launch.trial import Given, judged, plain_at

AT_LEAST = Constraint(metric=ACCURACY, at_least=0.5)
BELOW = Constraint(metric=ACCURACY, most_below_plain=0.1)


def score(value: float, accuracy: float, plain: float | None = None, *, mode: str = "max") -> float:
    found: float = judged(
        Objective(metric=AUC, mode=mode),  # type: ignore[arg-type]
        AT_LEAST if plain is None else BELOW,
        {AUC: value, ACCURACY: accuracy},
        plain=plain,
    )["score"]
    return found


def test_what_breaks_the_constraint_is_behind_all_that_keeps_it() -> None:
    kept = [score(0.01, 0.5), score(0.5, 0.5), score(0.6, 0.99), score(0.9, 0.7)]
    broken = [score(0.99, 0.1), score(0.2, 0.4), score(0.99, 0.49), score(0.99, 0.4999)]
    unknown = judged(Objective(metric=AUC), None, {ACCURACY: 1.0}, plain=None)["score"]
    assert [unknown, *broken, *kept] == sorted([unknown, *broken, *kept])
    assert kept == [0.01, 0.5, 0.6, 0.9]
    assert score(0.9, 0.41, plain=0.5) == 0.9
    assert score(0.9, 0.39, plain=0.5) < score(0.1, 0.41, plain=0.5)


def test_less_is_better_where_it_is() -> None:
    assert score(0.3, 0.6, mode="min") == -0.3
    assert score(0.1, 0.4, mode="min") < score(0.9, 0.6, mode="min") < score(0.3, 0.6, mode="min")


def test_a_figure_that_is_missing() -> None:
    lost = judged(Objective(metric=AUC), AT_LEAST, {ACCURACY: 0.25}, plain=None)
    assert lost["violation"] == 0.25
    assert lost["score"] < score(0.0, 0.0)
    without = judged(Objective(metric=AUC), AT_LEAST, {AUC: 0.5}, plain=None)
    assert without == {"score": 0.5, "violation": None}
    assert judged(Objective(metric=AUC), BELOW, {AUC: 0.5, ACCURACY: 0.5}, plain=None) == without


def test_the_plain_model_is_asked_for_what_it_had_by_then() -> None:
    curve = {"3": 0.5, "6": 0.6, "8": 0.7}
    assert [plain_at(curve, epoch) for epoch in (2, 3, 5, 6, 8, 90)] == [
        0.5,
        0.5,
        0.5,
        0.6,
        0.7,
        0.7,
    ]
    assert plain_at({}, 3) is None


GIVEN = Given(
    name="search",
    data={},
    manifest="",
    classes=10,
    runs=place(Path()),
    workers=1,
    use_gpu=False,
    sign="",
    objectives=[Objective(metric=AUC)],
    constraint=None,
)


def reports(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, baseline: bool
) -> list[dict[str, Any]]:
    """What a trial tells Tune of five epochs, of which every second is looked at."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", told.append)
    given = replace(GIVEN, runs=place(folder), constraint=BELOW)
    arguments: dict[str, Any] = {"id": "t", "baseline": baseline, "plain": {}}
    arguments["config"] = {"train": {"epochs": 5}}
    if not baseline:
        arguments["plain"] = {"2": 0.9, "5": 0.8}
    reporter = trials._Reporter(given, arguments, "search-t")
    reporter.notice("slow")
    for epoch in (1, 2, 2, 3, 4, 5):  # one that is tried again begins where it was
        looked = {"selection." + AUC: 0.5 + epoch / 10, "selection." + ACCURACY: 0.6}
        if baseline:
            looked.pop("selection." + AUC)
        entry = {"epoch": epoch, "train/lr": 0.1, **(looked if epoch in (2, 4, 5) else {})}
        reporter.hear({"phase": "epoch", **entry})
        reporter.hear({"phase": "step", "epoch": epoch + 1})
    return told


def test_a_trial_reports_its_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = reports(monkeypatch, tmp_path, baseline=False)
    assert [report["epoch"] for report in told] == [2, 4, 5]
    assert [report["violation"] for report in told] == pytest.approx([0.2, 0.2, 0.1])
    assert [report["score"] for report in told] == pytest.approx(
        [0.7 - 1.2e6, 0.9 - 1.2e6, 1.0 - 1.1e6]
    )
    assert told[0]["figures"] == {AUC: 0.7, ACCURACY: 0.6}
    epochs = [[entry["epoch"] for entry in report["entries"]] for report in told]
    assert epochs == [[1, 2], [3, 4], [5]]
    assert {entry["train/lr"] for report in told for entry in report["entries"]} == {0.1}
    assert [report["notices"] for report in told] == [["slow"], [], []]


def test_the_plain_model_has_no_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = reports(monkeypatch, tmp_path, baseline=True)
    assert [report["epoch"] for report in told] == [2, 4, 5]
    assert all("score" not in report for report in told)
    assert [report["violation"] for report in told] == [None] * 3


@pytest.mark.parametrize(
    ("rounds", "first", "gone", "expected"),
    [
        (0, 1, 0, [(3, 1), (6, 2)]),
        (0, 5, 0, [(6, 1)]),
        (1, 4, 0, [(6, 2)]),
        (1, 5, 0, [(6, 2)]),
        (0, 1, 3, [(6, 1)]),
    ],
    ids=["from-scratch", "search-started-again", "exchanged", "exchanged-late", "one-is-gone"],
)
def test_a_member_has_a_score_only_with_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rounds: int,
    first: int,
    gone: int,
    expected: list[tuple[int, int]],
) -> None:
    given = replace(GIVEN, runs=place(tmp_path), hand_over=3)
    arguments = {"baseline": False, "plain": {}, "config": {"train": {"epochs": 9}}}
    reporter = trials._Reporter(given, arguments, "search-t", rounds)
    told: list[tuple[int, int]] = []
    committed = SimpleNamespace(as_directory=lambda: nullcontext(str(tmp_path / "committed")))
    (tmp_path / "committed").mkdir()

    def report(report: dict[str, Any], checkpoint: Any = None) -> None:
        assert ("score" in report) == ("round" in report) == (checkpoint is not None)
        if checkpoint is not None:
            told.append((report["epoch"], report["round"]))
            lineage = json.loads((Path(checkpoint.path) / "lineage.json").read_text())
            assert lineage == {"run_name": "search-t", "round": report["round"]}

    def at(run: Any, epoch: int) -> Any:
        assert epoch % 3 == 0, "it would be waited for, and there is none"
        return None if epoch == gone else committed

    monkeypatch.setattr(tune, "report", report)
    monkeypatch.setattr(trials, "_committed", at)
    for epoch in range(first, 10):
        reporter.hear({"phase": "epoch", "epoch": epoch, "selection." + AUC: 0.5})
    assert told == expected


EPOCH_OF = {"ahead": 8, "behind": 4}


class Population:
    """Two members at different epochs, as after a search was started again.

    Tune's scheduler, and a controller that runs none of them.
    """

    def __init__(self, folder: Path) -> None:
        pbt = ["algorithm.name=pbt", "scheduler.name=none", "algorithm.perturb_every=4"]
        both = {"loguniform": [0.1, 1.0]}
        space = {"loss.lambda_mint": both, "train.lr": both}
        self.scheduler = _population(searched(folder, *pbt, space=space))
        self.members = {
            name: tune.experiment.Trial("s", trial_id=name, stub=True) for name in EPOCH_OF
        }
        self.live = list(self.members.values())
        self.folder = folder
        self.controller: Any = SimpleNamespace(
            search_alg=None,
            get_trials=lambda: list(self.members.values()),
            get_live_trials=lambda: self.live,
            pause_trial=lambda trial, **_: trial.set_status("PAUSED"),
            _schedule_trial_save=lambda trial, result: f"of {trial.trial_id}",
        )
        for trial in self.live:
            config = {"loss": {"lambda_mint": 0.5}, "train": {"lr": 0.5}}
            trial.set_config({"proposal": {"config": config}})
            self.scheduler.on_trial_add(self.controller, trial)
            trial.set_status("RUNNING")

    def report(self, name: str, number: int, *, better: bool) -> None:
        trial = self.members[name]
        report = {"epoch": EPOCH_OF[name] * number, "score": float(better), "round": number}
        if self.scheduler.on_trial_result(self.controller, trial, report) == "PAUSE":
            trial.set_status("PAUSED")
            held = tune.Checkpoint.from_directory(self.folder)
            result: Any = SimpleNamespace(checkpoint=held, metrics={})
            trial.run_metadata.checkpoint_manager._latest_checkpoint_result = result


@pytest.mark.parametrize("better", ["ahead", "behind"])
def test_members_at_different_epochs_exchange_and_go_on(tmp_path: Path, better: str) -> None:
    population = Population(tmp_path)
    for number in (1, 2):
        before = {name: trial.config for name, trial in population.members.items()}
        for name in population.members:
            population.report(name, number, better=name == better)
        members = population.members.items()
        assert {name for name, trial in members if trial.config != before[name]} == set(
            population.members
        ) - {better}
        for _ in population.live:
            chosen = population.scheduler.choose_trial_to_run(population.controller)
            assert chosen is not None
            chosen.set_status("RUNNING")
        assert [trial.status for trial in population.live] == ["RUNNING"] * 2


@pytest.mark.parametrize("how", ["done", "failed"])
def test_nobody_waits_for_a_member_that_has_ended(tmp_path: Path, how: str) -> None:
    """Not even where it never came as far as to be compared."""
    population = Population(tmp_path)
    scheduler, controller = population.scheduler, population.controller
    population.report("behind", 1, better=True)
    assert scheduler.choose_trial_to_run(controller) is None
    ended = population.members["ahead"]
    if how == "done":
        scheduler.on_trial_complete(controller, ended, {})
    else:
        scheduler.on_trial_error(controller, ended)
    population.live.remove(ended)
    ended.set_status("TERMINATED")
    left = population.members["behind"]
    assert scheduler.choose_trial_to_run(controller) is left
    left.set_status("RUNNING")
    population.report("behind", 2, better=True)
    assert scheduler.choose_trial_to_run(controller) is left


EPOCHS = (3, 6, 9, 12, 27)


def scheduler(search: Search, ledger: Ledger, folder: Path) -> Any:
    where = Where("", "", "mine", folder, place(folder), {}, {})
    follower = Follower(
        ledger, Children(where, ledger), proposing(search, ledger), lambda trial: search.base
    )
    return create_scheduler(search, follower)


def look(
    search: Search, asha: Any, trial: TrialRecord, epoch: int, figures: dict[str, float]
) -> Any:
    """The scheduler's word on a look, as a trial reports it."""
    told = judged(search.spec.objective[0], search.spec.constraint, figures, plain=None)
    if trial.baseline:
        del told["score"]
    tuned = tune.experiment.Trial("stub", trial_id=trial.id, stub=True)
    return asha.on_trial_result(None, tuned, {"epoch": epoch, **told}), told["violation"]


def test_asha_that_was_rebuilt_stops_whom_it_would_have_stopped(tmp_path: Path) -> None:
    search = searched(
        tmp_path, constraint={"metric": ACCURACY, "at_least": 0.5}, scheduler={"grace": 3}
    )
    ledger, random = ledger_in(tmp_path), np.random.default_rng(0)
    whole = scheduler(search, ledger, tmp_path)
    proposals = proposing(search, ledger)

    def run(schedulers: list[Any], trial: TrialRecord) -> list[tuple[int, str]]:
        """The epoch at which each ends the trial, which goes on until all have."""
        ended: list[tuple[int, str]] = []
        base, accuracy = random.random(), 0.4 + 0.5 * random.random()
        for each in schedulers:
            each.on_trial_add(None, tune.experiment.Trial("stub", trial_id=trial.id, stub=True))
        looks = {}
        for epoch in EPOCHS:
            figures = {AUC: base + epoch / 100 + random.normal() / 20, ACCURACY: accuracy}
            words = {look(search, each, trial, epoch, figures) for each in schedulers}
            assert len(words) == 1, (trial.id, epoch, words)
            ((word, violation),) = words
            looks[epoch] = {"auc": figures[AUC], "accuracy": accuracy}
            ended.append((epoch, word))
            if word == "STOP":
                break
        state: Any = "stopped" if ended[-1][1] == "STOP" else "done"
        if len(schedulers) == 1:
            play(ledger, proposals, trial.id, looks, state, violation)
        return ended

    for number in range(2):  # which ASHA would take for the worst of all
        plain = TrialRecord(f"plain-{number}", -1, 0, {}, {}, baseline=True)
        ledger.add(plain)
        assert run([whole], plain)[-1] == (27, "CONTINUE")
    first = [run([whole], ledger.trials[str(ask(proposals))]) for _ in range(12)]
    assert {trial[-1][0] for trial in first} == {3, 9, 27}

    again = scheduler(search, ledger_in(tmp_path), tmp_path)
    rungs = [rung for rung in whole._brackets[0]._rungs if rung[1]]
    assert rungs == [rung for rung in again._brackets[0]._rungs if rung[1]]
    assert [(epoch, len(recorded)) for epoch, recorded in rungs][-1] == (3, 12)
    second = [run([whole, again], TrialRecord(f"new{n}", n, 0, {}, {})) for n in range(12)]
    assert {trial[-1][0] for trial in second} >= {3, 9}


def test_a_trial_may_have_more_epochs_than_the_recipe(tmp_path: Path) -> None:
    search = searched(tmp_path, space={"train.epochs": {"randint": [2, 60]}})
    asha = scheduler(search, Ledger(None), tmp_path)
    only = TrialRecord("t0000", 0, 0, {}, {})
    asha.on_trial_add(None, tune.experiment.Trial("stub", trial_id=only.id, stub=True))
    words = [look(search, asha, only, epoch, {AUC: 0.5})[0] for epoch in range(1, 61)]
    assert set(words) == {"CONTINUE"}


def test_what_the_population_changed_is_in_settings_and_parameters(tmp_path: Path) -> None:
    search, ledger = searched(tmp_path), Ledger(None)
    key = "loss.lambda_mint"
    ledger.add(TrialRecord("t0000", 0, 0, {key: 0.5, "placement": "entry"}, {key: 0.5}))
    where = Where("", "", "mine", tmp_path, place(tmp_path), {}, {})
    follower = Follower(
        ledger, Children(where, ledger), proposing(search, Ledger(None)), lambda trial: search.base
    )
    report = {"epoch": 2, "figures": {}, "violation": None, "training": "x", "notices": []}
    tuned = SimpleNamespace(custom_trial_name="t0000", config={"proposal": {"id": "t0001"}})
    told = {**report, "entries": [], "perturbed": {key: 0.6}}
    follower.on_trial_result(1, [], tuned, told)
    record = ledger.trials["t0000"]
    assert record.settings == {key: 0.6}
    assert record.parameters == {key: 0.6, "placement": "entry"}
