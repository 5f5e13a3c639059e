"""Several small models on one GPU: stacked by `torch.func`, in processes side by side, or in turn.

Needs torch and timm alone. `python -m benchmarks.stacked_shadows` trains K models of the same kind
on batches of their own: the joint step's forward and backward passes, and SGD. Stacked they are one
call of `vmap` over their weights. In processes they share the card as shadow models of
`amint attack` do (`attack.gpus`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, stack_module_state, vmap

from amint_ray.model.joint import Architecture, AuditedModel, plan
from amint_ray.model.mint_head import HeadSpec

_HEAD = HeadSpec("conv")
_MODELS: dict[str, dict[str, Any]] = {
    # The recipe `digits`.
    "convnext_8px": {
        "backbone": "convnext_atto",
        "options": {
            "patch_size": 1,
            "depths": [1, 1, 1, 1],
            "dims": [32, 64, 96, 128],
            "kernel_sizes": 3,
        },
        "input_shape": (1, 8, 8),
        "taps": ("stages.1", "stages.2"),
        "rows": 32,
    },
    # The recipe `cifar10_vit`.
    "vit_32px": {
        "backbone": "vit_tiny_patch16_224",
        "options": {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 12, "num_heads": 8},
        "input_shape": (3, 32, 32),
        "taps": ("blocks.7",),
        "rows": 64,
    },
}


def architecture_of(name: str) -> tuple[Architecture, int]:
    """The architecture, and its rows of D in a step (as many of E)."""
    asked = dict(_MODELS[name])
    rows: int = asked.pop("rows")
    head = HeadSpec("tokens") if name.startswith("vit") else _HEAD
    return plan(**asked, num_classes=10, head=head), rows


def loss_of(
    model: torch.nn.Module, weights: Any, images: torch.Tensor, labels: torch.Tensor, rows: int
) -> torch.Tensor:
    """The joint loss of one model on its own batch: D, then as much of E."""
    logits, membership = functional_call(model, weights, (images,), {"n_task": rows})
    told = torch.cat([torch.ones_like(membership[:rows]), torch.zeros_like(membership[rows:])])
    return F.cross_entropy(logits, labels) + F.binary_cross_entropy_with_logits(membership, told)


def steps(name: str, models: int, device: str, *, stacked: bool) -> Callable[[], None]:
    """One step of each of so many models."""
    architecture, rows = architecture_of(name)
    torch.manual_seed(0)
    made = [AuditedModel(architecture).to(device).train() for _ in range(models)]
    shape = architecture.input_shape
    images = torch.randn(models, 2 * rows, *shape, device=device)
    labels = torch.randint(10, (models, rows), device=device)
    base = made[0]

    def one(weights: Any, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return loss_of(base, weights, image, label, rows)

    if not stacked:
        optimisers = [torch.optim.SGD(model.parameters(), 1e-3) for model in made]

        def in_turn() -> None:
            for i, model in enumerate(made):
                optimisers[i].zero_grad()
                logits, membership = model(images[i], n_task=rows)
                assert membership is not None
                told = torch.cat(
                    [torch.ones_like(membership[:rows]), torch.zeros_like(membership[rows:])]
                )
                loss = F.cross_entropy(logits, labels[i])
                loss = loss + F.binary_cross_entropy_with_logits(membership, told)
                loss.backward()  # type: ignore[no-untyped-call]
                optimisers[i].step()

        return in_turn
    weights, _ = stack_module_state(made)
    gradient = vmap(grad(one))

    @torch.no_grad()
    def together() -> None:
        found = gradient(weights, images, labels)
        for key, value in weights.items():
            value -= 1e-3 * found[key]

    return together


def seconds(step: Callable[[], None], device: str, repeats: int) -> float:
    """Median of some steps, after three that do not count."""
    taken = []
    for _ in range(repeats + 3):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[3:])


def _alone(name: str, device: str, repeats: int, together: Any, result: Any) -> None:
    """One process of several: all begin at the same time."""
    torch.set_num_threads(1)
    step = steps(name, 1, device, stacked=False)
    seconds(step, device, 1)
    together.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    result.put((time.perf_counter() - started) / repeats)


def in_processes(name: str, models: int, device: str, repeats: int) -> float:
    """Seconds in which each of so many processes does a step of its one model."""
    context = multiprocessing.get_context("spawn")
    together, result = context.Barrier(models), context.Queue()
    arguments = (name, device, repeats, together, result)
    workers = [context.Process(target=_alone, args=arguments) for _ in range(models)]
    for worker in workers:
        worker.start()
    found: list[float] = [result.get() for _ in workers]
    for worker in workers:
        worker.join()
    return max(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run, and print JSON: seconds in which every model has done a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--kinds", nargs="+", choices=list(_MODELS), default=list(_MODELS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in options.kinds:
        side_by_side = in_processes(name, options.processes, device, 5 * options.repeats)
        for models in options.models:
            row = {
                "kind": name,
                "models": models,
                "in_turn": seconds(
                    steps(name, models, device, stacked=False), device, options.repeats
                ),
                "stacked": seconds(
                    steps(name, models, device, stacked=True), device, options.repeats
                ),
                "processes": side_by_side * models / options.processes,
            }
            row["in_turn_over_stacked"] = row["in_turn"] / row["stacked"]
            row["processes_over_stacked"] = row["processes"] / row["stacked"]
            found.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    json.dump({"device": device, "torch": torch.__version__, "rows": found}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
