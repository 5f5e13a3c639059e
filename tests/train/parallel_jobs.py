"""What one of several processes does for `test_parallel.py`; importable, so that spawn finds it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
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
from amint_ray.evaluation.scores import score
from amint_ray.model.sync_norm import synchronise_norms
from amint_ray.train.loop import SCORES, _write, create_state, train
from amint_ray.train.parallel import replicate
from amint_ray.train.step import SUMS, train_step

STEPS = 9
SGD = {"optimizer": "sgd", "lr": 0.02}
CONFIGS: dict[str, Config] = {
    "vit-adamw": config_of(
        VIT,
        loss=Loss(weighting="ema", ema_decay=0.5),
        train={"optimizer": "adamw", "lr": 1e-3, "clip_grad": 0.5, "weight_decay": 0.05},
    ),
    "vit-gradnorm-activations": config_of(
        VIT, loss=Loss(weighting="gradnorm"), train={**SGD, "checkpoint_activations": True}
    ),
    "vit-detached": config_of(VIT, mint={"detach": True}, train=SGD),
    # One worker computes ten rows in three parts, two workers five in two, three workers at once.
    # Membership from the taps, codes from what the classifier reads.
    "convnext-micro-batches-codes": config_of(
        CONVNEXT,
        train={**SGD, "micro_batch": 4},
        mint={"objective": "both", "keyed": {"bits": 6, "head": "fixed"}},
    ),
    "convnext-float16": config_of(CONVNEXT, train={**SGD, "precision": "float16"}),
    "convnext-plain": config_of(CONVNEXT, loss=Loss(lambda_mint=0.0), train=SGD),
    "resnet-synchronised": config_of(RESNET, train={**SGD, "sync_batchnorm": True}),
}
SHARDED = config_of(
    CONVNEXT,
    train={
        "optimizer": "adamw",
        "lr": 3e-3,
        "schedule": "cosine",
        "epochs": 4,
        "checkpoint_every": 2,
        "parallel": "fsdp",
        "micro_batch": 3,
    },
    drop_rate=0.0,
)


def in_parallel(config: Config, parallel: str) -> Config:
    return config.model_copy(
        update={"train": config.train.model_copy(update={"parallel": parallel})}
    )


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights, put together from all workers' shares."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


def several_steps(config: Config, rank: int, world_size: int) -> dict[str, Any]:
    """The task and the MINT loss of every step, (STEPS, 2), and the weights in the end."""
    streams = streams_of(config, rank=rank, world_size=world_size)
    state = create_state(
        config,
        architecture_of(config),
        streams.steps_per_epoch,
        torch.device("cpu"),
        world_size=world_size,
    )
    model = replicate(state.model, RankContext(Path(), rank, world_size))
    model.train()
    losses: list[list[float]] = []
    for epoch in range(STEPS):
        for batch in streams.train_batches(epoch):
            sums = train_step(model, batch, state.objective, state.update)
            of = dict(zip(SUMS, sums.tolist(), strict=True))
            told = max(of["told_rows"], 1)
            losses.append([of["task_loss"] / of["task_rows"], of["mint_loss"] / told])
        if len(losses) >= STEPS:
            break
    local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    return {"losses": torch.tensor(losses[:STEPS]), "weights": whole(state.model), "local": local}


class Resuming(RankContext):
    """Dies in the third epoch if told so; goes on from the checkpoint that is there."""

    def __init__(self, folder: Path, rank: int, world_size: int, *, dies: bool) -> None:
        super().__init__(folder, rank, world_size)
        folder.mkdir(exist_ok=True)
        self.steps: list[int] = []
        self._checkpoints, self._dies = folder, dies
        self._count = len(list(folder.iterdir()))

    def progress(self, event: Mapping[str, Any]) -> None:
        if event["phase"] == "train":
            self.steps.append(event["step"])
        if self._dies and event.get("epoch") == 3 and event.get("step") == 8:
            raise ConnectionError("the worker died")

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        assert everywhere
        self._count += 1
        folder = self._checkpoints / f"checkpoint_{self._count}"
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder)
        return True

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield latest(self._checkpoints)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder."""
    return max(folder.glob("checkpoint_*"), default=None)


