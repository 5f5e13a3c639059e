"""What Ray Train runs in every worker; imports no more than that needs, since each worker waits."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from amint_ray.config.schema import Config
from amint_ray.contracts import Role, RunContext, RunError, Streams
from amint_ray.launch.context import RayContext
from amint_ray.launch.progress import give_up, given_up
from amint_ray.train.loop import train
from amint_ray.train.reduce import gather_lists
from amint_ray.train.state import DamagedCheckpointError

_SECONDS_TO_APPEAR = 5.0
"""Of a new file on a file system that all nodes share."""


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Wire the loop to its data and its world.

    Args:
        arguments: `config`, `architecture` (a reference to it), `run_name`, `manifest` (its
            fingerprint), `data` for `open_streams`, and `sign`: a file of the driver's in storage
            that every node must see; None: any will. Of a search's trial also `score`: False, and
            `inherit`: a `ray.train.Checkpoint` of another trial to go on from, or None.

    Returns:
        The history, and when what happened, for the driver's clock; or `failed` and why; or
        `unseen`, the nodes that do not see the sign.
    """
    entered = time.time()
    config: Config = arguments["config"]
    if (reason := given_up(arguments["run_name"])) is not None:
        return {"failed": reason, "diverged": False}
    if unseen := nodes_without(arguments["sign"]):
        return {"unseen": unseen}
    context = RayContext(arguments["run_name"])
    streams = open_streams(config, arguments["data"], context)
    try:
        with (
            context.machine_watched(config.tracking.enabled * config.tracking.system_seconds),
            context.inherited(arguments.get("inherit")) as inherit,
        ):
            trained = train(
                config,
                ray.get(arguments["architecture"]),
                streams,
                context,
                manifest=arguments["manifest"],
                score=arguments.get("score", True),
                inherit=inherit,
            )
    except DamagedCheckpointError as error:
        return {"failed": str(error), "diverged": False}
    except FloatingPointError as error:
        # Every rank sees the same sums and comes here. An exception would have Ray try again, to
        # the same end.
        return {"failed": str(error), "diverged": True}
    except RunError as error:
        # This rank may be alone with it, and the others wait for it: only an exception ends them
        # all. The next try, which Ray will make, finds the word and ends.
        give_up(arguments["run_name"], str(error))
        raise
    finally:
        streams.close()
        if config.data.mode == "streamed":
            # Ray ends this process without its clean-up; the fork server's socket would stay.
            shutil.rmtree(get_temp_dir(), ignore_errors=True)
    return {
        "entered": entered,
        "left": time.time(),
        "seconds": trained.seconds,
        "history": trained.history,
        "lost": trained.lost,
        "workers": context.world_size,
    }


def nodes_without(sign: str | None) -> list[str]:
    """Names of the workers' machines on which a file is not there; each worker learns of all."""
    if sign is None:
        return []
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not (seen := Path(sign).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return sorted(set(gather_lists([] if seen else [socket.gethostname()])))


def open_streams(
    config: Config,
    data: Mapping[str, Any],
    context: RunContext,
    *,
    roles: npt.NDArray[np.uint8] | None = None,
) -> Streams:
    """This worker's part of the data.

    Args:
        config: the whole configuration, `data.mode` settled.
        data: references to `images` and `manifest`, or to `source` and `rows`; and `readers`. Where
            codes are asked for, to `codes`.
        context: tells which worker this is.
        roles: (n,) of all samples, in place of their own: places in `list(Role)`.
    """
    where: dict[str, Any] = {
        "rank": context.rank,
        "world_size": context.world_size,
        "device": context.device,
        "codes": ray.get(data["codes"]) if "codes" in data else None,
    }
    if config.data.mode == "memory":
        from amint_ray.data.loading import MemoryStreams

        images, manifest = ray.get([data["images"], data["manifest"]])
        if roles is not None:
            names = np.array([role.value for role in Role])
            manifest = replace(manifest, role=names[roles])
        return MemoryStreams(images, manifest, config, **where)
    from amint_ray.data.streaming import StreamedStreams

    source, rows = ray.get([data["source"], data["rows"]])
    if roles is not None:
        rows = replace(rows, role=roles)
    return StreamedStreams(source, rows, config, readers=data["readers"], **where)
