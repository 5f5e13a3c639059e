"""The blocks that a backbone repeats, and computing their insides twice to save memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def blocks(backbone: nn.Module) -> list[str]:
    """Names of the innermost modules that stand in a row with others of their class.

    Transformer blocks, residual blocks, dense layers: whatever is repeated in a `Sequential`,
    `ModuleList` or `ModuleDict` and repeats nothing itself.
    """
    repeated = []
    for name, container in backbone.named_modules():
        if isinstance(container, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            kinds = [type(child) for child in container.children()]
            repeated += [
                f"{name}.{child_name}"
                for child_name, child in container.named_children()
                if kinds.count(type(child)) > 1 and _has_layers(child)
            ]
    return [name for name in repeated if not any(n.startswith(f"{name}.") for n in repeated)]


def _has_layers(module: nn.Module) -> bool:
    """Whether it is made of others that have weights, as a block is and a normalisation is not."""
    return any(True for child in module.children() for _ in child.parameters())


def checkpoint_blocks(backbone: nn.Module, taps: Sequence[str] = ()) -> None:
    """From now on keep only the blocks' inputs for the backward pass, and run them again in it.

    The blocks' own hooks stay outside of what is run again.

    Args:
        backbone: a timm model.
        taps: names of the tapped modules; a block around one is left as it is: rows leave in it.
    """
    for name in blocks(backbone):
        if any(tap.startswith(f"{name}.") for tap in taps):
            continue
        block = backbone.get_submodule(name)
        block.forward = functools.partial(_checkpointed, block, block.forward)


def _checkpointed(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return forward(*args, **kwargs)
    # What torch.compile makes of the second run does not touch the statistics.
    frozen: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        frozen["context_fn"] = lambda: (contextlib.nullcontext(), frozen_statistics(block))
    return checkpoint(
        forward,
        # A caller may go on filling the list that it gave (DenseNet does).
        *(list(arg) if isinstance(arg, list) else arg for arg in args),
        use_reentrant=False,
        **frozen,
        **kwargs,
    )


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """A training pass within leaves BatchNorm's running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm, norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    for norm, mean, var, count in kept:
        norm.running_mean = None if mean is None else mean.clone()
        norm.running_var = None if var is None else var.clone()
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, mean, var, count in kept:
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count
