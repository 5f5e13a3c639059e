"""What a search tries next, with trials whose figures are made up."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from launch.searches import ask, ledger_in, play, proposing, searched

from amint_ray.config.points import grid
from amint_ray.config.search import Search
from amint_ray.contracts import UserError
from amint_ray.launch.ledger import Ledger, State, TrialRecord
from amint_ray.launch.proposals import REPEATED, Proposals

PLAIN = {"metric": "task.accuracy", "most_below_plain": 0.02}
FINISHED = "FINISHED"


def proposed(search: Search, number: int) -> list[TrialRecord]:
    """The first so many trials, none of which has ended."""
    ledger = Ledger(None)
    proposals = proposing(search, ledger)
    return [ledger.trials[str(ask(proposals))] for _ in range(number)]


def given(proposals: Proposals) -> dict[str, Any]:
    """What Tune hands the next trial."""
    proposed = proposals.suggest("Tune's name of it")
    assert isinstance(proposed, dict)
    found: dict[str, Any] = proposed["proposal"]
    return found


def test_the_same_seed_proposes_the_same(tmp_path: Path) -> None:
    for name in ("tpe", "random"):
        search = searched(tmp_path, f"algorithm.name={name}")
        one, again = (proposed(search, 8) for _ in range(2))
        assert one == again
        other = proposed(searched(tmp_path, f"algorithm.name={name}", "algorithm.seed=1"), 8)
        mine = [trial.parameters for trial in one]
        assert all(trial.parameters not in mine for trial in other)
        assert len({str(parameters) for parameters in mine}) == 8


def test_seeds_of_a_configuration_come_one_after_the_other(tmp_path: Path) -> None:
    search = searched(tmp_path, "seeds=3", "budget.trials=2", "train.seed=5")
    ledger = Ledger(None)
    proposals = proposing(search, ledger)
    assert proposals.planned == 6
    assert [ask(proposals) for _ in range(7)] == [*(f"t000{n}" for n in range(6)), FINISHED]
    trials = ledger.where(lambda trial: True)
    assert [trial.configuration for trial in trials] == [0, 0, 0, 1, 1, 1]
    assert [trial.seed for trial in trials] == [5, 6, 7] * 2
    for three in (trials[:3], trials[3:]):
        assert all(trial.settings == three[0].settings for trial in three)
    assert trials[0].settings != trials[3].settings


def test_the_configuration_is_what_tune_gets(tmp_path: Path) -> None:
    search = searched(tmp_path, "train.epochs=6")
    ledger = Ledger(None)

    def configure(trial: TrialRecord) -> Any:
        if trial.id == "t0001":
            raise UserError("mint.taps: it cannot be")
        return search.config(trial.settings, seed=trial.seed)

    proposals = Proposals(search, search.space, ledger, configure)
    first, second = given(proposals), given(proposals)
    trial = ledger.trials["t0000"]
    assert trial.epochs == 6
    assert (first["id"], first["invalid"], first["baseline"]) == ("t0000", None, False)
    assert first["config"] == search.config(trial.settings, seed=0).model_dump(mode="json")
    assert (second["config"], second["invalid"]) == (None, "mint.taps: it cannot be")


def test_plain_models_come_first_and_the_others_wait(tmp_path: Path) -> None:
    search = searched(tmp_path, "seeds=2", "budget.trials=2", "train.seed=3", constraint=PLAIN)
    ledger = Ledger(None)
    proposals = proposing(search, ledger)
    assert proposals.planned == 6
    assert [ask(proposals) for _ in range(3)] == ["plain-0", "plain-1", None]
    plain = ledger.trials["plain-1"]
    assert (plain.seed, plain.settings, plain.baseline) == (4, {"loss.lambda_mint": 0}, True)
    play(ledger, proposals, "plain-0", {2: {"accuracy": 0.5}, 4: {"accuracy": 0.75}})
    assert ask(proposals) is None
    play(ledger, proposals, "plain-1", {2: {"accuracy": 0.7}, 4: {"accuracy": 0.85}})
    first = given(proposals)
    assert first["id"] == "t0000"
    assert first["plain"] == pytest.approx({"2": 0.6, "4": 0.8})
    again = proposing(search, ledger)
    assert ask(again) == "t0000"


def test_a_plain_model_that_failed_ends_it(tmp_path: Path) -> None:
    search = searched(tmp_path, "seeds=2", constraint=PLAIN)
    ledger = ledger_in(tmp_path)
    proposals = proposing(search, ledger)
    ask(proposals)
    play(ledger, proposals, "plain-0", {}, "failed")
    assert ask(proposals) == FINISHED
    assert not proposals.left


def test_a_plain_model_that_failed_is_tried_again_when_the_search_goes_on(tmp_path: Path) -> None:
    search = searched(tmp_path, "budget.trials=1", constraint=PLAIN)
    ledger = ledger_in(tmp_path)
    proposals = proposing(search, ledger)
    ask(proposals)
    play(ledger, proposals, "plain-0", {}, "failed")
    ledger = ledger_in(tmp_path)
    again = proposing(search, ledger)
    assert again.left
    assert [ask(again) for _ in range(2)] == ["plain-0", None]
    mended = play(ledger, again, "plain-0", {2: {"accuracy": 0.5}})
    assert (mended.state, mended.reason) == ("done", None)
    assert [ask(again) for _ in range(2)] == ["t0000", FINISHED]


def test_a_grid_is_gone_through_once(tmp_path: Path) -> None:
    space = {"mint.head": {"choice": ["mlp", "conv"]}, "mint.hidden": {"randint": [3, 5]}}
    search = searched(tmp_path, "algorithm.name=grid", space=space)
    ledger = ledger_in(tmp_path)
    proposals = proposing(search, ledger)
    names = [ask(proposals) for _ in range(4)]
    for name in names[:3]:
        play(ledger, proposals, str(name), {1: {"auc": 0.5}})
    proposals = proposing(search, ledger_in(tmp_path))
    assert [ask(proposals) for _ in range(4)] == ["t0003", "t0004", "t0005", FINISHED]
    trials = ledger_in(tmp_path).where(lambda trial: True)
    assert [(t.parameters, t.settings) for t in trials] == grid(search.space)
    fewer = searched(tmp_path, "algorithm.name=grid", "budget.trials=4", space=space)
    assert proposing(fewer, Ledger(None)).planned == 4


SIX = {"mint.head": {"choice": ["mlp", "conv"]}, "mint.hidden": {"randint": [3, 5]}}


@pytest.mark.parametrize("algorithm", ["random", "tpe", "nsga2"])
def test_a_small_space_is_tried_once_and_then_the_search_ends(
    tmp_path: Path, algorithm: str
) -> None:
    names = (f"algorithm.name={algorithm}", "algorithm.startup=2")
    two = [{"metric": "membership.member.auc"}, {"metric": "task.accuracy"}]
    search = searched(tmp_path, *names, "seeds=2", space=SIX, objective=two)
    for _ in range(2):  # a driver dies when four have been tried
        ledger = ledger_in(tmp_path)
        proposals = proposing(search, ledger)
        assert proposals.planned == 12
        for _ in range(8):
            if (name := ask(proposals)) != FINISHED:
                play(ledger, proposals, str(name), {1: {"auc": 0.9, "accuracy": 0.9}})
    assert not proposals.left
    trials = ledger.where(lambda trial: trial.seed == 0)
    found = [(trial.parameters, trial.settings) for trial in trials]
    assert sorted(found, key=str) == sorted(grid(search.space), key=str)
    assert proposals.exhausted == "all 6 configurations of the space were tried"


def test_it_is_not_said_that_all_was_tried_where_the_budget_ended_it(tmp_path: Path) -> None:
    for number, names in enumerate((["budget.trials=6"], ["algorithm.name=grid"], [])):
        search = searched(tmp_path, *names, space=SIX)
        proposals = proposing(search, Ledger(None))
        assert proposals.exhausted is None
        while ask(proposals) != FINISHED:
            assert proposals.exhausted is None or not proposals.left
        assert (proposals.exhausted is None) == (number < 2)
    more = searched(tmp_path, "algorithm.name=grid", "budget.trials=7", space=SIX)
    assert proposing(more, Ledger(None)).planned == 6


def test_a_space_in_which_nothing_varies_is_one_configuration(tmp_path: Path) -> None:
    search = searched(
        tmp_path, "seeds=2", space={"mint.hidden": 8, "mint.head": {"choice": ["mlp"]}}
    )
    proposals = proposing(search, Ledger(None))
    assert proposals.planned == 2
    assert [ask(proposals) for _ in range(3)] == ["t0000", "t0001", FINISHED]
    assert proposals.exhausted == "the only configuration of the space was tried"


def test_what_a_branch_has_once_is_tried_once_though_others_have_numbers(tmp_path: Path) -> None:
    branches = {"one": {"mint.taps": "entry"}, "two": {"train.lr": {"uniform": [0.1, 1]}}}
    search = searched(tmp_path, space={"b": {"branches": branches}})
    ledger = Ledger(None)
    proposals = proposing(search, ledger)
    assert proposals.planned == 16
    while (name := ask(proposals)) != FINISHED:
        auc = 0.9 if ledger.trials[str(name)].parameters["b"] == "one" else 0.5
        play(ledger, proposals, str(name), {1: {"auc": auc}})
    picked = [trial.parameters["b"] for trial in ledger.where(lambda trial: True)]
    assert (len(picked), picked.count("one")) == (16, 1)
    assert proposals.exhausted is None


def test_trials_that_were_forgotten_are_trained_again(tmp_path: Path) -> None:
    """Their files were damaged; the plain model comes first, as ever."""
    space = {"mint.hidden": {"randint": [3, 6]}}
    for names in (["algorithm.name=grid"], ["algorithm.name=random", "budget.trials=4"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        search = searched(folder, *names, "seeds=2", space=space, constraint=PLAIN)
        ledger = ledger_in(folder)
        proposals = proposing(search, ledger)
        while isinstance(name := ask(proposals), str) and name != FINISHED:
            play(ledger, proposals, name, {1: {"auc": 0.5, "accuracy": 0.9}})
        whole = {name: (trial.seed, trial.settings) for name, trial in ledger.trials.items()}
        assert len(whole) == 10
        lost = ("plain-1", "t0002", "t0003", "t0007")
        for name in lost:
            (folder / f"trials/{name}.json").write_text("{")
        ledger = ledger_in(folder)
        again = proposing(search, ledger)
        assert again.left
        assert [ask(again) for _ in range(2)] == ["plain-1", None]
        play(ledger, again, "plain-1", {1: {"accuracy": 0.9}})
        # First the seed that is missing of a configuration that is known.
        assert [ask(again) for _ in range(4)] == ["t0007", "t0002", "t0003", FINISHED]
        now = {name: (trial.seed, trial.settings) for name, trial in ledger.trials.items()}
        same = set(whole) if "algorithm.name=grid" in names else {*whole} - {"t0002", "t0003"}
        assert {name: now[name] for name in same} == {name: whole[name] for name in same}
        assert set(now) == set(whole)


def test_nothing_can_influence_the_first_ones(tmp_path: Path) -> None:
    """Which is why they can be shown before the search begins."""
    search = searched(tmp_path, algorithm={"startup": 6})
    alone = [trial.settings for trial in proposed(search, 6)]
    ledger = Ledger(None)
    proposals = proposing(search, ledger)
    for number, settings in enumerate(alone):
        trial = str(ask(proposals))
        assert play(ledger, proposals, trial, {1: {"auc": number}}).settings == settings


STATES: list[State] = ["done", "stopped", "failed", "done", "done", "stopped", "done"]


def played(search: Search, folder: Path, *, single: bool) -> tuple[Ledger, Proposals]:
    """Seven configurations that ended, in every way, and two of which some trials have not."""
    ledger = ledger_in(folder)
    proposals = proposing(search, ledger)
    for number, state in enumerate(STATES):
        for seed in range(2):
            trial = str(ask(proposals))
            figures = {"auc": 0.5 + number / 20 + seed / 100, "accuracy": 0.8 - number / 50}
            looks = {} if state == "failed" else {2: figures, 4: {**figures, "auc": 0.9}}
            play(ledger, proposals, trial, looks, state, violation=number / 100 if single else None)
    # Another order than theirs: the last one ends first.
    names = [str(ask(proposals)) for _ in range(3)]
    play(ledger, proposals, names[1], {2: {"auc": 0.6, "accuracy": 0.6}})
    ledger.begin(names[0])
    return ledger, proposals


def known(proposals: Proposals) -> list[Any]:
    """All that Optuna's samplers can know of the trials."""
    return [
        (
            *(number, trial.state, trial.params, trial.distributions, trial.values),
            *(trial.intermediate_values, trial.constraints),
        )
        for number, trial in enumerate(run(proposals))
    ]


