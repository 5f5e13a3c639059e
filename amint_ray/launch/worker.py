"""What Ray Train runs in every worker; imports no more than that needs, since each worker waits."""

from __future__ import annotations

import time
from typing import Any

import ray

from amint_ray.config.schema import Config
from amint_ray.data.loading import MemoryStreams
from amint_ray.launch.context import RayContext
from amint_ray.train.loop import train


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Wire the loop to its data and its world.

    Args:
        arguments: `config`, `architecture`, `run_name`, and references to `images` and
            `manifest` in Ray's object store.

    Returns:
        The history, and when what happened, for the driver's clock; or `failed` and why.
    """
    entered = time.time()
    config: Config = arguments["config"]
    context = RayContext(arguments["run_name"])
    streams = MemoryStreams(
        ray.get(arguments["images"]),
        ray.get(arguments["manifest"]),
        config,
        rank=context.rank,
        world_size=context.world_size,
    )
    try:
        trained = train(config, arguments["architecture"], streams, context)
    except FloatingPointError as error:
        # Every rank sees the same sums and comes here. An exception would have Ray try again, to
        # the same end.
        return {"failed": str(error)}
    return {
        "entered": entered,
        "left": time.time(),
        "seconds": trained.seconds,
        "history": trained.history,
    }
