"""Before Ray starts: everything that can be found wrong, and what a run is made of."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, Watcher
from amint_ray.data.loading import check_roles
from amint_ray.data.roles import Manifest
from amint_ray.data.sources import load_source
from amint_ray.launch.cluster import address_of, check_address, local_cores, plan_workers
from amint_ray.model.backbone import create_backbone
from amint_ray.model.joint import Architecture, plan_architecture
from amint_ray.storage import writable_folder
from amint_ray.tracking.run_log import check_tracking, tracking_uri
from amint_ray.train.flops import StepFlops, count_flops
from amint_ray.train.update import create_update


@dataclass(frozen=True)
class Prepared:
    """What is settled before Ray starts.

    Attributes:
        config: the whole configuration.
        run_name: unique; names the checkpoints' folder and the MLflow run.
        manifest: who is a member.
        class_names: one a class.
        architecture: of the model.
        flops: of one global step.
        storage: folder of all runs' checkpoints.
        tracking_uri: of MLflow.
    """

    config: Config
    run_name: str
    manifest: Manifest
    class_names: list[str]
    architecture: Architecture
    flops: StepFlops
    storage: Path
    tracking_uri: str


def prepare(config: Config, watcher: Watcher) -> tuple[Prepared, npt.NDArray[np.uint8]]:
    """Check everything, cheapest first, and read the data.

    Returns:
        The run's settings, and (n, channels, size, size) uint8 images in the manifest's order.

    Raises:
        UserError: something was found wrong.
    """
    watcher.phase("checking the configuration")
    storage = writable_folder(config.storage.path, "storage.path")
    uri = tracking_uri()
    check_tracking(uri)
    # Two classes stand for any number: taps and head do not depend on it, and a wrong tap should
    # not wait for a large source to be decoded.
    architecture = plan_architecture(config, num_classes=2)
    address = address_of(config.cluster)
    if address is None:
        plan_workers(
            config.cluster,
            rows=worker_rows(config, architecture),
            cores=local_cores(),
            gpus=torch.cuda.device_count(),
        )
    else:
        check_address(address)
    create_update(torch.nn.Linear(1, 1), config.train, steps_per_epoch=1)
    stays = not architecture.early_exit and not config.mint.detach and not config.mint.inputs
    if config.loss.lambda_mint > 0 and stays:
        watcher.notice(
            f"{config.model.backbone}: what comes behind {architecture.taps[-1].name} needs all "
            "rows, so E goes through the whole backbone"
        )
    if config.model.pretrained:
        watcher.phase(f"fetching weights of {config.model.backbone}")
        create_backbone(
            config.model.backbone,
            num_classes=2,
            channels=config.data.channels,
            options=config.model.options,
            pretrained=True,
        )
    watcher.phase(f"reading {config.data.source}")
    source = load_source(config.data, lambda done, total: watcher.event(_reading(done, total)))
    manifest = source.manifest(config.data)
    check_roles(manifest, config)
    architecture = replace(architecture, num_classes=len(source.class_names))
    prepared = Prepared(
        config=config,
        run_name=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
        manifest=manifest,
        class_names=source.class_names,
        architecture=architecture,
        flops=step_flops(config, architecture),
        storage=storage,
        tracking_uri=uri,
    )
    return prepared, source.images


def worker_rows(config: Config, architecture: Architecture) -> int:
    """How many workers a micro-batch of D has images for: BatchNorm needs two each, others one.

    Raises:
        UserError: not even for one worker.
    """
    rows = config.train.batch_size // config.train.accumulate
    needed = 1 if architecture.modes_agree else 2
    if rows < needed:
        raise UserError(
            f"train.accumulate = {config.train.accumulate}: micro-batches of {rows} image of D "
            f"(train.batch_size = {config.train.batch_size}) are too small for this backbone; make "
            "it smaller or the batch larger"
        )
    return rows // needed


def step_flops(config: Config, architecture: Architecture) -> StepFlops:
    """What a step of this configuration costs, all workers together."""
    n_task, head_from = config.train.batch_size, config.plain_rows
    return count_flops(
        architecture,
        n_task=n_task,
        n_rows=n_task + config.plain_rows + config.external_rows,
        head_from=head_from,
        mint=config.loss.lambda_mint > 0,
    )


def _reading(done: int, total: int) -> Mapping[str, Any]:
    return {"phase": "read", "done": done, "total": total}
