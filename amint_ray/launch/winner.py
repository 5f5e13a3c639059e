"""The winner of a search, trained again from scratch and measured on `test`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amint_ray.config.load import fingerprint
from amint_ray.config.schema import Config
from amint_ray.contracts import SearchWatcher, leaves
from amint_ray.evaluation.objectives import HEADLINE
from amint_ray.evaluation.search import Configuration, configurations
from amint_ray.launch.recording import Recording
from amint_ray.launch.search_folder import SearchFolder
from amint_ray.launch.search_plan import Plan
from amint_ray.launch.train_run import run_training


def final_config(plan: Plan, settings: Mapping[str, Any], *, seed: int) -> Config:
    """A configuration of the search as `amint train` would have it.

    Args:
        plan: of the search.
        settings: by key.
        seed: of training.
    """
    config = plan.search.config(dict(settings), seed=seed)
    evaluation = config.evaluation.model_copy(update={"select_every": None})
    return config.model_copy(update={"evaluation": evaluation, "cluster": plan.base.cluster})


def train_again(
    plan: Plan,
    folder: SearchFolder,
    parent: Recording,
    winner: Configuration,
    watcher: SearchWatcher,
    *,
    tags: Mapping[str, str],
    verbose: bool,
) -> dict[str, Any]:
    """The winner, from scratch, with seeds that no trial had; figures on `test`.

    Returns:
        `seeds`, `figures` (means over them, `{value, low, high, seeds}`), `optimism` (by metric:
        `selection`, `final` and `difference`, by how much the former is better), `default` (the
        recipe as it is, with the same seeds, and the paired differences; None if it was not asked
        for), `run_ids` and `model_uri`.
    """
    spec = plan.search.spec
    seeds = [plan.search.seed + spec.seeds + number for number in range(spec.final.seeds)]
    documents = _documents(
        plan, folder, parent, winner.settings, seeds, "winner", watcher, tags=tags, verbose=verbose
    )
    mine = list(map(_figures, documents))
    figures = _over_seeds(mine, seeds)
    optimism = {}
    for metric in _told(plan, winner):
        if metric not in figures or winner.value(metric) is None:
            continue
        selection, final = float(winner.figures[metric]["value"]), figures[metric]["value"]
        less_is_better = metric.endswith("loss") or (metric, "min") in _objectives(plan)
        better = final - selection if less_is_better else selection - final
        optimism[metric] = {"selection": selection, "final": final, "difference": better}
    default = None
    if spec.final.default:
        others = _documents(
            plan, folder, parent, {}, seeds, "default", watcher, tags=tags, verbose=verbose
        )
        theirs = list(map(_figures, others))
        default = {
            "figures": _over_seeds(theirs, seeds),
            "differences": _over_seeds(list(map(_difference, mine, theirs)), seeds),
        }
    return {
        "seeds": seeds,
        "figures": figures,
        "optimism": optimism,
        "default": default,
        "run_ids": [document["run_id"] for document in documents],
        "model_uri": documents[0]["model_uri"],
        "load": documents[0]["load"],
    }


def _objectives(plan: Plan) -> list[tuple[str, str]]:
    return [(objective.metric, objective.mode) for objective in plan.search.spec.objective]


def _told(plan: Plan, winner: Configuration) -> list[str]:
    """Metrics whose optimism is told: what decided, and the headline figures."""
    spec = plan.search.spec
    decided = [objective.metric for objective in spec.objective]
    decided += [] if spec.constraint is None else [spec.constraint.metric]
    return list(dict.fromkeys([*decided, *HEADLINE]))


def _documents(
    plan: Plan,
    folder: SearchFolder,
    parent: Recording,
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    what: str,
    watcher: SearchWatcher,
    *,
    tags: Mapping[str, str],
    verbose: bool,
) -> list[dict[str, Any]]:
    """A training from scratch for each seed; those that are done already are not repeated."""
    found = []
    for place, seed in enumerate(seeds):
        config = final_config(plan, settings, seed=seed)
        # With a larger budget, the search may go on to find another winner.
        name = f"{what}-{seed}-{fingerprint(config)}"
        document = folder.final(name)
        if document is None:
            watcher.notice(f"training the {what} from scratch: seed {seed}")
            tracking = config.tracking.model_copy(update={"parent_run": parent.run_id or None})
            document = run_training(
                config.model_copy(update={"tracking": tracking}),
                watcher,
                tags={**tags, "amint.final": what},
                register=what == "winner" and place == 0,
                connected=True,
                verbose=verbose,
            )
            folder.note_final(name, document)
        found.append(document)
    return found


def _over_seeds(
    found: Sequence[Mapping[str, Mapping[str, Any]]], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Every figure's mean over the seeds, by flat name; put together as a search's trials are."""
    trials = [
        {
            "id": str(seed),
            "seed": seed,
            "configuration": 0,
            "baseline": False,
            "state": "done",
            "parameters": {},
            "settings": {},
            "violation": None,
            "figures": figures,
        }
        for figures, seed in zip(found, seeds, strict=True)
    ]
    (together,) = configurations(trials, [])
    return {name: dict(figure) for name, figure in together.figures.items()}


def _figures(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A training's figures, by flat name."""
    values = leaves(document)
    return {
        name: {"value": values[name], "low": values[f"{name}.low"], "high": values[f"{name}.high"]}
        for name in values
        if f"{name}.low" in values
    }


def _difference(
    mine: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Figure by figure, of two trainings with the same seed; one pair alone has no interval."""
    return {
        name: {"value": mine[name]["value"] - theirs[name]["value"], "low": None, "high": None}
        for name in mine
        if name in theirs
    }
