"""`amint tune --dry-run`: what a search would begin with, and what would be in its way."""

from __future__ import annotations

from typing import Any

import torch

from amint_ray.config.schema import Config
from amint_ray.config.search import Search
from amint_ray.contracts import UserError, Watcher
from amint_ray.launch.cluster import address_of, local_cores
from amint_ray.launch.ledger import Ledger
from amint_ray.launch.room import Machine, plan_workers, trials_at_a_time
from amint_ray.launch.search_folder import earlier_search, reading
from amint_ray.launch.search_plan import first_trials, plan_search, with_its_key
from amint_ray.storage import Location, check_access, exists, locate


def show_plan(search: Search, watcher: Watcher, *, new: bool = False) -> dict[str, Any]:
    """What a search would begin with.

    Args:
        search: what is asked for.
        watcher: is told what goes on, and of a search of this name that is there already.
        new: as it would begin beside such a one.

    Returns:
        `search`, `trials` (`id`, `configuration`, `parameters`, `settings`, `seed`, `baseline`),
        `planned` (trials in all) and `concurrent` (at a time; None: what the cluster that is to be
        joined has room for).

    Raises:
        UserError: a value of the space gives no model, there are no images, or no key, where they
            should be, `storage.path` cannot be written to, or what is kept there is another search
            or damaged.
        RunError: storage does not answer.
    """
    storage = locate(search.base.storage.path, "storage.path")
    check_access(storage, "storage.path")
    _check_paths(search.base)
    search = with_its_key(search)
    if not new:
        _tell_of_earlier(search, storage, watcher)
    plan = plan_search(search, watcher)
    trials, planned = first_trials(plan)
    concurrent = search.spec.budget.concurrent
    if address_of(plan.base.cluster) is None:
        machines = [Machine(local_cores(), torch.cuda.device_count())]
        workers, use_gpu = plan_workers(
            plan.base.cluster, machines, rows=plan.base.train.batch_size
        )
        room = trials_at_a_time(plan.base.cluster, machines, workers, use_gpu=use_gpu)
        concurrent = min(concurrent or room, room)
    shown = ("id", "configuration", "parameters", "settings", "seed", "baseline")
    return {
        "search": search.spec.name,
        "trials": [{key: getattr(trial, key) for key in shown} for trial in trials],
        "planned": planned,
        "concurrent": concurrent,
    }


def _check_paths(config: Config) -> None:
    """Whether something is where the images should be; what it is, is seen when they are read.

    Raises:
        UserError: nothing is.
    """
    for key, source, path in (
        ("data.path", config.data.source, config.data.path),
        ("data.external.path", config.data.external.source, config.data.external.path),
    ):
        if path is None or source is None or source.startswith("torchvision:"):  # which may fetch
            continue
        place = locate(path, key)
        with reading(place, key):
            there = place.remote or exists(place)
        if not there:
            raise UserError(f"{key} = {path!r}: there is no such file or folder; say where it is")


def _tell_of_earlier(search: Search, storage: Location, watcher: Watcher) -> None:
    """Say what of this very search is there.

    Raises:
        UserError: the name is another search's, or its record is damaged.
    """
    with reading(storage):
        folder = earlier_search(search, storage)
        if folder is None:
            return
        ledger = Ledger(folder.trials)
        damaged = ledger.load()
    ended = len(ledger.where(lambda trial: trial.ended))
    would = "would give its result again" if folder.record.ended else "would go on with it"
    watcher.notice(
        f"{folder.place.uri} has this search already, {ended} "
        f"{'trial' if ended == 1 else 'trials'} of which {'has' if ended == 1 else 'have'} ended: "
        f"without --dry-run this command {would}; what follows is how it begins anew (--new)"
    )
    for trial, reason in damaged.items():
        watcher.notice(f"WARNING: {folder.trials.uri}/{trial}.json is damaged ({reason})")
