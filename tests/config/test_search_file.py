"""Search files: those that ship, what the command line changes, and what is wrong in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from amint_ray.config.load import load_config
from amint_ray.config.points import grid
from amint_ray.config.search import Search, load_search, search_fingerprint
from amint_ray.config.search_schema import Constraint
from amint_ray.config.space import Branches, Choice, Constant, Modules, Real, Space
from amint_ray.contracts import UserError

SHIPPED = Path(__file__).parents[2] / "tune_configs"
NAMES = ("digits", "imagenet_vit", "loss_weighting", "paper_table1")
NAMES += ("placement", "placement_x_weighting")
CONTENT: dict[str, Any] = {
    "recipe": "digits",
    "space": {"mint.hidden": {"choice": [16, 32]}, "train.lr": {"loguniform": [1e-5, 1e-2]}},
}
BRANCHES: dict[str, Any] = {
    "placement": {
        "branches": {
            "a": {"mint.taps": "entry", "mint.hidden": {"choice": [16, 32]}},
            "b": {"mint.taps": "output"},
        }
    }
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return path


def written(path: Path, *overrides: str, **changes: Any) -> Search:
    """The search of a file with other content."""
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return load_search(str(path), overrides)


def complaint(path: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(UserError) as told:
        written(path, *overrides, **changes)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_all_that_ship_are_known() -> None:
    assert sorted(path.stem for path in SHIPPED.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_is_a_search(name: str) -> None:
    search = load_search(str(SHIPPED / f"{name}.yaml"))
    assert search.spec.name == name
    assert search.base.evaluation.select_every == search.spec.report_every
    assert search.base.name == search.spec.recipe
    varies = search.space.parameters.values()
    assert not all(isinstance(parameter, Constant) for parameter in varies)


def test_the_missions_search_varies_placement_and_weighting() -> None:
    search = load_search(str(SHIPPED / "placement_x_weighting.yaml"))
    assert [objective.metric for objective in search.spec.objective] == [
        "membership.member.auc",
        "task.accuracy",
    ]
    placements = search.space.parameters["placement"].spaces  # type: ignore[union-attr]
    assert set(placements) == {"entry", "middle", "output", "free"}
    assert placements["free"].parameters["mint.taps"] == Modules(2)
    assert search.space.parameters["loss.lambda_mint"] == Real(1e-4, 1e4, log=True)


@pytest.mark.parametrize(
    ("dataset", "cells"),
    [
        ("mnist", {("entry", "mobilenet"): (0.86, 0.96), ("output", "resnet101"): (0.77, 0.80)}),
        ("cifar10", {("middle", "mobilenet"): (0.91, 0.41), ("output", "vit"): (0.88, 0.19)}),
        ("gtsrb", {("entry", "vit"): (0.80, 0.91), ("middle", "densenet121"): (0.84, 0.99)}),
        (
            "tiny_imagenet",
            {("entry", "xception"): (0.88, 0.28), ("output", "resnet50"): (0.79, 0.07)},
        ),
    ],
)
def test_the_papers_table(dataset: str, cells: dict[tuple[str, str], tuple[float, float]]) -> None:
    """Literals are read off Table 1 of the paper: MINT accuracy, task accuracy."""
    search = load_search(str(SHIPPED / "paper_table1.yaml"), [f"variables.dataset={dataset}"])
    paper = search.spec.paper
    assert paper is not None
    for (row, column), cell in cells.items():
        assert paper.cells[row][column] == cell
    points = grid(search.space)
    assert {(p[paper.rows], p[paper.columns]) for p, _ in points} == {
        (row, column) for row, columns in paper.cells.items() for column in columns
    }
    assert len(points) == 18
    assert search.base.name == f"{dataset}_resnet50"
    config = search.config(points[-1][1])
    assert (config.name, config.mint.taps) == (f"{dataset}_vit", ("output",))
    assert (config.train.optimizer, config.train.lr) == ("adam", 1e-4)
    assert (config.train.batch_size, config.data.augment) == (64, "none")


def test_overrides_reach_the_search_file_or_the_configuration(file: Path) -> None:
    search = load_search(
        str(file), ["budget.trials=4", "train.epochs=2", "seeds=3", "data.limit=99", "name=other"]
    )
    assert (search.spec.budget.trials, search.spec.seeds, search.spec.name) == (4, 3, "other")
    assert search.overrides == ("train.epochs=2", "data.limit=99")
    assert (search.base.train.epochs, search.base.data.limit) == (2, 99)
    trial = search.config({"mint.hidden": 16, "train.lr": 1e-5}, seed=7)
    assert (trial.train.epochs, trial.data.limit) == (2, 99)
    assert (trial.mint.hidden, trial.train.lr, trial.train.seed) == (16, 1e-5, 7)
    assert load_search(str(file)).spec.name == "mine"


def test_a_trial_is_the_recipe_with_its_settings(file: Path) -> None:
    search = written(file, settings={"train.epochs": 5, "train.clip_grad": 2.0}, report_every=2)
    found = search.config({"mint.taps": ["stages.0", "stages.3"], "mint.detach": True})
    assert found == load_config(
        "digits",
        [
            *("train.epochs=5", "train.clip_grad=2.0", "evaluation.select_every=2"),
            *("mint.taps=[stages.0,stages.3]", "mint.detach=true"),
        ],
    )
    assert written(file, "train.epochs=6", settings={"train.epochs": 5}).base.train.epochs == 6


def test_a_recipe_that_is_edited_later_changes_no_trial(file: Path) -> None:
    names = ("one", "other")
    recipes = [str(file.parent / f"{name}.yaml") for name in names]
    for recipe in recipes:
        Path(recipe).write_text("extends: digits\ntrain: {epochs: 3}\nmodel: {options: {a: 1}}")
    options = {"model.options": {"b": 2}}
    search = written(file, recipe=recipes[0], settings=options, space={"recipe": recipes[1]})
    for recipe in recipes:
        Path(recipe).write_text("extends: digits\ntrain: {epochs: 4}")
    for name, recipe in zip(names, recipes, strict=True):
        for _ in range(2):
            config = search.config({"recipe": recipe})
            assert (config.name, config.train.epochs, config.model.options) == (name, 3, {"b": 2})
    assert search.config({}).train.epochs == 3


def test_recipes_of_one_space_have_the_same_images_and_measures(file: Path) -> None:
    other = file.parent / "other.yaml"
    space = {"b": {"branches": {"one": {"recipe": "digits"}, "two": {"recipe": str(other)}}}}
    for content, says in (
        ("data: {split_seed: 9}", "has data.split_seed = 9, and digits 0: trials with other"),
        ("data: {external: {source: folder, path: x}}", "has data.external.source = 'folder', and"),
        ("data: {readers: 3}", "has data.readers = 3, and digits None: images are read once"),
        ("evaluation: {select_images: 77}", "has evaluation.select_images = 77, and digits "),
        ("storage: {keep: 9}", "has storage.keep = 9, and digits "),
    ):
        other.write_text(f"extends: digits\n{content}")
        found = complaint(file, space=space)
        assert found.startswith(f"search: space.recipe: {other} {says}"), found
    alike = written(file, settings={"storage.keep": 2}, space=space)
    assert {config.storage.keep for config in alike.recipes.values()} == {2}
    other.write_text("extends: digits\ntrain: {seed: 5, lr: 0.5}\nmodel: {backbone: resnet18}")
    assert written(file, space=space).recipes[str(other)].train.lr == 0.5


def test_a_value_is_no_reference(file: Path) -> None:
    taps = {"mint.taps": {"choice": ["entry", "\\${mint.head}"]}}
    search = written(file, space=taps)
    assert search.config({"mint.taps": "${mint.head}"}).mint.taps == ("${mint.head}",)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"a": 5}, "paper.cells.a = 5: input should be a mapping"),
        ({"a": {"b": 5}}, "paper.cells.a.b = 5: input should be a list, such as [5]"),
        ({"a": {"b": ["x", 1]}}, "paper.cells.a.b.0 = 'x'"),
        ({"a": {"b": [1, 2], "c": [1]}}, "cells.a.c = [1.0]: one number for each of `figures`"),
        ([1], "paper.cells = [1]"),
    ],
)
def test_a_papers_cells_have_a_number_for_each_figure(file: Path, cells: Any, says: str) -> None:
    paper = {"source": "s", "rows": "r", "columns": "c", "figures": ["task.accuracy", "task.loss"]}
    assert says in complaint(file, paper={**paper, "cells": cells})
    assert written(file, paper={**paper, "cells": {"a": {"b": [1, 2]}}}).spec.paper is not None
    twice = {**paper, "figures": ["task.loss", "task.loss"], "cells": {"a": {"b": [1, 2]}}}
    assert "figures: the same metric stands there twice" in complaint(file, paper=twice)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("loss.lamda_mint", "unknown key 'loss.lamda_mint', did you mean 'loss.lambda_mint'"),
        ("lambda_mint", "did you mean 'loss.lambda_mint'"),
        ("tracking.nothing", "unknown key 'tracking.nothing'"),
        ("mint", "'mint' is a section; write its keys with dots, such as mint.objective"),
        ("data.path", "trials with other images or roles cannot be compared"),
        ("data.shares.test", "trials with other images or roles cannot be compared"),
        ("data.mode", "images are read once for all trials"),
        ("mint.keyed.code_from", "codes are made once for all trials"),
        ("train.seed", "`seeds: N` trains each configuration so many times"),
        ("evaluation.fprs", "what is measured must be the same for all trials"),
        ("cluster.workers", "where a trial runs does not change it"),
        ("name", "the search names its trials"),
    ],
)
def test_a_key_that_cannot_be_searched(file: Path, key: str, says: str) -> None:
    found = complaint(file, space={key: {"choice": [1, 2]}})
    assert found.startswith("search: space")
    assert says in found
    branches = {"branches": {"one": {key: 1}, "two": {"mint.hidden": 2}}}
    assert says in complaint(file, space={"kind": branches})


@pytest.mark.parametrize(
    ("changes", "overrides", "says"),
    [
        ({"space": {"mint.hidden": {"choice": []}}}, [], "space.mint.hidden: the choice is empty"),
        ({"space": {"mint.hidden": {"choice": [8, "x"]}}}, [], "mint.hidden = 'x'"),
        ({"space": {"train.lr": {"uniform": [-1, 1]}}}, [], "train.lr = -1"),
        ({"space": {"loss.lambda_mint": {"uniform": [0, 1]}}}, [], "0 is the model without the"),
        ({"space": {"recipe": {"choice": ["digits", "digit"]}}}, [], "did you mean 'digits'"),
        ({"space": {}}, [], "space: a mapping of at least one key"),
        ({"space": [1]}, [], "space = [1]: input should be a mapping"),
        ({"recipe": "digit"}, [], "did you mean 'digits'"),
        ({"settings": {"train.epoch": 3}}, [], "settings: unknown key 'train.epoch', did you mean"),
        ({"settings": {"mint.hidden": 3}}, [], "mint.hidden is set for all trials and is in the"),
        ({}, ["train.lr=0.1"], "train.lr is set for all trials and is in the space, too"),
        ({"settings": {"mint": {"hidden": 3}}}, [], "mint.hidden is set for all trials and is in"),
        ({}, ["train={lr: 0.1}"], "train.lr is set for all trials and is in the space, too"),
        ({"space": BRANCHES}, ["mint.hidden=8"], "mint.hidden is set for all trials and is in the"),
        (
            {"space": BRANCHES, "settings": {"mint.taps": "entry"}},
            [],
            "mint.taps is set for all trials and is in the space, too",
        ),
        ({}, ["loss.lambda_mint=0"], "there is no MINT head to search for"),
        ({}, ["budget.trails=4"], "did you mean 'budget.trials'"),
        ({}, ["budgt.trials=4"], "override 'budgt.trials=4': unknown key; the search file has"),
        ({}, ["train.epoch=4"], "did you mean 'train.epochs'"),
        ({}, ["4"], "not of the form key.path=value"),
        ({}, ["budget.trials=0"], "search: override 'budget.trials=0': budget.trials = 0"),
        ({}, ["algorithm.name=tpee"], "'random', 'grid', 'tpe', 'nsga2' or 'pbt'"),
        ({}, ["name=a/b"], "name = 'a/b': a name has letters from a to z, digits, '_' and '-',"),
        ({}, ["name=ünï"], "override 'name=ünï': name = 'ünï': a name has letters"),
        (
            {},
            ["variables.zzz=1"],
            "'variables.zzz=1': the file uses no variable 'zzz'; it has",
        ),
        (
            {"variables": {"lr": 1}},
            ["variables.rl=1"],
            "the file uses no variable 'rl', did you mean 'lr'; there are lr",
        ),
        (
            {"recipe": "${variables.of}", "variables": {"b": 1, "a": 2}},
            [],
            "there is no variable 'of' to refer to (`variables` has a, b); set it there, or with v",
        ),
        ({"space": {"placement": {"choice": [1]}}}, [], "; a name of your own needs `branches`"),
        (
            {"space": {"train.lr": {"normal": [0, 1]}}},
            [],
            "not what may vary; write one of",
        ),
        ({"space": {1: {"choice": [1, 2]}}}, [], "space: the key 1 is no text; write keys such as"),
        ({"budget": {"hours": -1}}, ["seeds=2"], "mine.yaml: budget.hours = -1"),
        ({}, ["seeds=2", "budget.hours=-1"], "override 'budget.hours=-1': budget.hours = -1"),
        ({}, ["algorithm.name=grid"], "a grid cannot have all numbers"),
        ({"objective": []}, [], "objective = []: the list is empty"),
        ({"objective": [{"metric": "a"}] * 2}, [], "objective: the same metric stands there twice"),
        ({"variables": {"a": "${variables.b}"}}, [], "variables.b"),
        ({"constraint": {"metric": "a"}}, [], "most_above_plain (none is there)"),
        (
            {"constraint": {"metric": "a", "at_least": 1, "at_most": 2}},
            [],
            "give one of at_least, at_most, most_below_plain, most_above_plain (at_least and at",
        ),
        ({"constraint": {"metric": "a", "most_below_plain": -1}}, [], "most_below_plain = -1"),
    ],
)
def test_a_mistake_is_one_line(
    file: Path, changes: dict[str, Any], overrides: list[str], says: str
) -> None:
    assert says in complaint(file, *overrides, **changes)


TWO = [{"metric": "task.accuracy"}, {"metric": "task.loss", "mode": "min"}]
LIMIT = {"metric": "task.accuracy", "most_below_plain": 0.02}


def test_the_command_line_replaces_objective_and_constraint(file: Path) -> None:
    one = TWO[1]
    for objective in (one, TWO):
        for text, metrics in (
            ("{metric: task.accuracy}", ["task.accuracy"]),
            ("[{metric: a}, {metric: b}]", ["a", "b"]),
        ):
            found = written(file, f"objective={text}", objective=objective).spec.objective
            assert [(each.metric, each.mode) for each in found] == [(m, "max") for m in metrics]
    limit = "constraint={metric: task.loss, at_most: 1}"
    found = written(file, limit, constraint=LIMIT).spec.constraint
    assert found == Constraint(metric="task.loss", at_most=1)
    assert written(file, "constraint=null", constraint=LIMIT).spec.constraint is None
    part = written(file, "constraint.most_below_plain=0.5", constraint=LIMIT).spec.constraint
    assert part == Constraint(metric="task.accuracy", most_below_plain=0.5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective=[]", "objective = []: the list is empty"),
        ("objective={}", "objective.0.metric is missing"),
        ("objective=5", "objective = 5: input should be a list"),
        ("objective=null", "objective = None: input should be a list"),
        ("objective={mode: min}", "objective.0.metric is missing"),
        ("constraint={}", "constraint.metric is missing"),
        ("constraint=5", "constraint = 5: input should be a mapping"),
        ("constraint=[1]", "constraint = [1]: input should be a mapping"),
        ("constraint={metric: a}", "give one of at_least, at_most, "),
    ],
)
def test_what_replaces_them_is_checked_like_the_file(file: Path, override: str, says: str) -> None:
    for objective in (TWO[0], TWO):
        found = complaint(file, override, objective=objective, constraint=LIMIT)
        assert found.startswith("search: ") and says in found, found


def test_the_command_line_replaces_what_a_key_of_the_space_may_be(file: Path) -> None:
    space = {**BRANCHES, "train.lr": {"loguniform": [1e-5, 1e-2]}}
    text = "{train.lr: {choice: [1]}, placement: {branches: {c: {mint.taps: middle}}}}"
    found = written(file, f"space={text}", space=space).space.parameters
    assert found["train.lr"] == Choice((1,))
    assert found["placement"] == Branches({"c": Space({"mint.taps": Constant("middle")})})
    kept = written(file, "space={mint.head: conv}").space.parameters
    assert set(kept) == {"mint.hidden", "train.lr", "mint.head"}
    both = complaint(file, "space={train.lr: {choice: [1], uniform: [1, 2]}}")
    assert both == "search: space.train.lr: choice and uniform at once; give one of them"


def test_a_file_whose_name_is_none_wants_one(file: Path) -> None:
    for name in ("ünï", "a b", "-a"):
        other = file.with_name(f"{name}.yaml")
        other.write_text(yaml.safe_dump(CONTENT))
        with pytest.raises(UserError, match=r"cannot be that of the search: .*with name=OTHER"):
            load_search(str(other))
        assert load_search(str(other), ["name=mine"]).spec.name == "mine"
        other.write_text(yaml.safe_dump({**CONTENT, "name": "its-own"}))
        assert load_search(str(other)).spec.name == "its-own"


def test_a_search_extends_no_recipe(file: Path) -> None:
    for content in ({"space": CONTENT["space"]}, CONTENT):
        file.write_text(yaml.safe_dump({**content, "extends": "digits"}))
        with pytest.raises(UserError, match="write `recipe: digits` instead of `extends`"):
            load_search(str(file))
    written(file)
    other = file.with_name("other.yaml")
    other.write_text("extends: mine.yaml\nseeds: 2")
    assert load_search(str(other)).spec.seeds == 2


def test_settings_are_for_the_branches_that_do_not_set_it(file: Path) -> None:
    search = written(file, settings={"mint.hidden": 8}, space=BRANCHES)
    found = [search.config(settings).mint.hidden for _, settings in grid(search.space)]
    assert found == [16, 32, 8]


def test_a_recipe_is_no_search_file(file: Path) -> None:
    for content in ({"extends": "digits", "name": "x"}, {"train": {"epochs": 3}, "unknown": 1}):
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError) as told:
            load_search(str(file), ["budget.trials=3"])
        says = f"{file}: is a recipe, not a search file; `amint train {file}` takes it"
        assert str(told.value) == f"search: {says}"
    both = {**CONTENT, "train": {"epochs": 3}}
    file.write_text(yaml.safe_dump(both))
    with pytest.raises(UserError, match="unknown key 'train'"):
        load_search(str(file))


def test_no_search_file(file: Path) -> None:
    for name, says in ((str(file.parent / "none.yaml"), "there is no file"), ("digits", "no YAML")):
        with pytest.raises(UserError, match=says):
            load_search(name)
    file.write_text("space: {mint.hidden: {choice: [1, 2]}}")
    with pytest.raises(UserError, match="recipe is missing"):
        load_search(str(file))


@pytest.mark.parametrize(
    ("limit", "value", "plain", "violation"),
    [
        ({"at_least": 0.9}, 0.95, None, 0.0),
        ({"at_least": 0.9}, 0.75, None, 0.15),
        ({"at_most": 0.5}, 0.5, None, 0.0),
        ({"at_most": 0.5}, 0.75, None, 0.25),
        ({"most_below_plain": 0.01}, 0.79, 0.8, 0.0),
        ({"most_below_plain": 0.01}, 0.85, 0.8, 0.0),
        ({"most_below_plain": 0.01}, 0.75, 0.8, 0.04),
        ({"most_above_plain": 0.1}, 1.1, 1.0, 0.0),
        ({"most_above_plain": 0.1}, 0.5, 1.0, 0.0),
        ({"most_above_plain": 0.1}, 1.3, 1.0, 0.2),
    ],
)
def test_how_far_a_limit_is_passed(
    limit: dict[str, float], value: float, plain: float | None, violation: float
) -> None:
    constraint = Constraint(metric="m", **limit)  # type: ignore[arg-type]
    assert constraint.violation(value, plain) == pytest.approx(violation, abs=1e-12)
    assert constraint.wants_plain == (plain is not None)


PBT = ["algorithm.name=pbt", "scheduler.name=none"]
RATES = {"loss.lambda_mint": {"loguniform": [0.1, 1]}, "train.lr": {"uniform": [0.1, 1]}}


def test_population_based_training_has_rules(file: Path) -> None:
    assert written(file, *PBT, space=RATES).spec.algorithm.perturb_every == 5
    for changes, overrides, says in (
        ({"space": RATES}, ["algorithm.name=pbt"], "set scheduler.name=none"),
        ({"space": RATES}, [*PBT, "report_every=3"], "perturb_every = 5 must be a multiple"),
        ({"space": RATES}, [*PBT, "seeds=2"], "pbt takes one objective and seeds = 1"),
        ({}, PBT, "algorithm.perturb: 'loss.lambda_mint' must be in the space"),
        (
            {"space": {**RATES, "loss.ema_decay": {"uniform": [0.1, 0.9]}}},
            [*PBT, "algorithm.perturb=[loss.ema_decay]"],
            "'loss.ema_decay' cannot change in mid-run",
        ),
        (
            {"space": {**RATES, "train.lr": {"choice": [0.1, 0.2]}}},
            PBT,
            "'train.lr' must be in the space, as uniform or loguniform",
        ),
    ):
        assert says in complaint(file, *overrides, **changes)


def test_nsga2_is_for_several_objectives(file: Path) -> None:
    two = [{"metric": "task.accuracy"}, {"metric": "task.loss", "mode": "min"}]
    assert "nsga2 is for several objectives" in complaint(file, "algorithm.name=nsga2")
    found = written(file, "algorithm.name=nsga2", objective=two).spec.objective
    assert [(each.metric, each.mode) for each in found] == [
        ("task.accuracy", "max"),
        ("task.loss", "min"),
    ]


def test_the_fingerprint_is_of_what_is_searched_and_not_of_what_is_spent(file: Path) -> None:
    mark = search_fingerprint(written(file))
    for override in (
        *("budget.trials=99", "budget.hours=1", "budget.concurrent=3", "final.seeds=1"),
        *("cluster.workers=2", "storage.path=elsewhere", "tracking.enabled=false", "name=other"),
    ):
        assert search_fingerprint(written(file, override)) == mark, override
    assert search_fingerprint(written(file, settings={"tracking.enabled": False})) == mark
    others = {
        search_fingerprint(written(file, override))
        for override in (
            *("train.epochs=3", "seeds=2", "report_every=2", "algorithm.seed=1"),
            *("scheduler.grace=2", "objective={metric: task.accuracy}", "recipe=mnist_vit"),
            "constraint={metric: task.accuracy, at_least: 0.5}",
        )
    }
    space = {**CONTENT["space"], "mint.hidden": {"choice": [16, 64]}}
    others.add(search_fingerprint(written(file, space=space)))
    assert len(others) == 9
    assert mark not in others


def test_the_fingerprint_is_of_each_recipe(file: Path) -> None:
    other = file.parent / "other.yaml"
    marks = []
    for epochs in (3, 4):
        other.write_text(f"extends: digits\ntrain: {{epochs: {epochs}}}")
        found = written(file, space={"recipe": {"choice": ["digits", str(other)]}})
        assert found.config({"recipe": str(other)}).train.epochs == epochs
        marks.append(search_fingerprint(found))
    assert marks[0] != marks[1]
