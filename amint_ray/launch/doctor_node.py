"""What `amint doctor` checks on a machine: the driver's, and each node's.

This module and those of ours that it imports at its head travel to the nodes as they are here
(`ray.cloudpickle.register_pickle_by_value`): what a node has installed is what is in question.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amint_ray.launch.no_secrets import scrub
from amint_ray.launch.time_limit import in_thread

_LEAST_DISK = 2 * 2**30
_FULLEST = 0.95
"""Share of a disk beyond which Ray takes no more objects on it."""
_LEAST_SHARED = 2**30
_GIB = 2**30
SLOWER = 3

Finding = dict[str, Any]
"""`name`, `ok`, `said`; and `where`, once a driver has it."""
Check = Callable[[], str]
"""Gives what is to be said where all is well, and raises `Wrong` where it is not."""


class Wrong(Exception):  # noqa: N818
    """What is wrong and what to do, in one line."""


def run_checks(checks: Mapping[str, Check], seconds: float) -> list[Finding]:
    """Run all at once; one that fails does not end the others.

    Args:
        checks: by name.
        seconds: that each may take; those that import torch, `SLOWER` times as long.
    """
    started = time.monotonic()
    running = {name: in_thread(check) for name, check in checks.items()}
    found = []
    for name, future in running.items():
        limit = seconds * (SLOWER if name == "gpu" else 1)
        try:
            ok, said = True, future.result(max(0.0, started + limit - time.monotonic()))
        except Wrong as wrong:
            ok, said = False, str(wrong)
        except TimeoutError:
            ok, said = False, f"no answer within {limit:g} s"
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            ok, said = False, f"{type(error).__name__}: {said}"
        found.append({"name": name, "ok": ok, "said": scrub(" ".join(said.split()))})
    return found


def checks_of_machine(asked: Mapping[str, Any]) -> dict[str, Check]:
    """The checks that a machine makes of itself.

    Args:
        asked: `versions` that it should have (None: any), `gpus` and `object_store` bytes that Ray
            says it has (None: Ray is not asked), and the addresses `storage` and `data`, where they
            are on S3 (else None).
    """
    checks: dict[str, Check] = {
        "versions": lambda: _versions(asked["versions"]),
        "gpu": lambda: _gpu(asked["gpus"]),
        "shared memory": lambda: _shared_memory(asked["object_store"]),
        "disk": _disk,
    }
    if asked["storage"] is not None:
        checks["storage"] = lambda: _write_read_delete(asked["storage"], asked["seconds"])
    if asked["data"] is not None:
        checks["data"] = lambda: _read(asked["data"], asked["seconds"])
    return checks


def look(asked: Mapping[str, Any]) -> list[Finding]:
    """Make them; a node runs this."""
    return run_checks(checks_of_machine(asked), asked["seconds"])


def now() -> float:
    """By this machine's clock."""
    return time.time()


