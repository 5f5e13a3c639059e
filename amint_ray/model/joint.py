"""The audited model: backbone, taps and MINT head, trained and called as one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.backbone import create_backbone
from amint_ray.model.mint_head import HeadSpec, MintHead
from amint_ray.model.placement import PLACEMENTS, enclosing, resolve
from amint_ray.model.survey import ROWS, Site, modes_agree, run, survey
from amint_ray.model.taps import FeatureReader, Tap, TapReader, allows_exit

if TYPE_CHECKING:  # the model needs torch and timm alone
    from amint_ray.config.mint_schema import Mint
    from amint_ray.config.schema import Config


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build an `AuditedModel`, as plain values that JSON holds.

    Attributes:
        backbone: timm's name.
        options: further arguments of `timm.create_model`.
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width).
        taps: in order of execution.
        early_exit: whether E's rows can leave after the last tap.
        modes_agree: whether the backbone computes the same in training and in evaluation mode.
        head: what the MINT head is built from.
        detach: whether the head's gradient stops at the taps.
        features: width of what the classifier's last layer reads; 0 where the head does not.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (for `from_json`)

    backbone: str
    options: dict[str, Any]
    num_classes: int
    input_shape: tuple[int, int, int]
    taps: tuple[Tap, ...]
    early_exit: bool
    modes_agree: bool
    head: HeadSpec
    detach: bool
    features: int = 0

    @property
    def exits_early(self) -> bool:
        """Whether E's rows do leave after the last tap: not where the head wants what is behind."""
        return self.early_exit and not self.head.inputs and not self.head.fixed

    def to_json(self) -> str:
        """As JSON text."""
        from pydantic import TypeAdapter

        return TypeAdapter(Architecture).dump_json(self, indent=2).decode()

    @staticmethod
    def from_json(text: str) -> Architecture:
        """From what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(Architecture).validate_json(text)
        except ValidationError as error:
            faults = "; ".join(f"{list(e['loc'])} {e['msg']}" for e in error.errors())
            raise ValueError(f"not an architecture of amint_ray: {faults}") from error


def plan_architecture(config: Config, num_classes: int) -> Architecture:
    """The architecture that a configuration asks for; see `plan`."""
    mint = config.mint
    return plan(
        config.model.backbone,
        options=config.model.options,
        num_classes=num_classes,
        input_shape=(config.data.channels, config.data.image_size, config.data.image_size),
        taps=mint.taps,
        head=head_spec(mint, coded=config.uses_key),
        detach=mint.detach,
    )


def head_spec(mint: Mint, *, coded: bool) -> HeadSpec:
    """The head that a configuration asks for.

    Args:
        mint: its section.
        coded: whether codes are trained; a head that is not trained is the plain one.
    """
    return HeadSpec(
        *(mint.head, mint.channels, mint.queries, mint.hidden, mint.pool, mint.inputs),
        membership=mint.objective != "keyed" or not coded,
        bits=mint.keyed.bits if coded else 0,
        code=mint.keyed.head,
    )


def plan(
    backbone: str,
    *,
    options: Mapping[str, Any],
    num_classes: int,
    input_shape: tuple[int, int, int],
    taps: Sequence[str],
    head: HeadSpec,
    detach: bool = False,
) -> Architecture:
    """Check backbone, taps and head against each other, on the meta device: no memory, no time.

    Raises:
        UserError: they do not fit; the text names the key.
    """
    with torch.device("meta"):
        probe = create_backbone(
            backbone, num_classes=num_classes, channels=input_shape[0], options=options
        )
        if sum(p.numel() for p in probe.parameters()) == 0:
            raise UserError(f"model.backbone = {backbone!r} has no weights to train")
        sites = survey(probe, input_shape)
        found, early_exit = _choose(probe, sites, taps, input_shape)
        features = _width_of_features(probe, input_shape) if head.fixed else 0
        MintHead(head, found, num_classes, features)
    return Architecture(
        backbone=backbone,
        options=dict(options),
        num_classes=num_classes,
        input_shape=input_shape,
        taps=found,
        early_exit=early_exit,
        modes_agree=modes_agree(probe, input_shape),
        head=head,
        detach=detach,
        features=features,
    )


def _width_of_features(backbone: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Numbers an image that the classifier's last layer reads, as timm names it.

    Raises:
        UserError: it is not one layer that runs once, on rows of numbers.
    """
    reader = FeatureReader(backbone)
    try:
        with torch.no_grad(), reader.reading() as read:
            run(backbone, input_shape, training=False)
        if len(read) != 1 or len(read[0]) != ROWS:
            raise UserError(
                f"mint.keyed.head=fixed: the last layer of {type(backbone).__name__} does not read "
                "one row an image, once; take mint.keyed.head=learned, or another backbone"
            )
        return math.prod(read[0].shape[1:])
    finally:
        reader.remove()


