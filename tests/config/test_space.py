"""Search spaces: what is written in them, and what is drawn."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FixedTrial
from scipy import stats

from amint_ray.config.points import grid, probes
from amint_ray.config.space import (
    Branches,
    Choice,
    Constant,
    Integer,
    Modules,
    Real,
    Space,
    draw,
    has_modules,
    keys,
    parse_space,
    with_modules,
)

EVERYTHING: dict[str, Any] = {
    "loss.lambda_mint": {"loguniform": [1e-3, 10]},
    "loss.ema_decay": {"uniform": [0, 0.5]},
    "mint.hidden": {"randint": [1, 4]},
    "mint.taps": {"choice": ["entry", ["a", "b"], None]},
    "mint.head": "conv",
    "model.options": {"depth": 3},
}


def study(seed: int = 0) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


def points(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [settings for _, settings in grid(parse_space(tree))]


def test_every_kind_is_read() -> None:
    branches = {"branches": {"one": {"mint.pool": 2}, "two": {"mint.pool": {"choice": [3]}}}}
    taps = {"mint.taps": {"modules": {"count": 2, "among": "blocks.*"}}}
    assert parse_space({**EVERYTHING, "any": branches}) == Space(
        {
            "loss.lambda_mint": Real(1e-3, 10.0, log=True),
            "loss.ema_decay": Real(0.0, 0.5, log=False),
            "mint.hidden": Integer(1, 4),
            "mint.taps": Choice(("entry", ["a", "b"], None)),
            "mint.head": Constant("conv"),
            "model.options": Constant({"depth": 3}),
            "any": Branches(
                {
                    "one": Space({"mint.pool": Constant(2)}),
                    "two": Space({"mint.pool": Choice((3,))}),
                }
            ),
        }
    )
    assert parse_space(taps) == Space({"mint.taps": Modules(2, "blocks.*")})
    assert parse_space({"mint.taps": {"modules": 1}}) == Space({"mint.taps": Modules(1)})


@pytest.mark.parametrize(
    ("key", "what", "says"),
    [
        ("a", {"choice": []}, "space.a: the choice is empty"),
        ("a", {"choice": 3}, "space.a: choice = 3: input should be a list"),
        ("a", {"choice": [1, 2, 1]}, "space.a: the same value stands in the choice twice"),
        ("a", {"choice": [True, 1]}, "space.a: the same value stands in the choice twice"),
        ("a", {"choice": [[1], "[1]"]}, "space.a: the same value stands in the choice twice"),
        ("a", {"uniform": [2, 2]}, "space.a: uniform = [2, 2]: low must be less than high"),
        ("a", {"uniform": [2]}, "space.a: uniform = [2]: input should be [low, high]"),
        ("a", {"uniform": ["1", 2]}, "input should be [low, high]"),
        ("a", {"uniform": [False, True]}, "input should be [low, high]"),
        ("a", {"loguniform": [3, 1]}, "space.a: loguniform = [3, 1]: low must be less than high"),
        ("a", {"loguniform": [0, 1]}, "space.a: loguniform = [0, 1]: low must be greater than 0"),
        ("a", {"randint": [1, 2.5]}, "space.a: randint = [1, 2.5]: both ends must be whole"),
        ("a", {"modules": 2}, "space.a: modules are for mint.taps"),
        ("mint.taps", {"modules": 0}, "modules = 0: write a number from 1 to 4"),
        ("mint.taps", {"modules": True}, "modules = True: write a number from 1 to 4"),
        ("mint.taps", {"modules": {"count": 2, "amng": "x"}}, "write a number from 1 to 4, or"),
        ("a", {"branches": {}}, "space.a: branches need at least one name"),
        ("a", {"branches": {"b+c (x)": {"d": 1}}}, "space.a: 'b+c (x)' cannot name branches; a"),
        ("a", {"branches": {"b/../c": {"d": 1}}}, "space.a: 'b/../c' cannot name branches; a"),
        ("a+b", {"branches": {"c": {"d": 1}}}, "space.a+b: 'a+b' cannot name branches; a"),
        ("a", {"branches": {"one": {}}}, "space.a.one: a mapping of at least one key"),
        ("a", {"branches": {"one": {"b": {"choice": []}}}}, "space.a.one.b: the choice is empty"),
        ("a", {"log_uniform": [1, 2]}, "unknown kind 'log_uniform', did you mean 'loguniform'?"),
        ("a", {"choices": [1, 2]}, "space.a: unknown kind 'choices', did you mean 'choice'?"),
        ("a", {"choices": [1, 2]}, "There are choice, uniform, loguniform, randint, modules, br"),
        ("a", {"choice": [1], "uniform": [1, 2]}, "space.a: choice and uniform at once; give one"),
    ],
)
def test_what_describes_no_space_is_told_in_a_line(key: str, what: object, says: str) -> None:
    with pytest.raises(ValueError) as told:
        parse_space({key: what})
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_a_key_is_set_once() -> None:
    taps = {"branches": {"one": {"mint.taps": "entry"}, "two": {"mint.taps": "output"}}}
    assert set(keys(parse_space({"placement": taps}))) == {"mint.taps"}
    for other in (
        {"mint.taps": {"choice": ["entry", "middle"]}},
        {"again": {"branches": {"three": {"mint.taps": "middle"}}}},
    ):
        with pytest.raises(ValueError, match=r"mint\.taps is set beside it, too; set it once"):
            parse_space({"placement": taps, **other})


def test_an_empty_space_is_none() -> None:
    with pytest.raises(ValueError, match="space: a mapping of at least one key"):
        parse_space({})


def test_distributions_are_what_was_written() -> None:
    trial = study().ask()
    draw(parse_space(EVERYTHING), trial)
    assert trial.distributions == {
        "loss.lambda_mint": FloatDistribution(1e-3, 10, log=True),
        "loss.ema_decay": FloatDistribution(0, 0.5),
        "mint.hidden": IntDistribution(1, 4),
        "mint.taps": CategoricalDistribution(["entry", '["a", "b"]', None]),
    }


def test_draws_follow_them() -> None:
    space, asked = parse_space(EVERYTHING), study(seed=3)
    drawn = [draw(space, asked.ask())[1] for _ in range(400)]
    rates = [settings["loss.lambda_mint"] for settings in drawn]
    assert stats.kstest(rates, stats.loguniform(1e-3, 10).cdf).pvalue > 0.05
    assert stats.kstest(rates, stats.uniform(1e-3, 10).cdf).pvalue < 1e-6
    decays = [settings["loss.ema_decay"] for settings in drawn]
    assert stats.kstest(decays, stats.uniform(0, 0.5).cdf).pvalue > 0.05
    hidden = Counter(settings["mint.hidden"] for settings in drawn)
    assert set(hidden) == {1, 2, 3, 4}
    assert stats.chisquare(list(hidden.values())).pvalue > 0.05
    taps = Counter(str(settings["mint.taps"]) for settings in drawn)
    assert set(taps) == {"entry", "['a', 'b']", "None"}
    assert stats.chisquare(list(taps.values())).pvalue > 0.05


def test_parameters_are_scalars_and_settings_are_values() -> None:
    fixed = {
        "loss.lambda_mint": 0.5,
        "loss.ema_decay": 0.25,
        "mint.hidden": 4,
        "mint.taps": '["a", "b"]',
    }
    parameters, settings = draw(parse_space(EVERYTHING), FixedTrial(fixed))
    assert parameters == fixed
    constants = {"mint.head": "conv", "model.options": {"depth": 3}}
    assert settings == {**fixed, "mint.taps": ["a", "b"], **constants}


def test_a_branch_sets_its_own_keys_alone() -> None:
    space = parse_space(
        {
            "placement": {
                "branches": {
                    "entry": {"mint.taps": "entry", "mint.hidden": {"randint": [32, 64]}},
                    "output": {"mint.taps": "output"},
                }
            }
        }
    )
    chosen = FixedTrial({"placement": "entry", "mint.hidden": 40})
    assert draw(space, chosen)[1] == {"mint.taps": "entry", "mint.hidden": 40}
    parameters, settings = draw(space, FixedTrial({"placement": "output"}))
    assert parameters == {"placement": "output"}
    assert settings == {"mint.taps": "output"}


def test_what_branches_have_otherwise_has_a_name_in_each() -> None:
    def branch(low: float, inner: int) -> dict[str, Any]:
        return {
            "loss.lambda_mint": {"loguniform": [low, 10]},
            "loss.ema_decay": {"uniform": [0, 1]},
            "deep": {"branches": {"x": {"mint.hidden": {"randint": [1, inner]}}}},
        }

    space = parse_space({"kind": {"branches": {"a": branch(0.1, 5), "b": branch(1, 7)}}})
    asked = study()
    found: dict[str, set[str]] = {"a": set(), "b": set()}
    distributions: dict[str, Any] = {}
    for _ in range(20):
        trial = asked.ask()
        parameters, _ = draw(space, trial)
        found[parameters["kind"]] |= set(parameters)
        distributions |= trial.distributions
    common = {"kind", "loss.ema_decay"}
    for name in "ab":
        own = {f"loss.lambda_mint ({name})", f"deep ({name})", f"mint.hidden ({name}/x)"}
        assert found[name] == common | own
    assert distributions["loss.lambda_mint (b)"] == FloatDistribution(1, 10, log=True)
    assert distributions["mint.hidden (a/x)"] == IntDistribution(1, 5)
    assert distributions["mint.hidden (b/x)"] == IntDistribution(1, 7)


NAMES = ("stem", "stages.0", "stages.1", "head")


def with_names(tree: dict[str, Any]) -> Space:
    def among(glob: str | None) -> tuple[str, ...]:
        return NAMES if glob is None else NAMES[1:3]

    return with_modules(parse_space(tree), among)


def test_modules_are_so_many_and_by_depth() -> None:
    space = with_names({"a": {"branches": {"free": {"mint.taps": {"modules": 3}}}}})
    assert has_modules(space)
    asked = study()
    for _ in range(40):
        taps = draw(space, asked.ask())[1]["mint.taps"]
        assert len(set(taps)) == 3
        assert taps == sorted(taps, key=NAMES.index)
    few = with_names({"mint.taps": {"modules": {"count": 1, "among": "stages.*"}}})
    assert {draw(few, asked.ask())[1]["mint.taps"][0] for _ in range(20)} == set(NAMES[1:3])
    with pytest.raises(ValueError, match=r"3 modules are asked for, .* 2 .* match 'stages\.\*'"):
        with_names({"mint.taps": {"modules": {"count": 3, "among": "stages.*"}}})


def test_a_grid_is_the_product_of_the_choices() -> None:
    heads, taps, hidden = ["mlp", "conv"], [["a"], "entry", None], [3, 4, 5]
    found = points(
        {
            "mint.head": {"choice": heads},
            "mint.taps": {"choice": taps},
            "mint.hidden": {"randint": [3, 5]},
            "mint.pool": 2,
        }
    )
    assert found == [
        {"mint.head": head, "mint.taps": tap, "mint.hidden": number, "mint.pool": 2}
        for head, tap, number in itertools.product(heads, taps, hidden)
    ]


def test_a_grid_goes_into_branches() -> None:
    found = points(
        {
            "kind": {"branches": {"a": {"x": {"choice": [1, 2]}}, "b": {"y": 0}}},
            "z": {"choice": [True, None]},
        }
    )
    assert found == [
        {**first, "z": z} for first in ({"x": 1}, {"x": 2}, {"y": 0}) for z in (True, None)
    ]


def test_a_grid_has_each_pair_of_modules_once() -> None:
    found = [
        settings["mint.taps"] for _, settings in grid(with_names({"mint.taps": {"modules": 2}}))
    ]
    assert sorted(map(tuple, found)) == sorted(itertools.combinations(NAMES, 2))


def test_a_grid_is_finite() -> None:
    with pytest.raises(ValueError, match=r"space\.a: a grid cannot have all numbers from 1 to 2"):
        points({"a": {"uniform": [1, 2]}})
    with pytest.raises(ValueError, match="a grid of more than 10000 combinations"):
        points({"a": {"randint": [1, 2**40]}})


def test_probes_have_every_option_and_every_end() -> None:
    branches = {"branches": {"one": {"x": {"choice": [1, 2]}}, "two": {"y": {"randint": [3, 9]}}}}
    found = probes(with_names({**EVERYTHING, "mint.taps": {"modules": 2}, "kind": branches}))
    seen = {(key, str(value)) for probe in found for key, value in probe.items()}
    assert seen == {
        *(("loss.lambda_mint", end) for end in ("0.001", "10.0")),
        *(("loss.ema_decay", end) for end in ("0.0", "0.5")),
        *(("mint.hidden", end) for end in "14"),
        ("mint.taps", str(list(NAMES[:2]))),
        ("mint.taps", str(list(NAMES[-2:]))),
        ("mint.head", "conv"),
        ("model.options", "{'depth': 3}"),
        *(("x", value) for value in "12"),
        *(("y", value) for value in "39"),
    }
    assert all(("x" in probe) != ("y" in probe) for probe in found)
    assert len(found) < 15
