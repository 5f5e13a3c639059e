"""Taps: reading the outputs of inner modules, and letting E's rows leave after the last one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.survey import ROWS, Layout, Site, run, tapped


@dataclass(frozen=True)
class Tap:
    """One tapped module's output.

    Attributes:
        name: the module's dotted name in the backbone.
        shape: of one sample, without the batch dimension.
        layout: order of the dimensions, N being the batch.
        prefix: class and register tokens in front of the image's own (`NLC`).
        depth: share of the backbone's FLOPs that are done when the module has run, 0 to 1.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    prefix: int = 0
    depth: float = 1.0

    @classmethod
    def at(cls, site: Site) -> Tap:
        """The tap of a site."""
        return cls(site.name, site.shape, site.layout, site.prefix, site.depth)

    @property
    def channels(self) -> int:
        """Features at each position."""
        return self.shape[0] if self.layout == "NCHW" else self.shape[-1]

    def mean(self, activation: torch.Tensor) -> torch.Tensor:
        """(n, channels): the mean over positions, without class and register tokens."""
        if self.layout == "NCHW":
            return activation.flatten(2).mean(2)
        return activation.flatten(1, -2)[:, self.prefix :].mean(1)


class TapReader:
    """Forward hooks on the tapped modules; outside `reading` they change and keep nothing."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        self._active = self._stop = self._copy = False
        self._keep: int | None = None
        self._gradients: Callable[[int, torch.Tensor], None] | None = None
        self._names = tuple(names)
        self._read: dict[str, torch.Tensor] = {}
        self._handles = [
            backbone.get_submodule(name).register_forward_hook(
                _Hook(self, name, last=name == self._names[-1])
            )
            for name in self._names
        ]

    @contextlib.contextmanager
    def reading(
        self,
        keep: int | None = None,
        *,
        stop: bool = False,
        gradients: Callable[[int, torch.Tensor], None] | None = None,
        copy: bool = False,
    ) -> Iterator[list[torch.Tensor]]:
        """Read the taps of the forward pass that runs within.

        Args:
            keep: how many leading rows go on behind the last tap; None: all. The head still gets
                every row.
            stop: end the pass after the last tap; nothing behind it is computed.
            gradients: called in the backward pass with what reaches the last tap: from the task
                (0, gradient) and from the head (1, gradient).
            copy: let a copy of the kept rows go on instead of a view of them.

        Yields:
            A list that is filled with the activations, in the order of the names, at the end.
        """
        activations: list[torch.Tensor] = []
        self._active, self._keep, self._stop, self._gradients = True, keep, stop, gradients
        self._copy = copy
        try:
            # The pass that is stopped has done what it was asked for.
            with contextlib.suppress(_Stop):
                yield activations
            activations.extend(self._read[name] for name in self._names)
        finally:
            self._active, self._keep, self._read = False, None, {}
            self._stop, self._gradients = False, None

    def pass_on(self, name: str, output: Any, *, last: bool) -> Any:
        """Called by the hooks: keep the output, and say what goes on instead of it."""
        if not self._active:
            return None
        self._read[name] = tapped(output)
        if not last:
            return None
        if self._stop:
            raise _Stop
        if self._gradients is not None:
            goes_on = self._watch(name, tapped(output))
        elif self._keep is not None:
            goes_on = tapped(output)[: self._keep]
        else:
            return None
        if self._copy:
            goes_on = goes_on.clone()
        if not isinstance(output, tuple):
            return goes_on
        # What goes with the features, such as PiT's class tokens, leaves with them.
        kept, rows = len(goes_on), len(output[0])
        others = (
            x[:kept] if isinstance(x, torch.Tensor) and x.ndim and len(x) == rows else x
            for x in output[1:]
        )
        return (goes_on, *others)

    def _watch(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Two views of one output, so that the gradients that come back do so apart."""
        gradients = self._gradients
        assert gradients is not None
        goes_on, is_read = output[: self._keep], output.view_as(output)
        if output.requires_grad:
            for which, tensor in enumerate((goes_on, is_read)):
                tensor.register_hook(functools.partial(gradients, which))  # type: ignore[no-untyped-call]
        self._read[name] = is_read
        return goes_on

    def remove(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self._handles:
            handle.remove()


class FeatureReader:
    """A forward hook on the classifier's last layer, for what it reads; idle outside `reading`."""

    def __init__(self, backbone: nn.Module) -> None:
        """Find the layer.

        Raises:
            UserError: timm names none, or several.
        """
        self._active = False
        self._read: list[torch.Tensor] = []
        named: Any = getattr(backbone, "get_classifier", None)
        layer = named() if callable(named) else None
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise UserError(
                f"mint.keyed.head=fixed: {type(backbone).__name__} has no single last layer whose "
                "input could be read; take mint.keyed.head=learned, or another backbone"
            )
        self._handle = layer.register_forward_pre_hook(_FeatureHook(self))

    @contextlib.contextmanager
    def reading(self) -> Iterator[list[torch.Tensor]]:
        """Read in the forward pass that runs within.

        Yields:
            A list that the features, (n, …), are in at the end.
        """
        read: list[torch.Tensor] = []
        self._active, self._read = True, read
        try:
            yield read
        finally:
            self._active, self._read = False, []  # no batch is kept

    def keep(self, features: torch.Tensor) -> None:
        """Called by the hook."""
        if self._active:
            self._read.append(features)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()


class _FeatureHook:
    """As `_Hook`, of what goes in."""

    def __init__(self, reader: FeatureReader) -> None:
        self._reader = reader

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._reader.keep(args[0])


class _Stop(Exception):  # noqa: N818 (nothing went wrong)
    """Ends a forward pass after the last tap."""


class _Hook:
    """A picklable, deep-copyable forward hook (a closure would tie a copied model to the first)."""

    def __init__(self, reader: TapReader, name: str, *, last: bool) -> None:
        self._reader, self._name, self._last = reader, name, last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._reader.pass_on(self._name, output, last=self._last)


def allows_exit(
    backbone: nn.Module, taps: Sequence[Tap], input_shape: tuple[int, int, int]
) -> bool:
    """Whether rows can leave after the last tap: found by letting one of three leave.

    In a backbone where a later module also reads something computed before the last tap, the shapes
    no longer match. Training mode, since that is when rows leave.
    """
    reader = TapReader(backbone, [tap.name for tap in taps])
    try:
        with torch.no_grad(), reader.reading(ROWS - 1):
            logits = run(backbone, input_shape, training=True)
        return isinstance(logits, torch.Tensor) and len(logits) == ROWS - 1
    except UserError:  # what `run` makes of whatever the backbone makes of rows that have left
        return False
    finally:
        reader.remove()
