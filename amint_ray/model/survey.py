"""What can be tapped in a backbone: one pass on the meta device, every module watched."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from amint_ray.contracts import UserError, first_line

Layout = Literal["NCHW", "NHWC", "NLC"]

ROWS = 3
"""Images in a probing pass: not 1, which would broadcast where shapes should clash."""


@dataclass(frozen=True)
class Site:
    """One module of a backbone as a place to read from.

    Attributes:
        name: the module's dotted name.
        kind: its class.
        shape: of its output for one image; () where the output is no tensor of features.
        layout: order of the output's dimensions, N being the batch.
        prefix: class and register tokens in front of the image's own (`NLC`).
        depth: share of the backbone's FLOPs that are done when the module has run, 0 to 1.
        fault: why it cannot be tapped, to be read after the module's name; "" where it can.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    layout: Layout
    prefix: int
    depth: float
    fault: str


def survey(backbone: nn.Module, input_shape: tuple[int, int, int]) -> list[Site]:
    """Every module that runs, in the order in which they finish.

    A module that runs several times appears once, where it first finished.

    Args:
        backbone: any device; on `meta` the pass costs no memory and hardly any time.
        input_shape: (channels, height, width).

    Raises:
        UserError: the backbone does not take such images, or gives no class logits.
    """
    outputs, total = _watch(backbone, input_shape)
    runs = Counter(output.name for output in outputs)
    first = {output.name: output for output in reversed(outputs)}
    order = sorted(first.values(), key=outputs.index)
    sites = [_site(backbone, output, runs[output.name], total) for output in order]
    return _settled(sites, backbone, input_shape)


def _watch(backbone: nn.Module, input_shape: tuple[int, int, int]) -> tuple[list[_Output], int]:
    """What every module gave in one pass, in the order in which they finished, and all FLOPs."""
    seen: list[_Output] = []
    with _without_gradients(backbone), FlopCounterMode(display=False) as counter:

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                value = tapped(output)
                version = getattr(value, "_version", 0)
                seen.append(_Output(name, module, value, version, counter.get_total_flops()))

            return hook

        handles = [m.register_forward_hook(note(n)) for n, m in backbone.named_modules() if n]
        try:
            logits = run(backbone, input_shape, training=False)
        finally:
            for handle in handles:
                handle.remove()
        total = max(counter.get_total_flops(), 1)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UserError("model: with these options the backbone gives no class logits")
    return seen, total


def tapped(output: Any) -> Any:
    """What a tap reads of a module's output: the tensor, or the first of a tuple (MViTv2's)."""
    return output[0] if isinstance(output, tuple) and output else output


def run(backbone: nn.Module, input_shape: Sequence[int], *, training: bool) -> Any:
    """The backbone's output for `ROWS` black images; it is left in the mode that it had.

    Raises:
        UserError: the backbone does not take such images.
    """
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.train(training)
    try:
        # Dropout on the meta device would move the random state of the CPU.
        with torch.random.fork_rng(devices=[]):
            return backbone(torch.zeros(ROWS, *input_shape, device=device))
    except Exception as error:  # whatever a backbone makes of a size that is not its own
        raise UserError(
            f"data.image_size = {input_shape[-1]}: the backbone cannot take such images with these "
            f"options: {first_line(error)}"
        ) from error
    finally:
        backbone.train(was_training)