def run(proposals: Proposals) -> list[Any]:
    """Optuna's trials but those that were drawn and, being repetitions, not run."""
    return [trial for trial in proposals._study.trials if REPEATED not in trial.user_attrs]


TWO = [{"metric": "membership.member.auc"}, {"metric": "task.accuracy"}]
LIMIT = {"metric": "task.accuracy", "at_least": 0.5}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("tpe", {"constraint": LIMIT}),
        ("tpe", {"objective": TWO, "constraint": LIMIT}),
        ("nsga2", {"objective": TWO}),
        ("random", {}),
    ],
)
def test_after_a_kill_a_search_goes_on(
    tmp_path: Path, algorithm: str, changes: dict[str, Any]
) -> None:
    search = searched(
        tmp_path, "seeds=2", f"algorithm.name={algorithm}", "algorithm.startup=4", **changes
    )
    ledger, whole = played(search, tmp_path, single="constraint" in changes)
    before = {name: trial.settings for name, trial in ledger.trials.items()}
    others = ledger_in(tmp_path)
    again = proposing(search, others)
    assert known(again) == known(whole)
    states = [state.name for _, state, *_ in known(again)]
    stopped = "PRUNED" if "objective" not in changes else "COMPLETE"
    ways = {"done": "COMPLETE", "stopped": stopped, "failed": "FAIL"}
    assert states == [*(ways[state] for state in STATES), "RUNNING", "RUNNING"]

    # What was under way, the seed that was not proposed yet, and then something new.
    assert [ask(again) for _ in range(4)] == ["t0014", "t0016", "t0017", "t0018"]
    assert others.trials["t0017"].settings == before["t0016"]
    assert {name: others.trials[name].settings for name in before} == before
    assert others.trials["t0018"].settings not in before.values()
    assert others.trials["t0018"].configuration == 9

    assert ask(whole) == "t0017"
    for name, auc in (("t0014", 0.7), ("t0016", 0.8), ("t0017", 0.6)):
        for trials, proposals in ((ledger, whole), (others, again)):
            play(trials, proposals, name, {2: {"auc": auc, "accuracy": 0.5}})
    assert known(again)[:9] == known(whole)
    assert {state.name for _, state, *_ in known(whole)[-2:]} == {"COMPLETE"}


