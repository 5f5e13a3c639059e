"""The parts of an attack: what each is, which are done already, and running the others on Ray."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import ray

from amint_ray.config.attack import AttackSettings
from amint_ray.config.schema import Config
from amint_ray.contracts import RunError, UserError, Watcher, first_line
from amint_ray.launch.attack_worker import Arrays, Look, Part
from amint_ray.launch.progress import Receiver
from amint_ray.launch.room import machines_of_cluster, wants_gpus
from amint_ray.storage import Location, exists, open_input

_CODE = (
    *("contracts.py", "config/data_schema.py", "config/schema.py", "data", "model", "train"),
    *(f"attacks/{name}.py" for name in ("blind", "evidence", "passive_mint", "shadows")),
    *(f"evaluation/{name}.py" for name in ("confounders", "outputs", "views")),
    *(f"launch/{name}.py" for name in ("attack_plan", "attack_worker", "worker")),
)
"""Whatever may change what a part comes to; methods read parts and are not among it."""
_SECONDS_BETWEEN_LOOKS = 0.3
_SECONDS_BETWEEN_NEWS = 1.0
SPARE = 1.2
"""Times what is written that must be free: files are whole before the old ones are gone."""

Function = Callable[[Part, Look, str, Mapping[str, Any], Any], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A part, and what Ray does of it.

    Attributes:
        part: which one.
        look: at what, once there is a model.
        function: of `attack_worker`.
    """

    part: Part
    look: Look
    function: Function


@dataclass(frozen=True)
class Resources:
    """What each task takes.

    Attributes:
        cpus: cores.
        gpus: share of a GPU; 0 on a cluster without.
        retries: how often a task is begun again whose process or node has died.
    """

    cpus: float
    gpus: float
    retries: int


def resources_of(config: Config, settings: AttackSettings) -> Resources:
    """What each task takes on the cluster that this process has joined."""
    use_gpu = wants_gpus(config.cluster, machines_of_cluster())
    return Resources(
        cpus=config.cluster.cpus_per_worker,
        gpus=settings.gpus if use_gpu else 0,
        retries=settings.retries,
    )


@dataclass(frozen=True)
class Done:
    """What running the parts came to.

    Attributes:
        reused: names of parts that were there already.
        seconds: of each part that was run now, by name.
        failed: why a training came to nothing, by name; found again where it was reused.
    """

    reused: list[str]
    seconds: dict[str, float]
    failed: dict[str, str]


@cache
def code_fingerprint(names: tuple[str, ...] = _CODE) -> str:
    """16 hex digits over torch, timm and code, by default that on which a part's results depend.

    Args:
        names: modules and rooms of the package.
    """
    from importlib.metadata import version

    package = Path(str(resources.files("amint_ray")))
    digest = hashlib.sha256(f"{version('torch')} {version('timm')}".encode())
    for name in names:
        place = package / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint_of(what: Mapping[str, Any]) -> str:
    """16 hex digits over plain values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder, which need not exist, is on."""
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(standing).free


def check_disk(place: Location, needed: int) -> None:
    """Whether a folder's disk has room for what is to be written.

    Args:
        place: the folder, which need not exist; on object storage nothing is asked.
        needed: bytes.

    Raises:
        UserError: it has not.
    """
    if place.remote:
        return
    free = free_bytes(Path(place.path))
    if needed * SPARE > free:
        raise UserError(
            f"attack.shadows: what is kept of all models takes {needed * SPARE / 2**30:.3g} GiB "
            f"and {place.uri} (storage.path) has {free / 2**30:.3g} GiB free; take fewer, give "
            "attack.edits=false or attack.compare_plain=false, or name another folder"
        )


def is_done(part: Part) -> bool:
    """Whether a part's file is there."""
    return exists(part.place, f"{part.name}.npz")


def read_part(part: Part) -> Arrays:
    """What a part came to.

    Raises:
        RunError: its file is damaged or gone.
    """
    return read_arrays(part.place, part.name)


