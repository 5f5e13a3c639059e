"""`amint attack`: every attack of the literature on one model, on the same samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pyarrow.fs import FileSelector, FileType

from amint_ray.attacks.method import Method
from amint_ray.attacks.methods import chosen
from amint_ray.config.attack import load_attack
from amint_ray.contracts import RunError, Watcher, first_line
from amint_ray.data.roles import Manifest
from amint_ray.launch.attack_checks import (
    answering_methods,
    check_room_for_shadows,
    possible_methods,
)
from amint_ray.launch.attack_parts import Done, check_disk, resources_of, run
from amint_ray.launch.attack_plan import AttackPlan, plan_attack, teaches_codes
from amint_ray.launch.attack_result import conclude
from amint_ray.launch.claim import alone_at
from amint_ray.launch.cluster import address_of, connect
from amint_ray.launch.codes import keyless, with_key
from amint_ray.launch.dataset import find_source, index_on_ray, load_here
from amint_ray.launch.earlier import check_overrides, check_same
from amint_ray.launch.prepare import check, put_data, with_streams
from amint_ray.launch.room import wait_for_room
from amint_ray.launch.search_folder import reading
from amint_ray.launch.target import Target, find_target, one_worker
from amint_ray.storage import Location

_PURPOSE = "attacked"
_WEIGHTS = "model.safetensors"


def run_attack(
    uri: str,
    methods: str,
    overrides: Sequence[str],
    watcher: Watcher,
    *,
    verbose: bool = False,
) -> dict[str, Any]:
    """Attack a model by several methods, and tell what each sees of `member` and of `withheld`.

    What an attack of the same model, data, settings and code did before is used again.

    Args:
        uri: of the model (`models:/NAME/VERSION`, `models:/NAME@ALIAS`), or a run's id.
        methods: "all", or names with commas.
        overrides: `attack.KEY=VALUE`, and where data, storage and cluster are now.
        watcher: is told how far it is.
        verbose: let Ray talk.

    Returns:
        The attack's document, as `attack_result.conclude` describes it.

    Raises:
        UserError: a mistake of the user's.
        RunError: a part of it failed.
        BaseException: whatever a signal raises; what is done by then is kept.
    """
    started = time.perf_counter()
    settings, rest = load_attack(overrides)
    named = "all" not in [name.strip() for name in methods.split(",")]
    wanted = possible_methods(chosen(methods), settings, watcher, named=named)
    check_overrides(rest, purpose=_PURPOSE, also=("attack",))
    target = find_target(uri, rest, watcher, purpose=_PURPOSE)
    config = one_worker(target.earlier.config)
    coded = teaches_codes(config, settings, _needs(wanted))
    config = with_key(config) if coded else config
    checked = check(config if coded else keyless(config), watcher)
    checkpoints = _checkpoints(checked.storage, target, watcher) if settings.snapshots else []
    manifest = target.earlier.manifest

    def with_shadows(methods: Sequence[Method], manifest: Manifest) -> list[Method]:
        left = answering_methods(methods, settings, manifest, watcher, named=named)
        with reading(checked.storage):
            check_room_for_shadows(left, settings, config, manifest, checked.storage)
        return left

    if manifest is not None:
        wanted = with_shadows(wanted, manifest)
    config, source = find_source(config, watcher)
    dataset = load_here(config, source, watcher) if config.data.mode == "memory" else None
    address = address_of(config.cluster)
    watcher.phase("starting Ray")
    with connect(address, verbose=verbose):
        if address is not None:
            wait_for_room(config.cluster, watcher)
        if dataset is None:
            dataset = index_on_ray(config, source, checked.storage, watcher)
        check_same(target.earlier, dataset.index.manifest)
        if manifest is None:
            wanted = with_shadows(wanted, dataset.index.manifest)
        plan = plan_attack(
            with_streams(config, workers=1),
            settings,
            dataset.index.manifest,
            checked.storage,
            needs=_needs(wanted),
            model=target.digest,
            checkpoints=checkpoints,
        )
        _warn(target, watcher)
        with reading(checked.storage):
            check_disk(plan.place, plan.bytes_needed)
        with alone_at(plan.place, "attack", watcher):
            # Ray's object store then has the images, and this process no more.
            data = put_data(plan.config if coded else keyless(plan.config), dataset)
            dataset = None
            done = _run(plan, data, target, watcher)
            document = conclude(plan, target.earlier, wanted, done, watcher, uri=uri)
    return {**document, "seconds": {**document["seconds"], "total": time.perf_counter() - started}}


def _warn(target: Target, watcher: Watcher) -> None:
    """Say where shadow models are not quite what the audited model is."""
    earlier = target.earlier
    if earlier.config.data.near_duplicates is not None:
        watcher.notice(
            "data.near_duplicates: shadow models are dealt exact contents, so that near-duplicates "
            "of an image may be in one that it is not in; what is compared with shadow models errs"
        )
    workers = earlier.tags.get("amint.workers", "1")
    alike = target.model.model.architecture.modes_agree or earlier.config.train.sync_batchnorm
    if workers != "1" and not alike:
        watcher.notice(
            f"the run had {workers} workers, its shadow models and its twin with λ₂ = 0 have one: "
            "BatchNorm sees larger batches in them"
        )


def _needs(methods: Sequence[Method]) -> set[str]:
    return {need for method in methods for need in method.needs}


def _checkpoints(storage: Location, target: Target, watcher: Watcher) -> list[Location]:
    """Weights of the run's checkpoints before its last, oldest first."""
    name = target.earlier.tags.get("mlflow.runName", "")
    folder = storage.below(name)
    try:
        found = storage.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True))
    except OSError as error:
        raise RunError(f"storage.path = {storage.uri!r}: {first_line(error)}") from error
    names = sorted(
        info.base_name
        for info in found
        if info.type == FileType.Directory and info.base_name.startswith("checkpoint_")
    )[:-1]
    if not names:
        watcher.notice(
            f"attack.snapshots: {folder.uri} has no checkpoint before the last; a run keeps "
            "more with storage.keep=5"
        )
    return [folder.below(f"{each}/{_WEIGHTS}") for each in names]


def _run(plan: AttackPlan, data: Mapping[str, Any], target: Target, watcher: Watcher) -> Done:
    """Everything that is not done yet, on Ray."""
    import ray

    resources = resources_of(plan.config, plan.settings)
    parts = len(plan.tasks)
    watcher.phase(f"training and asking {parts} {'part' if parts == 1 else 'parts'}")
    name = f"attack-{plan.place.path.rsplit('/', 1)[-1]}"
    return run(plan.tasks, name, data, ray.put(target.parts), resources, watcher)
