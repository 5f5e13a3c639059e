"""What one of several processes does for `test_ranks.py`; importable, so that spawn finds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from training_setup import (
    CONVNEXT,
    RESNET,
    VIT,
    Poisoned,
    RankContext,
    architecture_of,
    config_of,
    fresh_state,
    streams_of,
)

from amint_ray.config.schema import Config, Evaluation, Loss
from amint_ray.contracts import Role
from amint_ray.evaluation.scores import score
from amint_ray.train.loop import create_state, train
from amint_ray.train.monitor import gather, monitor
from amint_ray.train.parallel import replicate
from amint_ray.train.step import train_step

# Nine rows of D over two ranks: five and four (and ten in the last step); the withheld among them
# fall as they will.
TRAININGS: dict[str, Config] = {
    "convnext-initial": config_of(
        CONVNEXT, loss=Loss(weighting="initial"), train={"optimizer": "sgd", "lr": 0.02}
    ),
    "vit-ema": config_of(
        VIT,
        loss=Loss(weighting="ema", ema_decay=0.5, lambda_mint=0.5),
        train={"optimizer": "sgd", "lr": 0.02, "external_ratio": 0.6},
    ),
    "convnext-gradnorm": config_of(
        CONVNEXT,
        loss=Loss(weighting="gradnorm", ema_decay=0.5, warmup_epochs=1.5),
        train={"optimizer": "sgd", "lr": 0.02},
    ),
    # Micro-batches of three, two and two rows of D, each in two views, and some without E.
    "vit-accumulate": config_of(
        VIT,
        loss=Loss(weighting="uncertainty", uncertainty_lr=0.3),
        data={"augment": "crop_flip"},
        train={"optimizer": "sgd", "lr": 0.02, "accumulate": 2, "external_ratio": 0.3},
    ),
    "convnext-plain": config_of(
        CONVNEXT, loss=Loss(lambda_mint=0.0), train={"optimizer": "sgd", "lr": 0.02}
    ),
}
BATCH_NORM = config_of(RESNET, train={"optimizer": "sgd", "lr": 0.05})
SELECT = Evaluation(select_images=15, min_false_positives=0, threshold_fpr=0.4, fprs=(0.3,))
POISONED = config_of(CONVNEXT, train={"epochs": 3, "checkpoint_every": 1})
BAD_STEP, BAD_RANK = 5, 1


def losses_of_every_step(config: Config, context: RankContext) -> dict[str, Any]:
    """Train; what came of it, as plain values and tensors."""
    streams = streams_of(config, rank=context.rank, world_size=context.world_size)
    trained = train(config, architecture_of(config), streams, context)
    return {
        "history": [
            {k: v for k, v in entry.items() if k != "train/steps_per_second"}
            for entry in trained.history
        ],
        "weights": {k: v.clone() for k, v in trained.model.state_dict().items()},
        "scores": trained.scores.columns,
    }


def untrained_scores(context: RankContext) -> dict[str, Any]:
    """The gathered table and the monitored values of a fresh model."""
    config = TRAININGS["convnext-initial"]
    streams = streams_of(config, rank=context.rank, world_size=context.world_size)
    model = create_state(config, architecture_of(config), 1, context.device).model
    return {
        "monitor": monitor(model, streams, context),
        "select": monitor(model, streams, context, select=SELECT),
        "scores": gather(
            score(model, streams.score_batches(list(Role)), context.device), context
        ).columns,
    }


def message_of_a_bad_step(context: RankContext) -> str:
    """What a rank says when one of them meets a loss that is not finite."""
    streams = Poisoned(
        POISONED,
        BAD_STEP,
        float("nan"),
        bad_rank=BAD_RANK,
        rank=context.rank,
        world_size=context.world_size,
    )
    try:
        train(POISONED, architecture_of(POISONED), streams, context)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def exchanges(accumulate: int, context: RankContext) -> int:
    """How often gradients go round in an epoch."""
    config = config_of(CONVNEXT, train={"optimizer": "sgd", "accumulate": accumulate})
    streams = streams_of(config, rank=context.rank, world_size=context.world_size)
    state = fresh_state(config)
    model = replicate(state.model, context)
    assert isinstance(model, DistributedDataParallel)
    sent: list[int] = []
    model.register_comm_hook(
        sent, lambda sent, bucket: sent.append(bucket.index()) or allreduce_hook(None, bucket)
    )
    for batch in streams.train_batches(0):
        train_step(model, batch, state.objective, state.update)
    return len(sent)


def _jobs(context: RankContext, folder: Path) -> dict[str, Any]:
    return {
        "untrained": untrained_scores(context),
        "exchanges": [exchanges(accumulate, context) for accumulate in (1, 2)],
        "message": message_of_a_bad_step(
            RankContext(folder / "poisoned", context.rank, context.world_size)
        ),
        "batch_norm": losses_of_every_step(BATCH_NORM, context),
        **{name: losses_of_every_step(config, context) for name, config in TRAININGS.items()},
    }


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # A file to meet at: a port found free may be taken by the time it is used.
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    try:
        context = RankContext(folder / "checkpoint", rank, world_size)
        torch.save(_jobs(context, folder), folder / f"rank_{rank}.pt")
    finally:
        distributed.destroy_process_group()
