"""A search space: what each key of the configuration may be, and drawing from it.

In a search file it is written so (docs/search.md explains it):

    loss.lambda_mint: {loguniform: [1.0e-3, 10]}    # uniform, likewise
    mint.hidden: {randint: [32, 256]}               # both ends are possible
    mint.taps: {choice: [entry, middle, output]}    # a list of any values
    mint.taps: {modules: 2}                         # any two modules that can be tapped
    mint.head: conv                                 # anything else: the same in all trials
    placement:                                      # a name of the user's: one of several branches
      branches:
        entry: {mint.taps: entry, mint.hidden: {randint: [32, 64]}}
        output: {mint.taps: output}
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
"""What MLflow takes as part of a parameter's name."""
Settings = dict[str, Any]
"""Values by dotted key."""


class Trial(Protocol):
    """Whoever picks the values; an `optuna.Trial` is one."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from low to high."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high, both possible."""


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Real:
    """A number between two; `log`: uniform on a logarithmic scale."""

    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class Integer:
    """A whole number between two, both possible."""

    low: int
    high: int


@dataclass(frozen=True)
class Modules:
    """So many modules of the backbone; `names` (by depth) is filled in once the backbone is known.

    `among` is a glob of names; None: stages and blocks.
    """

    count: int
    among: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Branches:
    """One of several spaces by name."""

    spaces: dict[str, Space]


@dataclass(frozen=True)
class Constant:
    """The same in every trial."""

    value: Any


Parameter = Choice | Real | Integer | Modules | Branches | Constant


@dataclass(frozen=True)
class Space:
    """What is drawn, by key of the configuration or name of the branches."""

    parameters: dict[str, Parameter]


def parse_space(tree: Mapping[str, Any], where: str = "space") -> Space:
    """The space that a mapping describes, as at the top of this module.

    Raises:
        ValueError: it describes none; the text says where.
    """
    if not isinstance(tree, Mapping) or not tree:
        raise ValueError(f"{where}: a mapping of at least one key to what it may be is needed")
    space = Space({str(key): _parameter(value, f"{where}.{key}") for key, value in tree.items()})
    before: set[str] = set()
    for name, parameter in space.parameters.items():
        own = set(keys(Space({name: parameter})))
        if twice := own & before:  # which one would count would depend on their order
            raise ValueError(f"{where}.{name}: {min(twice)} is set beside it, too; set it once")
        before |= own
    return space


def _parameter(value: Any, where: str) -> Parameter:
    if not isinstance(value, Mapping):
        return Constant(value)
    if len(several := [str(kind) for kind in value if kind in KINDS]) > 1:
        raise ValueError(f"{where}: {' and '.join(several)} at once; give one of them")
    if len(value) != 1:
        return Constant(value)
    ((kind, what),) = value.items()
    if kind in KINDS:
        return KINDS[kind](what, where)
    if near := difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.75):
        raise ValueError(
            f"{where}: unknown kind {kind!r}, did you mean {near[0]!r}? There are "
            f"{', '.join(KINDS)}"
        )
    return Constant(value)


def _choice(what: Any, where: str) -> Choice:
    if not isinstance(what, list | tuple):
        raise ValueError(f"{where}: choice = {what!r}: input should be a list of values")
    if not what:
        raise ValueError(f"{where}: the choice is empty; give it at least one value")
    texts = list(map(scalar, what))
    if any(text in texts[:place] for place, text in enumerate(texts)):  # 1 and true are equal, too
        raise ValueError(f"{where}: the same value stands in the choice twice")
    return Choice(tuple(what))


def _ends(what: Any, where: str, kind: str) -> tuple[float, float]:
    numbers = isinstance(what, list | tuple) and len(what) == 2
    if not numbers or not all(
        isinstance(end, int | float) and not isinstance(end, bool) for end in what
    ):
        raise ValueError(f"{where}: {kind} = {what!r}: input should be [low, high]")
    low, high = what
    if not low < high:
        raise ValueError(f"{where}: {kind} = {list(what)}: low must be less than high")
    return low, high


def _uniform(what: Any, where: str) -> Real:
    low, high = _ends(what, where, "uniform")
    return Real(float(low), float(high), log=False)


def _loguniform(what: Any, where: str) -> Real:
    low, high = _ends(what, where, "loguniform")
    if low <= 0:
        raise ValueError(
            f"{where}: loguniform = {list(what)}: low must be greater than 0; a model without the "
            "head is trained as the baseline where the constraint asks for it"
        )
    return Real(float(low), float(high), log=True)


def _randint(what: Any, where: str) -> Integer:
    low, high = _ends(what, where, "randint")
    if not isinstance(low, int) or not isinstance(high, int):
        raise ValueError(f"{where}: randint = {list(what)}: both ends must be whole numbers")
    return Integer(low, high)


def _modules(what: Any, where: str) -> Modules:
    told = what if isinstance(what, Mapping) else {"count": what}
    count, among = told.get("count"), told.get("among")
    known = not set(told) - {"count", "among"} and isinstance(among, str | None)
    if not known or type(count) is not int or not 1 <= count <= 4:
        raise ValueError(
            f"{where}: modules = {what!r}: write a number from 1 to 4, or {{count: 2, among: "
            "'stages.*'}"
        )
    if not where.endswith("mint.taps"):
        raise ValueError(f"{where}: modules are for mint.taps")
    return Modules(count, among)