def _choose(
    backbone: nn.Module,
    sites: Sequence[Site],
    wanted: Sequence[str],
    input_shape: tuple[int, int, int],
) -> tuple[tuple[Tap, ...], bool]:
    """The taps in order of execution, and whether rows can leave after the last.

    Where a placement ends inside a residual block, which still needs its input, the block itself or
    what is around it is tapped instead, if that lets rows leave. A module that was named stays.
    """
    *others, last = resolve(backbone, sites, wanted)
    taps = tuple(map(Tap.at, [*others, last]))
    if allows_exit(backbone, taps, input_shape):
        return taps, True
    if PLACEMENTS.keys() & set(wanted) and last.name not in wanted:
        for wider in enclosing(last, sites):
            instead = tuple(map(Tap.at, [*others, wider]))
            if wider not in others and allows_exit(backbone, instead, input_shape):
                return instead, True
    return taps, False


class AuditedModel(nn.Module):
    """M⁺ = (w, θ): the classifier w and the MINT head θ that reads its taps.

    The head is initialised without advancing torch's random state, so the backbone's weights and
    all that is drawn after them are those of plain training with the same seed.

    Args:
        architecture: what to build.
        pretrained: start from timm's published weights.
        prepare: what is to be done with the backbone before it is tapped.
    """

    sharded = False
    """Whether FSDP2 puts the blocks together as they run. Then a pass must go through to the end,
    and what goes on behind the last tap must be no view, from which FSDP2's hooks could be lost."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        pretrained: bool = False,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = create_backbone(
            architecture.backbone,
            num_classes=architecture.num_classes,
            channels=architecture.input_shape[0],
            options=architecture.options,
            pretrained=pretrained,
        )
        if prepare is not None:
            self.backbone = prepare(self.backbone)
        with torch.random.fork_rng(devices=[]):
            self.head = MintHead(
                *(architecture.head, architecture.taps, architecture.num_classes),
                features=architecture.features,
            )
        self._taps = TapReader(self.backbone, [tap.name for tap in architecture.taps])
        self._features = FeatureReader(self.backbone) if architecture.head.fixed else None
        self._gradients: Callable[[int, torch.Tensor], None] | None = None
        self._means: list[torch.Tensor] | None = None

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimiser factory leaves undecayed: positions, as timm has it."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        positions = {n for n, _ in self.head.named_parameters() if n.endswith(".position")}
        return {f"backbone.{name}" for name in names} | {f"head.{name}" for name in positions}

    def watch_gradients(self, record: Callable[[int, torch.Tensor], None]) -> None:
        """From now on tell `record` what reaches the last tap in a backward pass.

        Args:
            record: called with (0, gradient of the task's rows) and (1, the head's gradient).
        """
        self._gradients = record

    @contextlib.contextmanager
    def leaving_means(self) -> Iterator[list[torch.Tensor]]:
        """Have each pass within leave the taps' means over positions, (n, channels of all taps)."""
        self._means = []
        try:
            yield self._means
        finally:
            self._means = None

    def parted(self, said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the head says of n images, by what it is of.

        Args:
            said: as `forward` and `membership` give it.

        Returns:
            (n,) membership logits, NaN where the head says codes alone; (n, bits) logits of codes,
            None where it says none.
        """
        head = self.architecture.head
        if head.bits == 0:
            return said, None
        code = said[:, said.shape[1] - head.bits :]
        return (said[:, 0] if head.membership else torch.full_like(said[:, 0], torch.nan)), code

    @torch.no_grad()
    def membership(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The head's logits alone: nothing behind the last tap is computed that it does not read.

        Args:
            images: (n, channels, height, width).
            labels: (n,) class indices, read only by a head with the task loss as an input.

        Returns:
            (n,), or (n, membership + bits) of a head that says codes; in evaluation mode, without a
            gradient.
        """
        activations, read, features = self._evidence(images)
        logits: torch.Tensor = self.head(activations, read, labels, features)
        return logits

    def forward(
        self,
        images: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        n_task: int | None = None,
        head_from: int = 0,
        mint: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Task logits and membership logits in one pass through the shared trunk.

        Args:
            images: (n, channels, height, width).
            labels: (n,) class indices, read only by a head with the task loss as an input.
            n_task: how many leading rows train the task; the others leave the backbone after the
                last tap and get no task logits. None: all rows get both.
            head_from: first row that the head reads.
            mint: False leaves the head out, as plain training does.

        Returns:
            (n_task or n, num_classes) task logits and (n - head_from,) membership logits, or
            (n - head_from, membership + bits) of a head that says codes (None if not `mint`).
        """
        if not mint:  # then there is no E either, and the backbone runs as if nothing were hooked
            return self.backbone(images)[:n_task], None
        if self.architecture.detach and self.training:
            return self._forward_detached(images, labels, n_task, head_from)
        keep = n_task if self.architecture.exits_early else None
        gradients = self._gradients if torch.is_grad_enabled() else None
        with (
            self._read_features() as features,
            self._taps.reading(keep, gradients=gradients, copy=self.sharded) as activations,
        ):
            logits = self.backbone(images)
        self._leave(activations)
        if head_from:
            activations = [a[head_from:] for a in activations]
        read = logits[head_from:] if self.architecture.head.inputs else None
        behind = _from(features[0] if features else None, head_from)
        membership = self.head(activations, read, _from(labels, head_from), behind)
        return logits[:n_task], membership

    def _forward_detached(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        n_task: int | None,
        head_from: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain training's own pass on D, and what the head reads without a gradient.

        E must not reach D's pass, not even through BatchNorm's statistics: then the task's weights
        are those of plain training. Nor may D and E look different to the head for any other reason
        than membership: where the two modes differ, it reads both in evaluation mode, as it will
        when it is asked. Where they agree, D's activations are at hand already.
        """
        n = len(images) if n_task is None else n_task
        if self.architecture.modes_agree and head_from == 0 and not self.architecture.head.inputs:
            with self._taps.reading() as of_d:
                logits = self.backbone(images[:n])
            of_e, _, _ = self._evidence(images[n:])
            activations = [torch.cat([d.detach(), e]) for d, e in zip(of_d, of_e, strict=True)]
            return logits, self.head(activations)
        activations, read, _ = self._evidence(images[head_from:])
        membership = self.head(activations, read, _from(labels, head_from))
        return self.backbone(images[:n]), membership

    @torch.no_grad()
    def _evidence(
        self, images: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """Activations in evaluation mode; logits and features if the head reads them."""
        logits, training = None, self.backbone.training
        head = self.architecture.head
        self.backbone.eval()
        try:
            stop = not (head.inputs or head.fixed or self.sharded)
            with self._read_features() as features, self._taps.reading(stop=stop) as activations:
                logits = self.backbone(images)
        finally:
            self.backbone.train(training)
        self._leave(activations)
        return activations, logits, features[0] if features else None

    def _read_features(self) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
        """What the classifier's last layer reads in the pass within; nothing if nobody asks."""
        if self._features is None:
            return contextlib.nullcontext([])
        return self._features.reading()

    def _leave(self, activations: Sequence[torch.Tensor]) -> None:
        if self._means is not None:
            taps = zip(self.architecture.taps, activations, strict=True)
            self._means.append(torch.cat([tap.mean(read).float() for tap, read in taps], dim=1))


def _from(labels: torch.Tensor | None, start: int) -> torch.Tensor | None:
    return None if labels is None else labels[start:]