def versions() -> dict[str, str]:
    """Of what must be the same on all machines; "none" where it is not installed."""
    found = {"Python": platform.python_version()}
    for package in ("ray", "torch", "amint-ray"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    spec = importlib.util.find_spec("amint_ray")
    if spec is None or spec.origin is None:
        found["amint-ray"] = "none"
    else:  # also where a path leads to it, and where the number has not kept up with the files
        number = found["amint-ray"].replace("none", "not installed")
        found["amint-ray"] = f"{number} (files {_sum_of(Path(spec.origin).parent):08x})"
    return found


def _sum_of(package: Path) -> int:
    total = 0
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", ".yaml"):
            total = zlib.crc32(file.relative_to(package).as_posix().encode(), total)
            total = zlib.crc32(file.read_bytes(), total)
    return total


def _versions(wanted: Mapping[str, str] | None) -> str:
    here = versions()
    if here["amint-ray"] == "none":
        raise Wrong("amint_ray is not installed; install it on every node")
    said = ", ".join(f"{name} {version}" for name, version in here.items())
    if wanted is None or wanted == here:
        return said
    other = [
        f"{name} {here[name]} (driver: {wanted[name]})"
        for name in here
        if here[name] != wanted[name]
    ]
    raise Wrong(f"{', '.join(other)}: all machines need the same; use one image, or install again")


def _gpu(ray_has: float | None) -> str:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen == 0:
        if ray_has:
            raise Wrong(
                f"Ray has {ray_has:g} GPUs here, torch sees none: check the driver (nvidia-smi), "
                f"and that torch is built for CUDA (it is for {torch.version.cuda or 'the CPU'})"
            )
        return "no GPU; gloo"
    if not torch.distributed.is_nccl_available():
        raise Wrong(f"{seen} GPUs, but this torch has no NCCL; install one that is built for CUDA")
    nccl_version: Callable[[], tuple[int, ...]] = torch.cuda.nccl.version
    nccl = ".".join(map(str, nccl_version()))
    said = f"{seen} × {torch.cuda.get_device_name(0)}, NCCL {nccl}"
    if ray_has is None or ray_has == seen:
        return said
    if ray_has > seen:
        raise Wrong(f"{said}, but Ray counts {ray_has:g}: start the node with --num-gpus={seen}")
    return f"{said}; Ray has {ray_has:g} of them"


def _shared_memory(object_store: float | None) -> str:
    place = Path("/dev/shm")
    if not place.is_dir():
        return "this system has no /dev/shm; Ray keeps objects in its temporary folder"
    usage = shutil.disk_usage(place)
    said = f"/dev/shm has {usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    more = "give the container more (--shm-size, or an emptyDir of medium Memory at /dev/shm)"
    if object_store is not None:
        said += f", Ray's object store {object_store / _GIB:.1f}"
        if usage.total < object_store:
            raise Wrong(f"{said}: {more}, or Ray keeps objects on the disk")
    if usage.total < _LEAST_SHARED or usage.free < _LEAST_SHARED / 16:
        raise Wrong(f"{said}: the reading processes need it for their batches; {more}")
    return said


def _disk() -> str:
    place = tempfile.gettempdir()
    usage = shutil.disk_usage(place)
    said = f"{place} has {usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free < _LEAST_DISK:
        raise Wrong(f"{said}: checkpoints are written there first; make room, or set TMPDIR")
    if 1 - usage.free / usage.total > _FULLEST:
        raise Wrong(f"{said}: Ray keeps no objects on a disk that is so full; make room")
    return said


def _write_read_delete(address: str, seconds: float) -> str:
    """A probe object at an S3 address."""
    storage = _of_node("amint_ray.storage")
    try:
        place = storage.locate(address, "storage.path", seconds=seconds / 2, attempts=1)
        name, content = f".amint-probe-{uuid.uuid4().hex}", os.urandom(64)
        with storage.write_atomically(place, name) as file:
            file.write(content)
        try:
            with storage.open_input(place, name) as file:
                if file.read() != content:
                    raise Wrong(f"{address}: gives back something else than was written")
        except BaseException:  # whatever it is, the probe is not to stay
            with contextlib.suppress(Exception):  # the first error is the one to tell
                storage.delete(place, name)
            raise
        storage.delete(place, name)
    except OSError as error:
        raise Wrong(f"storage.path: {error}") from None
    except Exception as error:  # UserError, which is the node's own class
        raise error if isinstance(error, Wrong) else Wrong(str(error)) from None
    return f"{address}: written, read, deleted"


def _read(address: str, seconds: float) -> str:
    """What is at an S3 address, to which data need not be written."""
    storage = _of_node("amint_ray.storage")
    try:
        place = storage.locate(address, "data.path", seconds=seconds / 2, attempts=1)
        info = place.filesystem.get_file_info(place.path)
        if info.type.name == "NotFound":
            raise Wrong(f"{address}: nothing is there")
    except Exception as error:
        raise error if isinstance(error, Wrong) else Wrong(str(error)) from None
    return f"{address}: can be listed"


def _of_node(module: str) -> Any:
    """A module as this machine has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Wrong(f"{module} cannot be imported here: {error}") from None