@contextlib.contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """`no_grad`, and no parameter that asks for one: the FLOP counter trips over such arguments."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@dataclass(frozen=True, eq=False)
class _Output:
    """What a module gave, how often that had been written to, and the FLOPs done by then."""

    name: str
    module: nn.Module
    value: Any
    version: int
    flops: int


def _site(backbone: nn.Module, output: _Output, runs: int, total: int) -> Site:
    value = output.value
    fault = ""
    shape: tuple[int, ...] = ()
    if runs > 1:
        fault = f"runs {runs} times in a forward pass; a tap must run exactly once"
    elif not isinstance(value, torch.Tensor) or value.ndim not in (3, 4) or len(value) != ROWS:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        fault = (
            f"gives {got} for {ROWS} images; a tap must give feature maps (4 dimensions) or "
            "tokens (3 dimensions)"
        )
    elif value._version != output.version:
        # The head would see D's rows after the overwriting and E's, which left, before it.
        fault = (
            "gives what a later module overwrites in place; tap that one, or the block around both"
        )
    if isinstance(value, torch.Tensor) and len(value) == ROWS:
        shape = tuple(value.shape[1:])
    layout = _layout(backbone, output.module, shape)
    return Site(
        name=output.name,
        kind=type(output.module).__name__,
        shape=shape,
        layout=layout,
        prefix=_prefix(backbone, shape) if layout == "NLC" else 0,
        depth=output.flops / total,
        fault=fault,
    )


def _layout(backbone: nn.Module, module: nn.Module, shape: tuple[int, ...]) -> Layout:
    """Images are square, and so are their maps: the dimension that differs is the channels'."""
    if len(shape) != 3:
        return "NLC"
    if shape[0] != shape[1] and shape[1] == shape[2]:
        return "NCHW"
    if shape[0] == shape[1] and shape[1] != shape[2]:
        return "NHWC"
    # A map that is not square, or as many channels as pixels a side. A layer that works on the last
    # dimension says which one that is; otherwise timm's channels-last families (Swin, MetaFormer …)
    # say so of the whole network. (timm's LayerNorm2d is a LayerNorm that works on the first.)
    if isinstance(module, nn.Linear | nn.LayerNorm) and not type(module).__name__.endswith("2d"):
        return "NHWC"
    return "NHWC" if str(getattr(backbone, "output_fmt", "NCHW")) == "NHWC" else "NCHW"


def _settled(
    sites: list[Site], backbone: nn.Module, input_shape: tuple[int, int, int]
) -> list[Site]:
    """Where channels and side are equal, look at larger images: the channels are what stays."""
    if not any(len(site.shape) == 3 and len(set(site.shape)) == 1 for site in sites):
        return sites
    channels, height, width = input_shape
    try:
        outputs, _ = _watch(backbone, (channels, 2 * height, 2 * width))
    except UserError:  # it takes no other size
        return sites
    larger = {o.name: tuple(o.value.shape[1:]) for o in outputs if hasattr(o.value, "shape")}

    def layout(site: Site) -> Layout:
        if len(site.shape) == 3 and len(set(site.shape)) == 1:
            match [a == b for a, b in zip(site.shape, larger.get(site.name, ()), strict=False)]:
                case [True, False, False]:
                    return "NCHW"
                case [False, False, True]:
                    return "NHWC"
        return site.layout

    return [replace(site, layout=layout(site)) for site in sites]


def _prefix(backbone: nn.Module, shape: tuple[int, ...]) -> int:
    """Class and register tokens of a sequence: what timm counts, if a square of patches is left."""
    prefix = int(getattr(backbone, "num_prefix_tokens", 0) or 0)
    patches = shape[0] - prefix if shape else 0
    if shape and shape[0] == getattr(getattr(backbone, "patch_embed", None), "num_patches", None):
        return 0  # the prefix is not there yet, or not any more
    return prefix if patches > 0 and math.isqrt(patches) ** 2 == patches else 0


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operations run, with the arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a for a in pytree.tree_leaves((args, kwargs)) if not isinstance(a, torch.Tensor)]
        self.operations.append((str(func), repr(plain)))
        return func(*args, **(kwargs or {}))


def modes_agree(backbone: nn.Module, input_shape: tuple[int, int, int]) -> bool:
    """Whether the backbone computes the same in training and in evaluation mode.

    Without BatchNorm, dropout and the like, both modes run the same operations.
    """
    operations: list[list[tuple[str, str]]] = []
    for training in (True, False):
        with _without_gradients(backbone), _Record() as record:
            run(backbone, input_shape, training=training)
        operations.append(record.operations)
    return operations[0] == operations[1]