def _branches(what: Any, where: str) -> Branches:
    if not isinstance(what, Mapping) or not what:
        raise ValueError(f"{where}: branches need at least one name with keys below it")
    for name in (where.removeprefix("space."), *map(str, what)):
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{where}: {name!r} cannot name branches; a name has letters, digits, '_', '-' and "
                "'.', and '/' between parts of it"
            )
    return Branches(
        {str(name): parse_space(below, f"{where}.{name}") for name, below in what.items()}
    )


KINDS: dict[str, Callable[[Any, str], Parameter]] = {
    "choice": _choice,
    "uniform": _uniform,
    "loguniform": _loguniform,
    "randint": _randint,
    "modules": _modules,
    "branches": _branches,
}


def leaves(space: Space) -> Iterator[tuple[str, Parameter]]:
    """Every key of the configuration that is set, at any depth, and what it may be."""
    for key, parameter in space.parameters.items():
        if isinstance(parameter, Branches):
            for below in parameter.spaces.values():
                yield from leaves(below)
        else:
            yield key, parameter


def keys(space: Space) -> Iterator[str]:
    """Every key of the configuration that is set, at any depth."""
    return (key for key, _ in leaves(space))


def always(space: Space) -> set[str]:
    """The keys of the configuration that every point sets."""
    found: set[str] = set()
    for key, parameter in space.parameters.items():
        found |= (
            set.intersection(*map(always, parameter.spaces.values()))
            if isinstance(parameter, Branches)
            else {key}
        )
    return found


def with_modules(space: Space, names: Callable[[str | None], Sequence[str]]) -> Space:
    """The space with the backbone's modules filled in.

    Args:
        space: may ask for modules.
        names: gives those among a glob (None: stages and blocks), by depth.

    Raises:
        ValueError: there are fewer than are asked for.
    """

    def filled(key: str, parameter: Parameter) -> Parameter:
        if isinstance(parameter, Branches):
            return Branches({n: with_modules(s, names) for n, s in parameter.spaces.items()})
        if not isinstance(parameter, Modules):
            return parameter
        found = tuple(names(parameter.among))
        if len(found) < parameter.count:
            raise ValueError(
                f"space.{key}: {parameter.count} modules are asked for, and the backbone has "
                f"{len(found)} that can be tapped"
                + (f" and match {parameter.among!r}" if parameter.among else "")
            )
        return replace(parameter, names=found)

    return Space({key: filled(key, parameter) for key, parameter in space.parameters.items()})


def has_modules(space: Space) -> bool:
    """Whether modules are asked for at any depth."""
    return any(
        isinstance(parameter, Modules)
        or (isinstance(parameter, Branches) and any(map(has_modules, parameter.spaces.values())))
        for parameter in space.parameters.values()
    )


def draw(space: Space, trial: Trial) -> tuple[Settings, Settings]:
    """One point of the space.

    Args:
        space: modules filled in.
        trial: picks the values.

    Returns:
        The parameters by name, as they were picked (a value that is no scalar as JSON), and what
        that sets by key of the configuration. A key that several branches have, each otherwise,
        is a parameter of its own in each, named `key (branch)`, or `key (outer/inner)`.
    """
    parameters: Settings = {}
    settings: Settings = {}
    shared = _definitions(space)

    def visit(space: Space, branch: str) -> None:
        for key, parameter in space.parameters.items():
            name = key if len(shared[key]) == 1 else f"{key} ({branch})"
            if isinstance(parameter, Branches):
                picked = trial.suggest_categorical(name, list(parameter.spaces))
                parameters[name] = picked
                visit(parameter.spaces[picked], f"{branch}/{picked}" if branch else picked)
            else:
                settings[key] = _pick(parameter, name, trial, parameters)

    visit(space, "")
    return parameters, settings


def _definitions(space: Space) -> dict[str, list[Parameter]]:
    """The different things that each key or name stands for, at any depth."""
    found: dict[str, list[Parameter]] = {}
    for key, parameter in space.parameters.items():
        if parameter not in found.setdefault(key, []):
            found[key].append(parameter)
        if isinstance(parameter, Branches):
            for below in parameter.spaces.values():
                for name, others in _definitions(below).items():
                    found.setdefault(name, [])
                    found[name] += [other for other in others if other not in found[name]]
    return found


def _pick(parameter: Parameter, name: str, trial: Trial, parameters: Settings) -> Any:
    """The value; what was picked is added to the parameters."""
    match parameter:
        case Choice(values):
            texts = [scalar(value) for value in values]
            parameters[name] = trial.suggest_categorical(name, texts)
            return values[texts.index(parameters[name])]
        case Real(low, high, log):
            parameters[name] = trial.suggest_float(name, low, high, log=log)
        case Integer(low, high):
            parameters[name] = trial.suggest_int(name, low, high)
        case Modules(count, _, names):
            places = set()
            for number in range(1, count + 1):
                part = name if count == 1 else f"{name} #{number}"
                parameters[part] = trial.suggest_int(part, 0, len(names) - 1)
                place = parameters[part]
                while place in places:  # two picks of one module are it and the next
                    place = (place + 1) % len(names)
                places.add(place)
            return [names[place] for place in sorted(places)]
        case Constant(value):
            return value
    return parameters[name]


def scalar(value: Any) -> Any:
    """A value as it is where it is a scalar, else as JSON."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value)
