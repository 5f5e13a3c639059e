"""Taps: reading the outputs of inner modules, and letting E's rows leave after the last one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from amint_ray.contracts import UserError

Layout = Literal["NCHW", "NHWC", "NLC"]


@dataclass(frozen=True)
class Tap:
    """One tapped module's output.

    Attributes:
        name: the module's dotted name in the backbone.
        shape: of one sample, without the batch dimension.
        layout: order of the dimensions, N being the batch.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout


class TapReader:
    """Forward hooks on the tapped modules.

    While a forward pass runs, `keep` says how many leading rows go on behind the last tap; the head
    still gets all of them. Outside a pass it is None and the hooks change nothing. What was read is
    handed over once by `take` and not kept.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        self.keep: int | None = None
        self._names = tuple(names)
        self._read: dict[str, torch.Tensor] = {}
        for name in self._names:
            module = backbone.get_submodule(name)
            module.register_forward_hook(_Hook(self, name, last=name == self._names[-1]))

    def record(self, name: str, output: torch.Tensor) -> None:
        """Called by the hooks."""
        self._read[name] = output

    def take(self) -> list[torch.Tensor]:
        """The activations of the pass that just ended, in the order of the names."""
        read, self._read = self._read, {}
        return [read[name] for name in self._names]


class _Hook:
    """A picklable, deep-copyable forward hook (a closure would tie a copied model to the first)."""

    def __init__(self, reader: TapReader, name: str, *, last: bool) -> None:
        self._reader, self._name, self._last = reader, name, last

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        self._reader.record(self._name, output)
        if self._last and self._reader.keep is not None:
            return output[: self._reader.keep]
        return None


def probe_taps(
    backbone: nn.Module, names: Sequence[str], input_shape: tuple[int, int, int]
) -> tuple[tuple[Tap, ...], bool]:
    """Run the backbone once to learn what the taps give and whether rows can leave after the last.

    Args:
        backbone: any device; on `meta` it costs nothing.
        names: tapped modules.
        input_shape: (channels, height, width).

    Returns:
        The taps in order of execution, and whether early exit works: in a backbone where a later
        module also reads something computed before the last tap, the shapes no longer match.

    Raises:
        UserError: no such module, one that is not run or run twice, an output that is not one
            tensor of features, or an input size that the backbone does not take.
    """
    seen: list[tuple[str, Any]] = []
    known = [name for name, _ in backbone.named_modules() if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            choice = near or [name for name, _ in backbone.named_children()]
            raise UserError(
                f"mint.taps = [{', '.join(names)}]: the backbone has no module {name!r}; "
                f"{'near names' if near else 'its modules begin with'}: {', '.join(choice)}"
            )
    handles = [
        backbone.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.append((name, output))
        )
        for name in names
    ]
    # Three rows, of which two go on: one row would broadcast where shapes should have clashed.
    rows, kept = 3, 2
    device = next(backbone.parameters()).device
    images = torch.zeros(rows, *input_shape, device=device)
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            backbone(images)
        taps = _describe(backbone, names, seen, rows)
        for handle in handles:
            handle.remove()
        reader = TapReader(backbone, [tap.name for tap in taps])
        reader.keep = kept
        try:
            with torch.no_grad():
                early_exit = len(backbone(images)) == kept
        except RuntimeError:
            early_exit = False
        return taps, early_exit
    except (RuntimeError, AssertionError, ValueError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.image_size = {input_shape[1]}: the backbone cannot take such images: {line}"
        ) from error
    finally:
        backbone.train(was_training)


def _describe(
    backbone: nn.Module, names: Sequence[str], seen: list[tuple[str, Any]], rows: int
) -> tuple[Tap, ...]:
    order = [name for name, _ in seen]
    for name in names:
        if order.count(name) != 1:
            raise UserError(
                f"mint.taps: module {name!r} runs {order.count(name)} times in a forward pass; "
                "a tap must run exactly once"
            )
    taps = []
    for name, output in seen:
        if not isinstance(output, torch.Tensor) or output.ndim not in (3, 4) or len(output) != rows:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UserError(
                f"mint.taps: module {name!r} gives {got} for {rows} images; a tap must give "
                "feature maps (4 dimensions) or tokens (3 dimensions)"
            )
        taps.append(Tap(name, tuple(output.shape[1:]), _layout(backbone, output)))
    return tuple(taps)


def _layout(backbone: nn.Module, output: torch.Tensor) -> Layout:
    if output.ndim == 3:
        return "NLC"
    # timm's channels-last families (Swin, MetaFormer …) say so in this attribute.
    return "NHWC" if str(getattr(backbone, "output_fmt", "NCHW")) == "NHWC" else "NCHW"