def test_seeds_that_ended_at_different_epochs_are_compared_at_one_that_all_have_reached(
    tmp_path: Path,
) -> None:
    search = searched(tmp_path, "seeds=3", constraint=LIMIT)
    ledger = ledger_in(tmp_path)
    proposals = proposing(search, ledger)
    names = [str(ask(proposals)) for _ in range(3)]
    short, long = {2: {"auc": 0.5}}, {2: {"auc": 0.7}, 4: {"auc": 0.9}}
    play(ledger, proposals, names[0], short, "stopped", violation=0.25)
    play(ledger, proposals, names[1], long, "done", violation=0.75)
    play(ledger, proposals, names[2], {}, "failed")
    for each in (proposals, proposing(search, ledger_in(tmp_path))):
        (told,) = each._study.trials
        assert told.state.name == "PRUNED"
        assert told.intermediate_values == {2: pytest.approx(0.6)}
        assert list(told.constraints.values()) == [0.5]


def test_nsga2_goes_on_in_the_generation_it_was_in(tmp_path: Path) -> None:
    search = searched(tmp_path, "algorithm.name=nsga2", "algorithm.startup=4", objective=TWO)
    ledger = ledger_in(tmp_path)
    whole = proposing(search, ledger)
    for number in range(10):
        figures = {"auc": 0.5 + number / 30, "accuracy": 0.9 - number / 30}
        play(ledger, whole, str(ask(whole)), {1: figures})
    ask(whole)  # still under way

    def generations(proposals: Proposals) -> list[Any]:
        trials = run(proposals)
        return [trial.system_attrs.get("NSGAIISampler:generation") for trial in trials]

    again = proposing(search, ledger_in(tmp_path))
    assert generations(whole) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert generations(again) == generations(whole)
    for proposals in (whole, again):
        while len(run(proposals)) < 12:
            ask(proposals)
        assert generations(proposals)[-1] == 2


