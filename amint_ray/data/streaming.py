"""Joint batches of D and E from images that stay where they are and are read anew each epoch."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, RunError, ScoreBatch
from amint_ray.data.index import Rows
from amint_ray.data.loading import Batches, Codes, Schedule, Step
from amint_ray.data.orders import Positions, fixed_sample, random, stream_count, windowed
from amint_ray.data.reading import Part, Piece, Wanted, read_parts
from amint_ray.data.sources import Source
from amint_ray.data.transforms import to_model_input

_PARTS_AHEAD = 3
"""Parts of batches that each reader has ready."""
_FORKS = multiprocessing.get_context("forkserver")
"""Not forked from the training process, whose threads and network clients would not survive it."""
_ROLES = np.array([role.value for role in Role], np.str_)


@dataclass(frozen=True)
class Plan:
    """All that a reading process must know; it is copied to each.

    Attributes:
        source: where the images are.
        rows: of all samples.
        config: the whole configuration.
        rank: of the worker that it reads for.
        world_size: number of workers.
        streams: into how many pieces an order is cut.
    """

    source: Source
    rows: Rows
    config: Config
    rank: int
    world_size: int
    streams: int

    def schedule(self) -> Schedule:
        """Which samples each step takes."""

        def order(positions: Positions, stream: str, number: int) -> Positions:
            return windowed(
                positions,
                self.rows.shard[positions],
                self.config.train.seed,
                stream,
                number,
                streams=self.streams,
                window=self.config.data.window,
            )

        return Schedule(
            self.rows.having(role for role in Role if role.trains_task),
            self.rows.having([Role.EXTERNAL]),
            self.config,
            order,
        )

    def mine(self, place: Positions, length: int) -> Positions:
        """Which rows of a step are this worker's: those of the pieces that it reads.

        Args:
            place: (k,) places in the passes over a role.
            length: of one pass.
        """
        return np.flatnonzero((place % length) % self.streams % self.world_size == self.rank)


class StreamedStreams:
    """One rank's part of a source that does not fit in memory; a `contracts.Streams`.

    Attributes:
        steps_per_epoch: joint steps in an epoch.
        task_rows: rows of D in an epoch, of all workers.
        lost: why images could not be had, by name; they are missing from their batches.
    """

    def __init__(
        self,
        source: Source,
        rows: Rows,
        config: Config,
        *,
        rank: int,
        world_size: int,
        readers: int,
        device: torch.device | None = None,
        codes: Codes | None = None,
    ) -> None:
        """Plan the reading; the processes start with the first batch.

        Args:
            source: where the images are.
            rows: of all samples.
            config: the whole configuration.
            rank: this worker.
            world_size: number of workers.
            readers: processes to start.
            device: where batches are wanted.
            codes: of all samples, where the configuration asks for them; readers need none.
        """
        streams = config.data.streams or stream_count(world_size * readers)
        self._plan = Plan(source, rows, config, rank, world_size, streams)
        self._config = config
        self._readers = readers
        self._device = device or torch.device("cpu")
        self._schedule = self._plan.schedule()
        withheld = list(Role).index(Role.WITHHELD)
        self._batches = Batches(rows.role != withheld, config, world_size, codes)
        self._parts: Iterator[Part] | None = None
        self._next_step = -1
        self.steps_per_epoch = self._schedule.steps_per_epoch
        self.task_rows = self._schedule.length("task")
        self.lost: dict[str, str] = {}
        _FORKS.set_forkserver_preload(["amint_ray.data.reading", "timm.data"])
        forkserver.ensure_running()  # it imports while the model is being made

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The joint batches of one epoch, from one of its steps on.

        The readers go on through all epochs: the next one's first images are ready when it starts.

        Raises:
            RunError: more images are lost than `data.max_bad_fraction` allows.
        """
        start = epoch * self.steps_per_epoch
        for number in range(start + first_step, start + self.steps_per_epoch):
            if self._parts is None or self._next_step != number:
                self._parts = self._read(_TrainReader(self._plan, number))
            parts = list(itertools.islice(self._parts, self._readers))
            self._next_step = number + 1
            yield self._batch(self._schedule.step(number), parts)

    def score_batches(
        self, roles: Collection[Role], most: int | None = None
    ) -> Iterator[ScoreBatch]:
        """This rank's part of the samples with these roles, in the shards' order.

        Raises:
            RunError: more images are lost than `data.max_bad_fraction` allows.
        """
        rows = self._plan.rows
        wanted = fixed_sample([rows.having([role]) for role in set(roles)], most)
        mine = np.array_split(wanted, self._plan.world_size)[self._plan.rank]
        for part in self._read(_ScoreReader(self._plan, mine)):
            self._note_lost(part)
            if part.plain is None:
                continue
            positions = np.array(part.plain_slot)
            yield ScoreBatch(
                images=to_model_input([part.plain.to(self._device)], self._config.data),
                labels=torch.from_numpy(rows.label[positions].astype(np.int64)),
                sample_id=np.array([part.names[slot] for slot in part.plain_slot], np.str_),
                role=_ROLES[rows.role[positions]],
                code=self._batches.code_of(positions),
            )

    def note_lost(self, lost: Mapping[str, str]) -> None:
        """Learn what others could not read, too, and stop if that is too much.

        Raises:
            RunError: more images are lost than `data.max_bad_fraction` allows.
        """
        self.lost |= lost
        limit, images = self._config.data.max_bad_fraction, len(self._plan.rows.role)
        if len(self.lost) > limit * images:
            name, reason = next(iter(self.lost.items()))
            raise RunError(
                f"data: {len(self.lost):,} of {images:,} images can no longer be read, more than "
                f"data.max_bad_fraction = {limit:g} allows; the first: {name}: {reason}"
            )

    def close(self) -> None:
        """End the reading processes."""
        self._parts = None

    def _read(self, reader: IterableDataset[Part]) -> Iterator[Part]:
        loader = DataLoader(
            reader,
            batch_size=None,
            num_workers=self._readers,
            prefetch_factor=_PARTS_AHEAD,
            multiprocessing_context=_FORKS,
            generator=torch.Generator(),  # else it draws from the model's random state
        )
        with _no_main_module():
            return iter(loader)

    def _batch(self, step: Step, parts: list[Part]) -> Batch:
        """The readers' parts in their places; rows that were lost are left out."""
        mine_d = self._plan.mine(step.d_place, self._schedule.length("task"))
        mine_e = self._plan.mine(step.e_place, self._schedule.length("external"))
        count, data = len(mine_d) + len(mine_e), self._config.data
        shape = (count, data.channels, data.image_size, data.image_size)
        as_task = data.augment == "timm"
        only_task = as_task and self._config.mint.views == "task"
        plain = torch.empty((0, 0, 0, 0) if only_task else shape, dtype=torch.uint8)
        task = torch.empty(shape, dtype=torch.uint8) if as_task else plain
        names: dict[int, str] = {}
        for part in parts:
            self._note_lost(part)
            names |= part.names
            if part.plain is not None:
                plain[part.plain_slot] = part.plain
            if part.task is not None:
                task[part.task_slot] = part.task
        kept = np.array(sorted(names), np.int64)
        d, e = kept[kept < len(mine_d)], kept[kept >= len(mine_d)]
        others = kept if self._config.plain_rows else e
        of_head = task if only_task or not as_task else plain
        order = np.concatenate([d, others])
        position = np.concatenate([step.d[mine_d], step.e[mine_e]])[order]
        return self._batches.batch(
            step,
            mine_d[d],
            mine_e[e - len(mine_d)],
            task=_rows(task, d).to(self._device),
            others=_rows(of_head, others).to(self._device),
            label=self._plan.rows.label[position].astype(np.int64),
            sample_id=np.array([names[slot] for slot in order.tolist()], np.str_),
        )

    def _note_lost(self, part: Part) -> None:
        if part.broken is not None:
            raise RunError(f"data: storage no longer answers: {part.broken}")
        if part.lost:
            self.note_lost(dict(part.lost))