def read_arrays(place: Location, name: str) -> Arrays:
    """What a process of ours left in a file.

    Args:
        place: the folder.
        name: of the file, without `.npz`.

    Raises:
        RunError: it is damaged or gone.
    """
    try:
        with open_input(place, f"{name}.npz") as file:
            arrays = np.load(io.BytesIO(file.read()), allow_pickle=False)
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # a zip file's own, NumPy's, the network's
        raise RunError(
            f"{place.uri}/{name}.npz cannot be read ({first_line(error)}); delete it and run the "
            "same command again"
        ) from error


def run(
    tasks: Sequence[Task],
    attack: str,
    data: Mapping[str, Any],
    model: Any,
    resources_each: Resources,
    watcher: Watcher,
) -> Done:
    """Run what is not done yet, as many at a time as the cluster has room for.

    Args:
        tasks: all of them.
        attack: names the news; unique on the cluster.
        data: references for `worker.open_streams`.
        model: reference to (architecture, weights).
        resources_each: of each task.
        watcher: is told how far it is.

    Raises:
        RunError: a task failed for good, for another reason than that its training diverged.
    """
    left = [task for task in tasks if not is_done(task.part)]
    reused = [task.part.name for task in tasks if task not in left]
    # A process that has seen one GPU sees no other, and one that has streamed gave its temporary
    # folder up. Ray takes `max_calls` here alone, and not from `options`.
    once = resources_each.gpus > 0 or any(t.part.config.data.mode == "streamed" for t in left)
    each = ray.remote(
        num_cpus=resources_each.cpus,
        num_gpus=resources_each.gpus,
        max_retries=resources_each.retries,
        max_calls=1 if once else 0,
    )
    remote: dict[Function, Any] = {
        function: each(function) for function in {task.function for task in left}
    }
    # Most look at the same images: once into the object store.
    looks = {id(task.look): task.look for task in left}
    shared = {key: ray.put(look) for key, look in looks.items()}
    waiting = {
        remote[task.function].remote(
            task.part, shared[id(task.look)], attack, data, model
        ): task.part
        for task in left
    }
    news = _News(attack, tasks, left, watcher)
    seconds: dict[str, float] = {}
    try:
        while waiting:
            watcher.heartbeat()
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_SECONDS_BETWEEN_LOOKS)
            for reference in ready:
                part = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except Exception as error:  # Ray's, wrapping the task's own
                    cause = getattr(error, "cause", None) or error
                    raise RunError(
                        f"{part.name}: {first_line(cause)}; what is done is kept, the same command "
                        "goes on"
                    ) from error
                seconds[part.name] = result["seconds"]
                if "failed" in result:
                    watcher.notice(
                        f"{part.name} came to nothing and is left out: {result['failed']}"
                    )
            news.look(waiting.values())
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        news.close()
    failed = {}
    for task in tasks:
        if task.part.epochs and "failed" in (found := read_part(task.part)):
            failed[task.part.name] = str(found["failed"])
    return Done(reused, seconds, failed)


class _News:
    """How far the trainings are, for the screen."""

    def __init__(
        self, attack: str, tasks: Sequence[Task], left: Sequence[Task], watcher: Watcher
    ) -> None:
        self._watcher, self._attack, self._total = watcher, attack, len(tasks)
        self._epochs = {task.part.name: float(task.part.epochs) for task in tasks}
        undone = {task.part.name for task in left}
        self._trained = {name: 0.0 if name in undone else e for name, e in self._epochs.items()}
        self._receivers = {name: Receiver(f"{attack}/{name}") for name in undone}
        self._looked = 0.0

    def look(self, waiting: Any) -> None:
        """Read what the tasks that are under way tell, and pass it on."""
        if time.monotonic() < self._looked + _SECONDS_BETWEEN_NEWS:
            return
        self._looked = time.monotonic()
        undone = {part.name for part in waiting}
        for name in self._epochs.keys() - undone:
            self._trained[name] = self._epochs[name]
        for name in undone:
            for event in self._receivers[name].poll():
                self._trained[name] = self._epochs[name] * event["step"] / event["steps"]
        self._watcher.event(
            {
                "phase": "parts",
                "done": self._total - len(undone),
                "total": self._total,
                "epochs": sum(self._trained.values()),
                "epochs_total": sum(self._epochs.values()),
            }
        )

    def close(self) -> None:
        """Leave nothing behind in a cluster that lives on."""
        for receiver in self._receivers.values():
            receiver.close()
