"""From a configuration to images with roles: held in memory, or indexed where they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.config.schema import Config
from amint_ray.contracts import Role, RunError, UserError, Watcher, first_line
from amint_ray.data.index import Hashes, Index, Rows
from amint_ray.data.index_folder import IndexFolder
from amint_ray.data.memory import choose_mode, load_memory
from amint_ray.data.quarantine import check_quarantine
from amint_ray.data.reading import read_plain
from amint_ray.data.sources import Source, count, open_source
from amint_ray.launch.cluster import local_cores
from amint_ray.storage import Location, open_input, write_atomically

_MOST_COMPARED, _MOST_READ, _MOST_BYTES = 4000, 1000, 256 * 2**20
"""Images of a role for the confounder check: in memory; read anew; and what they may take."""
_THREADS = 8
_CONFOUNDERS_VERSION = 1
"""To be raised when the same images would be judged otherwise."""
_LARGE_SHARD = 256 * 2**20


@dataclass(frozen=True)
class Dataset:
    """A source whose images have roles.

    Attributes:
        source: where the images are.
        index: who they are.
        images: (n, channels, size, size) uint8 in the index's order, where they are in memory.
    """

    source: Source
    index: Index
    images: npt.NDArray[np.uint8] | None


def find_source(config: Config, watcher: Watcher) -> tuple[Config, Source]:
    """Open the source, and settle how it is read.

    Returns:
        The configuration with `data.mode` settled, and the source.

    Raises:
        UserError: there is no such source, or it does not fit.
    """
    watcher.phase(f"opening {config.data.source}")
    source = open_source(config.data)
    for note in source.notes:
        watcher.notice(f"data: {note}")
    mode = choose_mode(source, config.data)
    largest = max((shard.size for shard in source.shards), default=0)
    if mode == "streamed" and largest > _LARGE_SHARD and config.data.source == "parquet":
        watcher.notice(
            f"data: row groups of up to {largest / 2**20:.0f} MiB are read whole by several "
            "streams; `amint prepare` writes smaller ones"
        )
    data = config.data.model_copy(update={"mode": mode})
    return config.model_copy(update={"data": data}), source


def load_here(config: Config, source: Source, watcher: Watcher) -> Dataset:
    """Decode a source that fits into memory.

    Raises:
        UserError: too much of it cannot be used.
    """
    watcher.phase(f"reading {config.data.source}")
    images, index = load_memory(
        source,
        config.data,
        readers=local_cores(),
        progress=lambda done, total: watcher.event(_reading(done, total)),
        hashes=_hashes(config),
    )
    return _checked(config, Dataset(source, index, images), watcher)


def _hashes(config: Config) -> Hashes:
    """Which hashes of an image this run needs."""
    return config.mint.keyed.code_from if config.wants_codes else "roles"


def index_on_ray(config: Config, source: Source, storage: Location, watcher: Watcher) -> Dataset:
    """Look at every image once, on all of the cluster; what an earlier run saw is used again.

    Args:
        config: the whole configuration.
        source: to be indexed.
        storage: where all nodes can keep what they find.
        watcher: is told how far it is.

    Raises:
        UserError: too much of it cannot be used.
        RunError: storage does not answer.
    """
    import ray

    watcher.phase(f"indexing {count(source):,} images")
    folder = IndexFolder(storage, source, config.data, _hashes(config))
    examine = ray.remote(num_cpus=1)(IndexFolder.write)
    shared = [ray.put(value) for value in (folder, source, config.data)]
    waiting = {
        examine.remote(shared[0], chunk, *shared[1:]): folder.rows(chunk)
        for chunk in folder.missing()
    }
    total, done = count(source), count(source) - sum(waiting.values())
    while waiting:
        watcher.heartbeat()
        ready, _ = ray.wait(list(waiting), timeout=0.5)
        for task in ready:
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                raise RunError(
                    f"data: {first_line(getattr(error, 'cause', error))}; what was indexed is "
                    "kept, the same command goes on"
                ) from error
            done += waiting.pop(task)
            watcher.event(_reading(done, total))
    return _checked(config, Dataset(source, folder.read(source, config.data), None), watcher)


def _checked(config: Config, dataset: Dataset, watcher: Watcher) -> Dataset:
    """Tell what was left out, and stop if that is too much."""
    check_quarantine(dataset.source, dataset.index, config.data)
    if bad := dataset.index.quarantine:
        watcher.notice(
            f"data: {len(bad):,} of {count(dataset.source):,} cannot be used and are quarantined; "
            f"the first: {bad[0][0]}: {bad[0][1]}"
        )
    names, labels = dataset.index.class_names, dataset.index.manifest.label
    used = len(np.unique(labels[labels >= 0]))
    if used < 2:
        raise UserError(
            f"data: all images have one label ({names[0]!r}); a classifier needs two classes"
        )
    if used < len(names):
        watcher.notice(f"data: {len(names) - used:,} of {len(names):,} classes have no image")
    for note in dataset.index.notes:
        watcher.notice(f"data: {note}")
    if overlap := dataset.index.overlap:
        watcher.notice(
            f"data: {overlap:,} images of data.external are in the pool, too, and are left out"
        )
    return dataset


def confounders(
    config: Config, dataset: Dataset, storage: Location, watcher: Watcher
) -> dict[str, Any] | None:
    """Whether a classifier that never sees the model tells the roles apart; warns if so.

    Images that are not in memory are read for it from all over the source, which can take as long
    as minutes: what was found for a split is kept beside the indexes.

    Args:
        config: the whole configuration.
        dataset: images with roles.
        storage: where the indexes are kept.
        watcher: is told how far it is, and what was found.

    Returns:
        What `evaluation.confounders.check_confounders` says; None where it is not asked for.
    """
    if not config.data.confounder_check:
        return None
    roles = [Role.MEMBER, Role.TEST] + ([Role.EXTERNAL] if config.trains_membership else [])
    kept = _kept_as(config, dataset, roles) if dataset.images is None else None
    found = None if kept is None else _read_kept(storage, kept)
    if found is None:
        found = _look_for_confounders(config, dataset, roles, watcher)
        if kept is not None:
            with write_atomically(storage, kept) as file:
                file.write(json.dumps(found).encode())
    for name, comparison in found["comparisons"].items():
        if comparison["confounded"]:
            auc = comparison["auc"]
            watcher.notice(
                f"WARNING: the split is confounded: a classifier that never sees the model tells "
                f"{name.replace('_vs_', ' from ')} with AUC {auc['value']:.3f} [{auc['low']:.3f}, "
                f"{auc['high']:.3f}]; no membership figure of this split can be trusted"
            )
    return found


def _look_for_confounders(
    config: Config, dataset: Dataset, roles: Sequence[Role], watcher: Watcher
) -> dict[str, Any]:
    from amint_ray.evaluation.confounders import check_confounders

    rows = dataset.index.rows()
    images = {}
    for role in roles:
        if dataset.images is None:
            watcher.phase(f"reading {role} images to look for confounders")
        images[role] = sample_images(config, dataset, rows, role, watcher)
    watcher.phase("looking for confounders")
    return check_confounders(images, confidence=config.evaluation.confidence)


def _read_kept(storage: Location, name: str) -> dict[str, Any] | None:
    """What was found before; None where there is nothing that can be read."""
    try:
        with open_input(storage, name) as file:
            found: dict[str, Any] = json.loads(file.read())
            return found
    except (OSError, ValueError):
        return None


def _kept_as(config: Config, dataset: Dataset, roles: Sequence[Role]) -> str:
    """Under which name the answer for this split is kept: it has in it all that it depends on."""
    views = config.data.model_dump(include={"image_size", "crop_pct", "channels", "split_seed"})
    asked = [
        *(_CONFOUNDERS_VERSION, dataset.index.manifest.fingerprint, sorted(views.items())),
        *(roles, config.evaluation.confidence),
    ]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
    return f"confounders/{key}.json"


def sample_images(
    config: Config, dataset: Dataset, rows: Rows, role: Role, watcher: Watcher
) -> npt.NDArray[np.uint8]:
    """A random choice of a role's images, as they are scored; from all shards.

    Shards may be sorted by class: few of them, and others for each role, would differ by class.
    """
    positions = np.random.default_rng(config.data.split_seed).permutation(rows.having([role]))
    size = config.data.channels * config.data.image_size**2
    most = _MOST_READ if dataset.images is None else _MOST_COMPARED
    positions = np.sort(positions[: min(most, _MOST_BYTES // size)])
    if dataset.images is not None:
        return np.asarray(dataset.images[positions])

    def progress(done: int, total: int) -> None:
        watcher.heartbeat()
        watcher.event(_reading(done, total))

    return read_plain(
        dataset.source,
        rows,
        config.data,
        positions,
        readers=_THREADS,
        progress=progress,
    )


def _reading(done: int, total: int) -> dict[str, Any]:
    return {"phase": "read", "done": done, "total": total}