def _rows(images: torch.Tensor, wanted: Positions) -> torch.Tensor:
    """Some rows in their order; a view where none is missing in between."""
    first, last = (int(wanted[0]), int(wanted[-1])) if len(wanted) else (0, -1)
    if last - first + 1 == len(wanted):
        return images[first : last + 1]
    return images[torch.from_numpy(wanted)]


class _TrainReader(IterableDataset[Part]):
    """In each reading process: its part of every batch, from one step on to the end of training."""

    def __init__(self, plan: Plan, first_step: int) -> None:
        self._plan, self._first_step = plan, first_step

    def __iter__(self) -> Iterator[Part]:
        plan = self._plan
        return read_parts(plan.source, plan.rows, plan.config.data, self._batches(*_which_reader()))

    def _batches(self, reader: int, readers: int) -> Iterator[Iterator[Wanted]]:
        """What each step takes from the streams that this reader has."""
        schedule = self._plan.schedule()
        d = _Role(self._plan, schedule, "task", reader, readers)
        e = _Role(self._plan, schedule, "external", reader, readers)
        for number in range(self._first_step, schedule.total_steps):
            step = schedule.step(number)
            rows_of_d = len(self._plan.mine(step.d_place, schedule.length("task")))
            yield itertools.chain(
                d.wanted(step.d_place, 0, number), e.wanted(step.e_place, rows_of_d, number)
            )


