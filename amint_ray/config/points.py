"""All points of a search space, or enough of them to try each option."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from amint_ray.config.space import (
    Branches,
    Choice,
    Constant,
    Integer,
    Modules,
    Parameter,
    Real,
    Settings,
    Space,
    draw,
)

_MOST_POINTS = 10_000
"""Of a grid."""


def grid(space: Space) -> list[tuple[Settings, Settings]]:
    """Every point of a space without real numbers, in the order of the file; as from `draw`.

    Raises:
        ValueError: a key has infinitely many values, or together they have too many.
    """
    points: dict[str, tuple[Settings, Settings]] = {}
    path: list[tuple[str, int, int]] = []  # name, place and number of its options

    class Odometer:
        """Picks along `path`, and the first option of what comes after it."""

        def __init__(self) -> None:
            self._depth = 0

        def _next(self, name: str, options: int) -> int:
            if self._depth == len(path):
                path.append((name, 0, options))
            self._depth += 1
            return path[self._depth - 1][1]

        def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
            return choices[self._next(name, len(choices))]

        def suggest_int(self, name: str, low: int, high: int) -> int:
            return low + self._next(name, high - low + 1)

        def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
            raise ValueError(
                f"space.{name}: a grid cannot have all numbers from {low:g} to {high:g}; give a "
                "choice, or take another algorithm.name"
            )

    while True:
        point = draw(space, Odometer())
        # Two modules in either order are one point.
        points.setdefault(point_name(point[1]), point)
        if len(points) > _MOST_POINTS:
            raise ValueError(
                f"space: a grid of more than {_MOST_POINTS} combinations; give fewer values, or "
                "take another algorithm.name"
            )
        while path and path[-1][1] == path[-1][2] - 1:
            path.pop()
        if not path:
            return list(points.values())
        name, place, options = path.pop()
        path.append((name, place + 1, options))


def point_name(settings: Settings) -> str:
    """What only points that set the same have in common."""
    return json.dumps(settings, sort_keys=True)


def all_points(space: Space) -> dict[str, Settings] | None:
    """The parameters of every point, by `point_name`; None: too many for a grid, or infinitely."""
    try:
        return {point_name(settings): parameters for parameters, settings in grid(space)}
    except ValueError:
        return None


def probes(space: Space) -> list[Settings]:
    """Points that together have every option, and both ends, of every key in them."""
    firsts = {key: _options(key, parameter)[0] for key, parameter in space.parameters.items()}
    found = [dict(itertools.chain.from_iterable(first.items() for first in firsts.values()))]
    for key, parameter in space.parameters.items():
        others = [first for name, first in firsts.items() if name != key]
        base = dict(itertools.chain.from_iterable(first.items() for first in others))
        for option in _options(key, parameter):
            if base | option not in found:
                found.append(base | option)
    return found


def _options(key: str, parameter: Parameter) -> list[Settings]:
    match parameter:
        case Choice(values):
            return [{key: value} for value in values]
        case Real(low, high, _):
            return [{key: low}, {key: high}]
        case Integer(low, high):
            return [{key: low}, {key: high}]
        case Modules(count, _, names):
            return [{key: list(names[:count])}, {key: list(names[-count:])}] if names else [{}]
        case Branches(spaces):
            return [probe for below in spaces.values() for probe in probes(below)]
        case Constant(value):
            return [{key: value}]
