"""Taps: reading the outputs of inner modules, and letting E's rows leave after the last one."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from amint_ray.contracts import UserError, first_line

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
    """Forward hooks on the tapped modules; outside `reading` they change and keep nothing."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        self._active = False
        self._keep: int | None = None
        self._names = tuple(names)
        self._read: dict[str, torch.Tensor] = {}
        self._handles = [
            backbone.get_submodule(name).register_forward_hook(
                _Hook(self, name, last=name == self._names[-1])
            )
            for name in self._names
        ]

    @contextlib.contextmanager
    def reading(self, keep: int | None) -> Iterator[list[torch.Tensor]]:
        """Read the taps of the forward pass that runs within.

        Args:
            keep: how many leading rows go on behind the last tap; None: all. The head still gets
                every row.

        Yields:
            A list that is filled with the activations, in the order of the names, at the end.
        """
        activations: list[torch.Tensor] = []
        self._active, self._keep = True, keep
        try:
            yield activations
            activations.extend(self._read[name] for name in self._names)
        finally:
            self._active, self._keep, self._read = False, None, {}

    def pass_on(self, name: str, output: torch.Tensor, *, last: bool) -> torch.Tensor | None:
        """Called by the hooks: keep the output, and say what goes on instead of it."""
        if not self._active:
            return None
        self._read[name] = output
        return output[: self._keep] if last and self._keep is not None else None

    def remove(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self._handles:
            handle.remove()


class _Hook:
    """A picklable, deep-copyable forward hook (a closure would tie a copied model to the first)."""

    def __init__(self, reader: TapReader, name: str, *, last: bool) -> None:
        self._reader, self._name, self._last = reader, name, last

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return self._reader.pass_on(self._name, output, last=self._last)


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
    known = [name for name, _ in backbone.named_modules() if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            choice = near or [name for name, _ in backbone.named_children()]
            raise UserError(
                f"mint.taps = [{', '.join(names)}]: the backbone has no module {name!r}; "
                f"{'near names' if near else 'its modules begin with'}: {', '.join(choice)}"
            )
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    try:
        images = torch.zeros(_ROWS, *input_shape, device=device)
        taps = _describe(backbone, names, _outputs(backbone, names, images))
        return taps, _allows_exit(backbone, taps, images)
    finally:
        backbone.train(was_training)


# Of three rows two go on: one would broadcast where shapes should have clashed.
_ROWS, _KEPT = 3, 2


@dataclass(frozen=True)
class _Output:
    """What a tapped module gave, and how often it had been written to by then."""

    name: str
    value: Any
    version: int


def _outputs(backbone: nn.Module, names: Sequence[str], images: torch.Tensor) -> list[_Output]:
    """Run the backbone and note what the named modules give, in order of execution."""
    seen: list[_Output] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append(
            _Output(name, output, getattr(output, "_version", 0))
        )

    handles = [backbone.get_submodule(n).register_forward_hook(note(n)) for n in names]
    try:
        with torch.no_grad():
            logits = backbone(images)
    except Exception as error:  # whatever a backbone makes of a size that is not its own
        raise UserError(
            f"data.image_size = {images.shape[-1]}: the backbone cannot take such images: "
            f"{first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UserError("model: with these options the backbone gives no class logits")
    return seen


def _allows_exit(backbone: nn.Module, taps: Sequence[Tap], images: torch.Tensor) -> bool:
    """Whether the rest of the backbone works on the rows that go on behind the last tap."""
    reader = TapReader(backbone, [tap.name for tap in taps])
    try:
        with torch.no_grad(), reader.reading(_KEPT):
            return len(backbone(images)) == _KEPT
    except Exception:  # whatever the backbone makes of rows that have left
        return False
    finally:
        reader.remove()


def _describe(
    backbone: nn.Module, names: Sequence[str], outputs: Sequence[_Output]
) -> tuple[Tap, ...]:
    """The taps in order of execution, or what is wrong with one of them."""
    order = [output.name for output in outputs]
    for name in names:
        if order.count(name) != 1:
            raise UserError(
                f"mint.taps: module {name!r} runs {order.count(name)} times in a forward pass; "
                "a tap must run exactly once"
            )
    taps = []
    for output in outputs:
        value = output.value
        if not isinstance(value, torch.Tensor) or value.ndim not in (3, 4) or len(value) != _ROWS:
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(
                f"mint.taps: module {output.name!r} gives {got} for {_ROWS} images; a tap must "
                "give feature maps (4 dimensions) or tokens (3 dimensions)"
            )
        if value._version != output.version:
            # The head would see D's rows after the overwriting and E's, which left, before it.
            raise UserError(
                f"mint.taps: what module {output.name!r} gives is overwritten in place by a later "
                "module; tap that one, or the block around both"
            )
        taps.append(Tap(output.name, tuple(value.shape[1:]), _layout(backbone, value)))
    return tuple(taps)


def _layout(backbone: nn.Module, output: torch.Tensor) -> Layout:
    if output.ndim == 3:
        return "NLC"
    # timm's channels-last families (Swin, MetaFormer …) say so in this attribute.
    return "NHWC" if str(getattr(backbone, "output_fmt", "NCHW")) == "NHWC" else "NCHW"
