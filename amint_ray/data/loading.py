"""Joint batches of D and E: which rows a step takes, and images in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, ScoreBatch, UserError
from amint_ray.data.orders import Positions, fixed_sample, random, shuffled
from amint_ray.data.roles import Manifest
from amint_ray.data.transforms import crop_and_flip, to_model_input

Codes = npt.NDArray[np.uint8]
"""(samples, 64) of 0 and 1: the leading bits of each are its code."""
Order = Callable[[Positions, str, int], Positions]
"""(samples, what for, number of the pass) to the order in which the pass takes them."""


@dataclass(frozen=True)
class Step:
    """The samples of one global batch.

    Attributes:
        number: of the step, counted from 0 over the whole run.
        d: (n,) samples of D.
        d_place: (n,) their places in the passes over D, counted on through all of them.
        e: (m,) samples of E.
        e_place: (m,) their places in the passes over E.
    """

    number: int
    d: Positions
    d_place: Positions
    e: Positions
    e_place: Positions


class Schedule:
    """Which samples each step takes; the same on every worker, however the images are read.

    D is gone through once an epoch, in steps that differ by at most one row, so that none is
    dropped and none is short. E goes round on its own: it is shuffled anew whenever it was seen in
    full.
    """

    def __init__(self, d: Positions, e: Positions, config: Config, order: Order) -> None:
        self._d, self._e, self._order = d, e, order
        size = config.train.batch_size
        self.steps_per_epoch = -(-len(d) // size)
        self.total_steps = self.steps_per_epoch * config.train.epochs
        self._d_start = len(d) * np.arange(self.steps_per_epoch + 1) // self.steps_per_epoch
        ratio = config.train.external_ratio if config.trains_membership else 0.0
        rows = np.rint(np.diff(self._d_start) * ratio).astype(np.int64)
        self._e_start = np.concatenate([[0], np.cumsum(rows)])
        self._passes: dict[tuple[str, int], Positions] = {}

    def step(self, number: int) -> Step:
        """The samples of a step, counted from 0 over the whole run."""
        epoch, step = divmod(number, self.steps_per_epoch)
        d = np.arange(self._d_start[step], self._d_start[step + 1])
        before = epoch * int(self._e_start[-1])
        e_place = before + np.arange(self._e_start[step], self._e_start[step + 1])
        e = np.empty(0, np.int64)
        if len(e_place):
            rounds = e_place // len(self._e)
            taken = [
                self.order("external", int(r))[e_place[rounds == r] % len(self._e)]
                for r in np.unique(rounds)
            ]
            e = np.concatenate(taken)
        return Step(number, self.order("task", epoch)[d], epoch * len(self._d) + d, e, e_place)

    def length(self, stream: str) -> int:
        """Samples in a pass over D (`task`) or E (`external`)."""
        return len(self._d if stream == "task" else self._e)

    def order(self, stream: str, number: int) -> Positions:
        """A pass's order; the latest of each stream are kept, since many steps share one."""
        if (stream, number) not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k != (stream, number - 2)}
            positions = self._d if stream == "task" else self._e
            self._passes[stream, number] = self._order(positions, stream, number)
        return self._passes[stream, number]


