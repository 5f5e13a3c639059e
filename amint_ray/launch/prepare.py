"""Before Ray starts: everything that can be found wrong, and what a run is made of."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, Watcher
from amint_ray.data.loading import check_roles
from amint_ray.data.orders import stream_count
from amint_ray.data.roles import Manifest
from amint_ray.data.transforms import Views
from amint_ray.launch.cluster import address_of, local_cores
from amint_ray.launch.codes import codes_of, with_key
from amint_ray.launch.dataset import Dataset, confounders
from amint_ray.launch.knock import check_address
from amint_ray.launch.room import Machine, plan_workers
from amint_ray.launch.runs import RunRecord
from amint_ray.model.backbone import create_backbone
from amint_ray.model.joint import Architecture, plan_architecture
from amint_ray.storage import Location, check_writable, locate, writable_folder
from amint_ray.tracking.run_log import check_tracking, tracking_uri
from amint_ray.train.flops import StepFlops, count_flops
from amint_ray.train.update import create_update

STORAGE_ATTEMPTS = 9
"""Of each request: with the pauses between them, storage may be away for a minute or two."""


@dataclass(frozen=True)
class Prepared:
    """What is settled before training starts.

    Attributes:
        config: the whole configuration.
        run_name: unique; names the checkpoints' folder and the MLflow run.
        dataset: images with roles.
        confounders: what a blind classifier makes of the split; None: not asked.
        architecture: of the model.
        flops: of one global step.
        storage: of all runs' checkpoints.
        spool: where what is to go to MLflow waits.
        tracking_uri: of MLflow.
        earlier: the run that this one goes on with, if it does.
    """

    config: Config
    run_name: str
    dataset: Dataset
    confounders: dict[str, Any] | None
    architecture: Architecture
    flops: StepFlops
    storage: Location
    spool: Path
    tracking_uri: str
    earlier: RunRecord | None


@dataclass(frozen=True)
class Checked:
    """What was found out without touching the data."""

    architecture: Architecture
    storage: Location
    spool: Path
    tracking_uri: str


def check(config: Config, watcher: Watcher) -> Checked:
    """Check everything but the data, cheapest first.

    Raises:
        UserError: something was found wrong.
    """
    watcher.phase("checking the configuration")
    with_key(config)
    storage = locate(config.storage.path, "storage.path", attempts=STORAGE_ATTEMPTS)
    check_writable(storage, "storage.path")
    uri = tracking_uri()
    if config.tracking.enabled:
        check_tracking(uri)
    beside = "amint_spool" if storage.remote else f"{storage.path}/spool"
    spool = writable_folder(config.tracking.spool or beside, "tracking.spool")
    # Two classes stand for any number: taps and head do not depend on it, and a wrong tap should
    # not wait for a large source to be decoded.
    architecture = plan_architecture(config, num_classes=2)
    address = address_of(config.cluster)
    if address is None:
        here = Machine(local_cores(), torch.cuda.device_count())
        plan_workers(config.cluster, [here], rows=worker_rows(config, architecture))
    else:
        check_address(address)
    create_update(torch.nn.Linear(1, 1), config.train, steps_per_epoch=1)
    Views(config.data)
    stays = not architecture.exits_early and not config.mint.detach and not config.mint.inputs
    if config.trains_membership and stays:
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
    return Checked(architecture, storage, spool, uri)


def prepare(
    config: Config,
    checked: Checked,
    dataset: Dataset,
    watcher: Watcher,
    *,
    earlier: RunRecord | None = None,
) -> Prepared:
    """Whether the data can be trained and measured on, and what the run is made of.

    Args:
        config: the whole configuration, `data.mode` settled.
        checked: what was found out before.
        dataset: images with roles.
        watcher: is told what goes on.
        earlier: the run to go on with.

    Raises:
        UserError: a role is missing, or has too few images, or the earlier run had others.
    """
    fingerprint = dataset.index.manifest.fingerprint
    if earlier is not None and earlier.manifest_fingerprint != fingerprint:
        raise UserError(
            f"data: run {earlier.run_name} began on other images or roles (manifest "
            f"{earlier.manifest_fingerprint[:12]}, now {fingerprint[:12]}); bring them back, or "
            "start a new run with --new"
        )
    check_roles(dataset.index.manifest, config)
    check_labels(dataset.index.manifest, config)
    architecture = replace(checked.architecture, num_classes=len(dataset.index.class_names))
    run_name = _new_name(config) if earlier is None else earlier.run_name
    return Prepared(
        config=config,
        run_name=run_name,
        dataset=dataset,
        confounders=confounders(config, dataset, checked.storage, watcher),
        architecture=architecture,
        flops=step_flops(config, architecture),
        storage=checked.storage,
        spool=checked.spool / run_name,
        tracking_uri=checked.tracking_uri,
        earlier=earlier,
    )


def check_labels(manifest: Manifest, config: Config) -> None:
    """Whether the images have the labels that the head reads.

    Raises:
        UserError: some have none.
    """
    if "loss" in config.mint.inputs and (manifest.label < 0).any():
        raise UserError(
            "mint.inputs = [loss]: the head would read the task loss of external images that have "
            "no label in the pool's classes; take mint.inputs=[logits], or label data.external"
        )


def _new_name(config: Config) -> str:
    return f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def readers_of(config: Config) -> int:
    """Reading processes of each worker, where images are streamed."""
    return config.data.readers or max(1, int(config.cluster.cpus_per_worker) - 1)


def settle_streams(prepared: Prepared, workers: int) -> Prepared:
    """Fix the number of streams: a run that goes on with other workers keeps its order."""
    return replace(prepared, config=with_streams(prepared.config, workers))


def with_streams(config: Config, workers: int) -> Config:
    """The configuration with the number of streams fixed, where images are streamed."""
    if config.data.mode != "streamed" or config.data.streams is not None:
        return config
    streams = stream_count(workers * readers_of(config))
    data = config.data.model_copy(update={"streams": streams})
    return config.model_copy(update={"data": data})


def share(prepared: Prepared) -> tuple[dict[str, Any], Prepared]:
    """Put what the workers need into Ray's object store, which then has the only copy.

    Returns:
        The argument of `worker.open_streams`, and the settings without the images.
    """
    data = put_data(prepared.config, prepared.dataset)
    return data, replace(prepared, dataset=replace(prepared.dataset, images=None))


def put_data(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Put images or where they are into Ray's object store; see `worker.open_streams`."""
    import ray

    codes = codes_of(config, dataset)
    data = {} if codes is None else {"codes": ray.put(codes)}
    if dataset.images is None:
        return data | {
            "source": ray.put(dataset.source),
            "rows": ray.put(dataset.index.rows()),
            "readers": readers_of(config),
        }
    return data | {"images": ray.put(dataset.images), "manifest": ray.put(dataset.index.manifest)}


def worker_rows(config: Config, architecture: Architecture, smallest: int | None = None) -> int:
    """How many workers a micro-batch of D has images for: BatchNorm needs two each, others one.

    Args:
        config: tells batch and micro-batches.
        architecture: tells whether BatchNorm is in it.
        smallest: rows of D in the smallest step, once that is known.

    Raises:
        UserError: not even for one worker.
    """
    rows = (smallest or config.train.batch_size) // config.train.accumulate
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