def sharded_run(folder: Path, rank: int, world_size: int, *, dies: bool = False) -> dict[str, Any]:
    """Train with a share of the model on each rank."""
    streams = streams_of(SHARDED, rank=rank, world_size=world_size)
    context = Resuming(folder, rank, world_size, dies=dies)
    try:
        trained = train(SHARDED, architecture_of(SHARDED), streams, context, manifest="roles")
    except ConnectionError:
        return {}
    return {
        "weights": whole(trained.model),
        "history": [
            {k: v for k, v in entry.items() if k != "train/steps_per_second"}
            for entry in trained.history
        ],
        "scores": trained.scores.columns,
        "steps": context.steps,
    }


class Rows(NamedTuple):
    """What a BatchNorm layer is given: numbers about a mean, of a precision, under autocast."""

    mean: float
    spread: float
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    def make(self) -> tuple[torch.Tensor, torch.Tensor]:
        """11 rows of three channels, and what the loss weighs the output by."""
        x, weight = torch.randn(2, 11, 3, 4, 4, generator=torch.Generator().manual_seed(5))
        return (x * self.spread + self.mean).to(self.dtype), weight

    def through(
        self, norm: nn.Module, x: torch.Tensor, weight: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            y = norm(x)
        (y * weight).sum().backward()
        assert x.grad is not None
        return {"y": y.detach(), "gradient": x.grad, **norm.state_dict()}


NORMS = {
    "far-from-zero": Rows(300.0, 0.05),
    "bfloat16": Rows(3.0, 1.0, torch.bfloat16, torch.bfloat16),
    "float32-under-bfloat16": Rows(3.0, 1.0, torch.float32, torch.bfloat16),
    "float16": Rows(30.0, 20.0, torch.float16, torch.float16),
}


def norms(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """This worker's rows through a synchronised layer."""
    found = {}
    for name, rows in NORMS.items():
        norm = synchronise_norms(nn.BatchNorm2d(3), torch.device("cpu"))
        mine = [values[rank::world_size] for values in rows.make()]
        found[name] = rows.through(norm, *mine)
    return found


def full_disks(folder: Path, rank: int, world_size: int) -> dict[str, str]:
    """What this worker is told where one of them cannot write its share, or rank 0 the scores."""
    architecture, device = architecture_of(SHARDED), torch.device("cpu")
    state = create_state(SHARDED, architecture, 1, device, world_size=world_size)
    scores = score(state.model, [], device)
    said = {}
    for what, bad_rank in (("share", 1), ("scores", 0)):
        mine = folder / f"{what}-of-{rank}"
        (mine / SCORES if what == "scores" else mine).mkdir(parents=True)
        if what == "share" and rank == bad_rank:
            mine.rmdir()
            mine.touch()
        try:
            _write(state, {}, architecture, scores if what == "scores" else None, None, mine)
        except OSError as error:
            said[what] = str(error)
    return said


def _jobs(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{name}-{parallel}": several_steps(in_parallel(config, parallel), rank, world_size)
        for name, config in CONFIGS.items()
        for parallel in ("ddp", "fsdp")
    }
    found["straight"] = sharded_run(folder / f"straight-{world_size}", rank, world_size)
    found["norms"] = norms(rank, world_size)
    found["full disks"] = full_disks(folder / f"full-{world_size}", rank, world_size)
    if world_size == 3:
        sharded_run(folder / "broken", rank, world_size, dies=True)
        if rank == 0:
            for fewer in (3, 2, 1):
                shutil.copytree(folder / "broken", folder / f"broken-{fewer}")
        distributed.barrier()
    found["resumed"] = sharded_run(folder / f"broken-{world_size}", rank, world_size)
    return found


def main(rank: int, world_size: int, folder: Path) -> None:
    """A worker's life; the three must have lived before the two do."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # A file to meet at: a port found free may be taken by the time it is used.
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-{world_size}",
        rank=rank,
        world_size=world_size,
    )
    try:
        torch.save(_jobs(rank, world_size, folder), folder / f"{world_size}-{rank}.pt")
    finally:
        distributed.destroy_process_group()
