"""What one of several processes does for `test_ranks.py`; importable, so that spawn finds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from training_setup import (
    CONVNEXT,
    RESNET,
    VIT,
    RankContext,
    architecture_of,
    config_of,
    streams_of,
)

from amint_ray.config.schema import Config, Loss
from amint_ray.contracts import Role
from amint_ray.evaluation.scores import score
from amint_ray.train.loop import _gather, _monitor, create_state, epoch_metrics, train
from amint_ray.train.step import SUMS

# Nine rows of D over two ranks: five and four; the withheld among them fall as they will.
TRAININGS: dict[str, Config] = {
    "convnext-initial": config_of(
        CONVNEXT, loss=Loss(weighting="initial"), train={"optimizer": "sgd", "lr": 0.02}
    ),
    "vit-ema": config_of(
        VIT,
        loss=Loss(weighting="ema", ema_decay=0.5, lambda_mint=0.5),
        train={"optimizer": "sgd", "lr": 0.02, "external_ratio": 0.6},
    ),
    "convnext-plain": config_of(
        CONVNEXT, loss=Loss(lambda_mint=0.0), train={"optimizer": "sgd", "lr": 0.02}
    ),
}
BATCH_NORM = config_of(RESNET, train={"optimizer": "sgd", "lr": 0.05})
UNEVEN_SUMS = [[6.0, 3.0, 5.0, 2.0, 8.0], [1.0, 1.0, 4.0, 7.0, 6.0]]
assert len(SUMS) == 5


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
        "scores": vars(trained.scores),
    }


def untrained_scores(context: RankContext) -> dict[str, Any]:
    """The gathered table and the monitored values of a fresh model."""
    config = TRAININGS["convnext-initial"]
    streams = streams_of(config, rank=context.rank, world_size=context.world_size)
    model = create_state(config, architecture_of(config), 1, context.device).model
    return {
        "monitor": _monitor(model, streams, context),
        "scores": vars(
            _gather(score(model, streams.score_batches(list(Role)), context.device), context)
        ),
    }


def _jobs(context: RankContext) -> dict[str, Any]:
    sums = torch.tensor(UNEVEN_SUMS[context.rank], dtype=torch.float64)
    return {
        "epoch_metrics": epoch_metrics(sums),
        "untrained": untrained_scores(context),
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
        torch.save(_jobs(context), folder / f"rank_{rank}.pt")
    finally:
        distributed.destroy_process_group()
