"""Optuna's samplers, as a search has them, and what picks the values for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from amint_ray.config.search import Search
from amint_ray.config.space import Settings, Space, draw


def create_sampler(search: Search, *, already: int) -> BaseSampler:
    """Optuna's sampler; one that goes on after so many trials does not draw the same ones again."""
    algorithm = search.spec.algorithm
    seed = (algorithm.seed + 1_000_003 * already) % 2**32
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    match algorithm.name:
        case "tpe":
            return TPESampler(
                n_startup_trials=algorithm.startup,
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=seed,
            )
        case "nsga2":
            return NSGAIISampler(population_size=max(2, algorithm.startup), seed=seed)
        case _:
            return RandomSampler(seed=seed)


def by_chance(space: Space, seed: int) -> Iterator[tuple[Settings, Settings]]:
    """Point after point, whatever has been found; as from `draw`."""
    study = optuna.create_study(sampler=RandomSampler(seed=seed))
    while True:
        yield draw(space, study.ask())


class Recorded:
    """Picks what was picked before, and notes from what."""

    def __init__(self, parameters: Settings) -> None:
        self._parameters = parameters
        self.values: Settings = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def _note(self, name: str, distribution: BaseDistribution) -> Any:
        self.distributions[name] = distribution
        self.values[name] = self._parameters[name]
        return self._parameters[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return self._note(name, optuna.distributions.CategoricalDistribution(choices))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number."""
        return float(self._note(name, optuna.distributions.FloatDistribution(low, high, log=log)))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number."""
        return int(self._note(name, optuna.distributions.IntDistribution(low, high)))