def test_each_time_it_goes_on_it_draws_something_new(tmp_path: Path) -> None:
    search = searched(tmp_path, "algorithm.name=random")
    for _ in range(6):
        ledger = ledger_in(tmp_path)
        proposals = proposing(search, ledger)
        play(ledger, proposals, str(ask(proposals)), {1: {"auc": 0.5}})
    trials = ledger_in(tmp_path).where(lambda trial: True)
    assert len({trial.settings["loss.lambda_mint"] for trial in trials}) == len(trials) == 6


def outcome(settings: dict[str, Any]) -> tuple[float, float]:
    """Best is (1, 0): at λ₂ = 0.1, 36 hidden, after the entry; and task accuracy falls with λ₂."""
    pull = math.log10(settings["loss.lambda_mint"])
    wrong = 0.6 if settings["mint.taps"] == "output" else abs(settings["mint.hidden"] - 36) / 28
    return 1 - ((pull + 1) / 3) ** 2 - wrong / 2, 0.9 - 0.1 * pull


def run_whole(search: Search) -> list[tuple[float, float]]:
    """AUC and violation of each trial of a search, in order."""
    ledger = Ledger(None)
    proposals = proposing(search, ledger)
    constraint = search.spec.constraint
    assert constraint is not None
    found = []
    while (trial := ask(proposals)) != FINISHED:
        auc, accuracy = outcome(ledger.trials[str(trial)].settings)
        broken = constraint.violation(accuracy, None)
        play(ledger, proposals, str(trial), {1: {"auc": auc, "accuracy": accuracy}}, "done", broken)
        found.append((auc, broken))
    return found


def test_tpe_learns_what_is_good_and_what_breaks_the_constraint(tmp_path: Path) -> None:
    limit = {"metric": "task.accuracy", "at_least": 0.9}  # λ₂ up to 1: half of the space

    def best(trials: list[tuple[float, float]]) -> float:
        return max(auc for auc, broken in trials if broken == 0)

    names = ("budget.trials=60", "algorithm.startup=10")
    by_chance = [
        run_whole(
            searched(
                tmp_path,
                *names,
                "algorithm.name=random",
                f"algorithm.seed={seed}",
                constraint=limit,
            )
        )
        for seed in range(9)
    ]
    learned = run_whole(searched(tmp_path, *names, constraint=limit))
    assert best(learned) > statistics.median(map(best, by_chance))
    late, early = learned[-20:], learned[:10]
    assert statistics.fmean(auc for auc, _ in late) > statistics.fmean(auc for auc, _ in early)
    assert sum(broken == 0 for _, broken in late) >= 15
    chance = statistics.fmean(broken == 0 for trials in by_chance for _, broken in trials)
    assert 0.4 < chance < 0.6
