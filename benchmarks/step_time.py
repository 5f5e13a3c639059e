"""Time, arithmetic and memory of the joint step beside the audited-only step.

Needs torch and timm alone. `python -m benchmarks.step_time --quick --json` ends within a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from amint_ray.contracts import Batch
from amint_ray.model.joint import Architecture, AuditedModel, plan
from amint_ray.model.mint_head import HeadKind, HeadSpec
from amint_ray.model.placement import PLACEMENTS
from amint_ray.train.allocator import keep_freed_memory
from amint_ray.train.objective import Objective
from amint_ray.train.step import train_step
from amint_ray.train.update import Update

CLASSES = 10
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {}),
}
WAYS = ("authors", "concat", "early_exit", "detached", "views")
QUICK_ROWS = {"vit": 4, "resnet18": 8, "resnet50": 4}
QUICK_WAYS = ("authors", "concat", "early_exit", "detached")
Step = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One way of taking the joint step, in units of the audited-only step on the same D.

    Attributes:
        model: key of `MODELS`.
        placement: of the taps.
        way: `authors`: D and E in two full passes. `concat`: one pass, nothing dropped.
            `early_exit`: the product's step. `detached`: the same with `mint.detach`. `views`: the
            product's step where the task is augmented, D once more in plain rows.
        time_ratio: median over repeats; each repeat divides by its own audited-only step.
        flop_ratio: counted, the head's included.
        over_floor: time_ratio / flop_ratio.
        seconds: median.
        kept_mib: what the forward pass keeps for the backward pass, parameters not counted: nearly
            all of a step's peak of memory.
        head_ratio: time of the head alone, forward and backward, on its rows.
    """

    model: str
    placement: str
    way: str
    time_ratio: float
    flop_ratio: float
    over_floor: float
    seconds: float
    kept_mib: float
    head_ratio: float


def measure(
    model: str, placement: str, ways: Sequence[str], *, rows: int, repeats: int, head: HeadSpec
) -> list[Row]:
    """All ways of one cell in turn, so that a slow moment of the machine hits them alike."""
    name, options = MODELS[model]
    architecture = plan(
        name,
        options=options,
        num_classes=CLASSES,
        input_shape=(3, 32, 32),
        taps=[placement],
        head=head,
    )
    steps = {"task": build("task", architecture, rows)}
    steps |= {way: build(way, architecture, rows) for way in ways}
    steps["head"] = _head_alone(architecture, rows)
    times: dict[str, list[float]] = {way: [] for way in steps}
    counts = {way: count(step) for way, step in steps.items()}  # the first step, not timed
    flops = {way: counted for way, (counted, _) in counts.items()}
    for _ in range(repeats):
        for way, step in steps.items():
            times[way].append(_timed(step))

    def ratio(way: str) -> float:
        return statistics.median(
            t / task for t, task in zip(times[way], times["task"], strict=True)
        )

    return [
        Row(
            model=model,
            placement=placement,
            way=way,
            time_ratio=ratio(way),
            flop_ratio=flops[way] / flops["task"],
            over_floor=ratio(way) * flops["task"] / flops[way],
            seconds=statistics.median(times[way]),
            kept_mib=counts[way][1] / 2**20,
            head_ratio=ratio("head"),
        )
        for way in ways
    ]


def build(
    way: str,
    architecture: Architecture,
    rows: int,
    device: str = "cpu",
    *,
    precision: str = "float32",
    compiled: bool = False,
) -> Step:
    """A whole step, update included, of one way on `rows` images of D and as many of E."""
    torch.manual_seed(0)
    if way == "concat":
        architecture = replace(architecture, early_exit=False)
    if way == "detached":
        architecture = replace(architecture, detach=True)
    with torch.device(device):
        model = AuditedModel(architecture).train()
        batch = _batch(architecture, rows, views=way == "views")
    if way == "task":
        model.head.requires_grad_(False)
    if compiled:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, foreach=True)
    update = Update(model, optimizer, precision=precision)
    if way in ("task", "authors"):
        losses = _task_losses if way == "task" else _authors_losses

        def plain() -> None:
            with update.autocast():
                loss = losses(model, batch)
            update.backward(loss)
            update.step()

        return plain
    objective = Objective()

    def joint() -> None:
        train_step(model, batch, objective, update)

    return joint


def count(step: Step) -> tuple[int, int]:
    """FLOPs of one more step, and bytes that its forward pass keeps for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        step()
    return int(counter.get_total_flops()), sum(kept.values())


def _batch(architecture: Architecture, rows: int, *, views: bool) -> Batch:
    """Noise: D, D once more if `views`, E."""
    n = rows * (3 if views else 2)
    read = 2 * rows
    return Batch(
        images=torch.randn(n, *architecture.input_shape),
        labels=torch.arange(n) % CLASSES,
        n_task=rows,
        head_from=rows if views else 0,
        membership=(torch.arange(read) < rows).float(),
        told=torch.ones(read, dtype=torch.bool),
        sample_id=np.arange(n).astype(np.str_),
        task_per_worker=rows,
        told_per_worker=read,
    )


def _task_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Plain training on D."""
    logits, _ = model(batch.images[: batch.n_task], mint=False)
    return F.cross_entropy(logits, batch.labels[: batch.n_task])


def _authors_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """As the notebooks have it: D, then E, each through the whole backbone."""
    d, e = batch.images[: batch.n_task], batch.images[batch.n_task :]
    logits, of_d = model(d)
    _, of_e = model(e)
    task = F.cross_entropy(logits, batch.labels[: batch.n_task])
    mint = F.binary_cross_entropy_with_logits(torch.cat([of_d, of_e]), batch.membership)
    return task + mint


def _head_alone(architecture: Architecture, rows: int) -> Step:
    """The head's forward and backward pass on activations that ask for their gradient."""
    model = AuditedModel(architecture)
    activations = [
        torch.randn(2 * rows, *tap.shape, requires_grad=True) for tap in architecture.taps
    ]
    membership = (torch.arange(2 * rows) < rows).float()

    def step() -> None:
        loss = F.binary_cross_entropy_with_logits(model.head(activations), membership)
        loss.backward()  # type: ignore[no-untyped-call]
        for activation in activations:
            activation.grad = None

    return step


def _timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or with `--json` one document, on stdout; progress on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small batches, few repeats")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--head", choices=get_args(HeadKind), default="mlp")
    parser.add_argument("--rows", type=int, help="images of D in a step (default 64, quick 4 or 8)")
    parser.add_argument("--repeats", type=int, help="of each way (default 7, quick 3)")
    parser.add_argument("--threads", type=int, help="torch's threads (default all cores)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    repeats = arguments.repeats or (3 if arguments.quick else 7)
    found: list[Row] = []
    for model in arguments.models:
        for placement in PLACEMENTS:
            print(f"step_time: {model} {placement}", file=sys.stderr)
            found += measure(
                model,
                placement,
                QUICK_WAYS if arguments.quick else WAYS,
                rows=arguments.rows or (QUICK_ROWS[model] if arguments.quick else 64),
                repeats=repeats,
                head=HeadSpec(kind=arguments.head),
            )
    if arguments.json:
        json.dump({"rows": [asdict(row) for row in found]}, sys.stdout, indent=2)
        print()
        return 0
    print("| model | placement | way | time | FLOPs | time / FLOPs | s | kept MiB | head |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row.model} | {row.placement} | {row.way} | {row.time_ratio:.2f} "
            f"| {row.flop_ratio:.2f} | {row.over_floor:.2f} | {row.seconds:.3f} "
            f"| {row.kept_mib:.0f} | {row.head_ratio:.3f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