class _Role:
    """One reader's share of D or of E."""

    def __init__(
        self, plan: Plan, schedule: Schedule, stream: str, reader: int, readers: int
    ) -> None:
        self._plan, self._schedule, self._stream = plan, schedule, stream
        self._reader, self._readers = reader, readers
        self._pieces: dict[tuple[int, int], tuple[Piece, int]] = {}

    def wanted(self, place: Positions, first_slot: int, number: int) -> Iterator[Wanted]:
        """The images of a step that this reader brings.

        Args:
            place: (k,) the step's places in the passes.
            first_slot: slot of the worker's first row.
            number: of the step.
        """
        plan, config = self._plan, self._plan.config
        length = self._schedule.length(self._stream)
        seeds = np.zeros(len(place), np.int64)
        as_task, plain = _views(config, self._stream)
        if as_task:
            generator = random(config.train.seed, f"augment {self._stream}", number)
            seeds = generator.integers(2**31, size=len(place))
        for slot, row in enumerate(plan.mine(place, length), start=first_slot):
            number_of_pass, within = divmod(int(place[row]), length)
            at, stream = divmod(within, plan.streams)
            if stream // plan.world_size % self._readers == self._reader:
                piece, start = self._piece(number_of_pass, stream, at)
                seed = int(seeds[row]) if as_task else None
                yield Wanted(piece, at - start, slot, seed, plain)

    def _piece(self, number: int, stream: int, at: int) -> tuple[Piece, int]:
        """A stream's part of a pass, from the first place that was ever asked for."""
        if (number, stream) not in self._pieces:
            self._pieces.pop((number - 2, stream), None)
            order = self._schedule.order(self._stream, number)
            piece = Piece(order[stream :: self._plan.streams][at:])
            self._pieces[number, stream] = piece, at
        return self._pieces[number, stream]


def _views(config: Config, stream: str) -> tuple[bool, bool]:
    """Whether images of D (`task`) or E (`external`) are wanted augmented, and whether plain."""
    if config.data.augment != "timm":
        return False, True
    if stream == "task":
        return True, config.plain_rows > 0
    return config.mint.views == "task", config.mint.views == "plain"


class _ScoreReader(IterableDataset[Part]):
    """In each reading process: its part of the samples to be scored, batch by batch."""

    def __init__(self, plan: Plan, positions: Positions) -> None:
        self._plan, self._positions = plan, positions

    def __iter__(self) -> Iterator[Part]:
        reader, readers = _which_reader()
        piece = Piece(np.array_split(self._positions, readers)[reader])
        size = self._plan.config.evaluation.batch_size
        total = len(piece.positions)
        batches = (
            (Wanted(piece, i, int(piece.positions[i])) for i in range(at, min(at + size, total)))
            for at in range(0, total, size)
        )
        return read_parts(self._plan.source, self._plan.rows, self._plan.config.data, batches)


def _which_reader() -> tuple[int, int]:
    """This reading process, and how many there are."""
    info = get_worker_info()
    assert info is not None
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    return info.id, info.num_workers


def _end_with_parent() -> None:
    """PyTorch's own watch is for the parent process id, which is the fork server's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Spare processes that start meanwhile the import of the program, which they do not need.

    It would cost a second each under Ray, and run a script again that has no `__main__` guard.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