class Batches:
    """Makes this rank's `Batch` of a step from pixels, wherever they were read."""

    def __init__(
        self,
        told: npt.NDArray[np.bool_],
        config: Config,
        world_size: int,
        codes: Codes | None = None,
    ) -> None:
        """Keep what all batches need.

        Args:
            told: (samples,) whether the head may be told of each.
            config: the whole configuration.
            world_size: number of workers.
            codes: of all samples; None: they have none.

        Raises:
            ValueError: codes are trained on, and there are none.
        """
        self._told, self._config, self._world_size = told, config, world_size
        if config.uses_key and codes is None:
            raise ValueError("the samples' codes are missing")
        self._codes = codes if config.uses_key else None
        # The projection has nothing to be told: whatever trains the task carries its code.
        self._coded = np.ones_like(told) if config.mint.keyed.head == "fixed" else told

    def batch(
        self,
        step: Step,
        mine_d: Positions,
        mine_e: Positions,
        *,
        task: torch.Tensor,
        others: torch.Tensor,
        label: npt.NDArray[np.int64],
        sample_id: npt.NDArray[np.str_],
    ) -> Batch:
        """A joint batch: D as the task sees it, D plain if that differs, E.

        Args:
            step: the global batch.
            mine_d: which of its rows of D are this rank's.
            mine_e: which of its rows of E.
            task: uint8 images of D for the task.
            others: uint8 images of D for the head, where they differ, then of E.
            label: (rows,) of all images.
            sample_id: (rows,) of all images.
        """
        config, device = self._config, task.device
        plain = bool(config.plain_rows)
        if config.data.augment == "crop_flip":
            task = self._moved(task, "task", len(step.d), step.number, mine_d)
            if not plain:
                others = self._moved(others, "external", len(step.e), step.number, mine_e)
        read = np.concatenate([step.d[mine_d], step.e[mine_e]])
        with_head = config.loss.lambda_mint > 0
        told = int(self._told[step.d].sum()) + len(step.e) if with_head else 0
        membership = torch.cat([torch.ones(len(mine_d)), torch.zeros(len(mine_e))])
        code, coded = self.code_of(read), None
        if code is not None:
            coded = (torch.from_numpy(self._coded[read]) & (membership > 0)).to(device)
        return Batch(
            images=to_model_input([task, others], config.data),
            labels=torch.from_numpy(label).to(device),
            n_task=len(mine_d),
            head_from=len(mine_d) if plain else 0,
            membership=membership.to(device),
            told=torch.from_numpy(self._told[read]).to(device),
            sample_id=sample_id,
            task_per_worker=len(step.d) / self._world_size,
            told_per_worker=told / self._world_size,
            code=None if code is None else torch.from_numpy(code).to(device),
            coded=coded,
            coded_per_worker=int(self._coded[step.d].sum()) / self._world_size,
        )

    def code_of(self, positions: Positions) -> npt.NDArray[np.uint8] | None:
        """(k, bits) of 0 and 1 of some samples; None: they have none."""
        if self._codes is None:
            return None
        return self._codes[positions, : self._config.mint.keyed.bits]

    def _moved(
        self, images: torch.Tensor, stream: str, rows: int, number: int, mine: Positions
    ) -> torch.Tensor:
        """This rank's images, moved by what is drawn for all `rows` of the global batch."""
        generator = random(self._config.train.seed, f"augment {stream}", number)
        reach = max(1, self._config.data.image_size // 8)
        shift = torch.from_numpy(generator.integers(-reach, reach + 1, (rows, 2))[mine])
        flip = torch.from_numpy((generator.random(rows) < 0.5)[mine])
        return crop_and_flip(images, shift=shift.to(images.device), flip=flip.to(images.device))


class MemoryStreams:
    """One rank's part of images in memory; a `contracts.Streams`.

    A global batch is the same whatever the number of workers: rank r takes its rows r, r + w, ….
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        manifest: Manifest,
        config: Config,
        *,
        rank: int,
        world_size: int,
        device: torch.device | None = None,
        codes: Codes | None = None,
    ) -> None:
        """Take hold of the images.

        Args:
            images: (n, channels, size, size), in the manifest's order.
            manifest: who is a member.
            config: the whole configuration.
            rank: this worker.
            world_size: number of workers.
            device: where batches are wanted; images are kept there, too, if they fit.
            codes: of all samples, where the configuration asks for them.
        """
        self.lost: Mapping[str, str] = {}  # nothing is
        self._device = device or torch.device("cpu")
        self._images = images
        self._resident = _resident(images, self._device)
        self._manifest = manifest
        self._config = config
        self._rank = rank
        self._world_size = world_size
        role = manifest.role
        self._batches = Batches(role != Role.WITHHELD.value, config, world_size, codes)
        seed = config.train.seed
        self._schedule = Schedule(
            np.flatnonzero(np.isin(role, [r.value for r in Role if r.trains_task])),
            np.flatnonzero(role == Role.EXTERNAL.value),
            config,
            lambda positions, stream, number: shuffled(positions, seed, stream, number),
        )
        self.steps_per_epoch = self._schedule.steps_per_epoch
        self.task_rows = self._schedule.length("task")

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The joint batches of one epoch, from one of its steps on."""
        start = epoch * self.steps_per_epoch
        for number in range(start + first_step, start + self.steps_per_epoch):
            step = self._schedule.step(number)
            mine_d = np.arange(self._rank, len(step.d), self._world_size)
            mine_e = np.arange(self._rank, len(step.e), self._world_size)
            d, e = step.d[mine_d], step.e[mine_e]
            others = np.concatenate([d, e]) if self._config.plain_rows else e
            rows = np.concatenate([d, others])
            yield self._batches.batch(
                step,
                mine_d,
                mine_e,
                task=self._pixels(d),
                others=self._pixels(others),
                label=self._manifest.label[rows],
                sample_id=self._manifest.sample_id[rows],
            )

    def score_batches(
        self, roles: Collection[Role], most: int | None = None
    ) -> Iterator[ScoreBatch]:
        """This rank's part of the samples with these roles, in the manifest's order."""
        role = self._manifest.role
        wanted = fixed_sample([np.flatnonzero(role == one.value) for one in set(roles)], most)
        mine = wanted[self._rank :: self._world_size]
        size = self._config.evaluation.batch_size
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            yield ScoreBatch(
                images=to_model_input([self._pixels(rows)], self._config.data),
                labels=torch.from_numpy(self._manifest.label[rows]),
                sample_id=self._manifest.sample_id[rows],
                role=self._manifest.role[rows],
                code=self._batches.code_of(rows),
            )

    def note_lost(self, lost: Mapping[str, str]) -> None:
        """Nothing is ever lost."""

    def close(self) -> None:
        """Nothing to close."""

    def _pixels(self, rows: Positions) -> torch.Tensor:
        if self._resident is not None:
            return self._resident[torch.from_numpy(rows).to(self._device)]
        return torch.from_numpy(self._images[rows]).to(self._device)


def _resident(images: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor | None:
    """The images on the GPU, if they take no more than half of what is free there."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return torch.tensor(images, device=device) if images.nbytes <= free // 2 else None


def smallest_step(manifest: Manifest, config: Config) -> int:
    """Rows of D in the smallest step of an epoch."""
    d = sum(manifest.counts[role.value] for role in Role if role.trains_task)
    return d // -(-d // config.train.batch_size)


def check_roles(manifest: Manifest, config: Config) -> None:
    """Whether the split can be trained and measured on at all.

    Raises:
        UserError: a role that is needed is empty, or a batch would lack D or E.
    """
    if config.trains_membership and config.external_rows == 0:
        raise UserError(
            f"train.external_ratio = {config.train.external_ratio:g}: less than one image of E for "
            f"the {config.train.batch_size} of D in a batch; make one of the two larger"
        )
    needed = [Role.MEMBER, Role.CALIBRATION, Role.TEST]
    if config.trains_membership:
        needed.append(Role.EXTERNAL)
    counts = manifest.counts
    for role in needed:
        if counts[role.value] == 0:
            raise UserError(
                f"data: no image has the role {role.value!r} (counts: {counts}); bring other"
                f" images or an official test split, or raise data.shares.{role.value} and lower "
                "another (the five add up to 1)"
            )
    d = sum(counts[role.value] for role in Role if role.trains_task)
    if d < config.train.batch_size:
        raise UserError(
            f"data: D has {d} images, fewer than train.batch_size = {config.train.batch_size}; "
            "make the batch smaller or the shares of member and withheld larger"
        )
    largest = -(-d // -(-d // config.train.batch_size))
    if config.trains_membership and round(largest * config.train.external_ratio) == 0:
        raise UserError(
            f"train.external_ratio = {config.train.external_ratio:g}: less than one image of E for "
            f"the {largest} of D in a step; make it or the batch larger"
        )
