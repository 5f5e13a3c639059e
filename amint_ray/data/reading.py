"""Reading samples in a given order: whole shards at a time, ahead of need."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from amint_ray.config.data_schema import Data
from amint_ray.contracts import RunError
from amint_ray.data.images import BadImage, decode
from amint_ray.data.index import Progress, Rows
from amint_ray.data.orders import Positions
from amint_ray.data.sources import DamagedError, Fault, Raw, Source
from amint_ray.data.transforms import Views

_IMAGES_AHEAD = 128
_PAUSES = (0.5, 2.0)
"""Seconds between the tries to read a shard."""
_PORTIONS = 50
"""Into how many pieces `read_plain` cuts its work, so that progress can be told."""
_FAILURES = 2
"""Shards in a row that cannot be read, and times the time-out, before storage counts as down."""


@dataclass(frozen=True)
class Piece:
    """A stretch of samples, listed in the order in which they will be asked for.

    Whatever of one shard is needed in a piece is read at once and kept until it was asked for:
    where samples moved by at most a window from their shards' order, that is no more than a window
    and a shard.
    """

    positions: Positions


@dataclass(frozen=True)
class Wanted:
    """One image to be read.

    Attributes:
        piece: which piece it is in, and each of its places is asked for in turn.
        place: in the piece.
        slot: a number by which the image is known where it is wanted.
        seed: of its augmentation, where it is wanted as the task sees it.
        plain: whether it is wanted as it is scored.
    """

    piece: Piece
    place: int
    slot: int
    seed: int | None = None
    plain: bool = True


@dataclass
class Part:
    """What one reader brings of a batch.

    Attributes:
        names: sample id by slot.
        task_slot: slots of `task`, in order.
        task: (k, channels, size, size) uint8, images as the task sees them; None if there is none.
        plain_slot: slots of `plain`, in order.
        plain: the same, as they are scored.
        lost: (name, reason) of images that could not be had.
        broken: why nothing more will come, once storage no longer answers.
    """

    names: dict[int, str] = field(default_factory=dict)
    task_slot: list[int] = field(default_factory=list)
    task: torch.Tensor | None = None
    plain_slot: list[int] = field(default_factory=list)
    plain: torch.Tensor | None = None
    lost: list[tuple[str, str]] = field(default_factory=list)
    broken: str | None = None


def read_parts(
    source: Source, rows: Rows, config: Data, batches: Iterable[Iterable[Wanted]]
) -> Iterator[Part]:
    """Read, decode and transform batch after batch; a thread reads ahead meanwhile.

    Args:
        source: where the images are.
        rows: which shard and row each sample is.
        config: tells the transforms.
        batches: what is wanted.
    """
    views = Views(config)
    part = Part()
    task: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    for item in _ahead(_fetch(source, rows, batches, config.timeout_seconds)):
        if isinstance(item, _Broken):
            yield Part(broken=item.reason)
            return
        if item is None:
            part.task = torch.stack(task) if task else None
            part.plain = torch.stack(plain) if plain else None
            yield part
            part, task, plain = Part(), [], []
            continue
        wanted, name, raw = item
        try:
            if isinstance(raw, Fault):
                raise BadImage(raw.reason)
            rgb = decode(raw, max_megapixels=config.max_megapixels)
        except BadImage as error:
            part.lost.append((name, str(error)))
            continue
        part.names[wanted.slot] = name
        if wanted.seed is not None:
            part.task_slot.append(wanted.slot)
            task.append(views.task(rgb, wanted.seed))
        if wanted.plain:
            part.plain_slot.append(wanted.slot)
            plain.append(views.plain(rgb))


class StorageError(Exception):
    """Several shards in a row could not be read: it is not they that are at fault."""


@dataclass(frozen=True)
class _Broken:
    """Nothing more will come."""

    reason: str


_Item = tuple[Wanted, str, Raw] | _Broken | None  # None: the batch is complete


def _fetch(
    source: Source, rows: Rows, batches: Iterable[Iterable[Wanted]], seconds: float
) -> Iterator[_Item]:
    held: dict[int, _Held] = {}
    shards = _Shards(source, rows, seconds)
    for batch in batches:
        for wanted in batch:
            key = id(wanted.piece)
            if key not in held:
                held = {k: h for k, h in held.items() if h.left}
                held[key] = _Held(shards, rows, wanted.piece)
            try:
                image = held[key].take(wanted.place)
            except StorageError as error:
                yield _Broken(str(error))
                return
            yield (wanted, *image)
        yield None


class _Shards:
    """Reads shards, and gives up where one after the other cannot be read for some time."""

    def __init__(self, source: Source, rows: Rows, seconds: float) -> None:
        self._source, self._rows = source, rows
        self._patience = _FAILURES * seconds
        self._failed, self._succeeded = 0, time.monotonic()

    def read(self, shard: int, positions: Positions) -> list[tuple[str, Raw]]:
        """Names and stored images.

        Raises:
            StorageError: this shard and those before it could not be read.
        """
        names = self._source.sample_ids(shard)
        rows = self._rows.row[positions].tolist()
        try:
            images = self._persistently(shard, rows)
            self._failed, self._succeeded = 0, time.monotonic()
        except (DamagedError, FileNotFoundError) as error:
            images = [Fault(str(error))] * len(rows)
        except OSError as error:
            self._failed += 1
            silent = time.monotonic() - self._succeeded > self._patience
            if self._failed >= _FAILURES and silent:
                raise StorageError(str(error)) from error
            images = [Fault(str(error))] * len(rows)
        return [(names[row], image) for row, image in zip(rows, images, strict=True)]

    def _persistently(self, shard: int, rows: list[int]) -> list[Raw]:
        """Asks again after a pause: storage that is away for seconds must not cost images."""
        for pause in _PAUSES:
            try:
                return self._source.read(shard, rows)
            except (DamagedError, FileNotFoundError):
                raise
            except OSError:
                time.sleep(pause)
        return self._source.read(shard, rows)


class _Held:
    """A piece's images that were read and not yet asked for."""

    def __init__(self, shards: _Shards, rows: Rows, piece: Piece) -> None:
        self._shards, self._rows = shards, rows
        self._piece = piece  # keeps its id from being given to another
        self.left = len(piece.positions)
        order = np.argsort(rows.shard[piece.positions], kind="stable")
        by_shard = piece.positions[order]
        found, starts = np.unique(rows.shard[by_shard], return_index=True)
        runs = np.split(by_shard, starts[1:]) if len(found) else []
        self._needed = dict(zip(found.tolist(), runs, strict=True))
        self._images: dict[int, tuple[str, Raw]] = {}

    def take(self, place: int) -> tuple[str, Raw]:
        position = int(self._piece.positions[place])
        if position not in self._images:
            shard = int(self._rows.shard[position])
            needed = self._needed.pop(shard)
            images = self._shards.read(shard, needed)
            self._images.update(zip(needed.tolist(), images, strict=True))
        self.left -= 1
        return self._images.pop(position)


_End = object()


def _ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items, produced in a thread that may be a hundred images ahead."""
    waiting: queue.Queue[object] = queue.Queue(_IMAGES_AHEAD)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_End)
        except BaseException as error:  # raised where the images are wanted
            put(error)

    threading.Thread(target=work, daemon=True, name="fetch").start()
    try:
        while (item := waiting.get()) is not _End:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]
    finally:
        stop.set()


def read_plain(
    source: Source,
    rows: Rows,
    config: Data,
    positions: Positions,
    *,
    readers: int,
    progress: Progress = lambda done, total: None,
) -> npt.NDArray[np.uint8]:
    """Some samples as they are scored, read by threads of this process.

    Args:
        source: where they are.
        rows: of all samples.
        config: tells the transforms.
        positions: which samples.
        readers: threads.
        progress: called now and then with (images done, images in all).

    Returns:
        (k, channels, size, size); images that could not be had are missing.

    Raises:
        RunError: storage does not answer.
    """

    def work(part: Positions) -> list[npt.NDArray[np.uint8]]:
        piece = Piece(part[np.argsort(rows.shard[part], kind="stable")])
        wanted = [Wanted(piece, place, place) for place in range(len(part))]
        found = list(read_parts(source, rows, config, [wanted]))
        if broken := [part.broken for part in found if part.broken]:
            raise RunError(f"data: storage no longer answers: {broken[0]}")
        return [part.plain.numpy() for part in found if part.plain is not None]

    by_shard = positions[np.argsort(rows.shard[positions], kind="stable")]
    portions = np.array_split(by_shard, max(1, min(_PORTIONS, len(by_shard))))
    found, done = [], 0
    with ThreadPoolExecutor(readers) as pool:
        try:
            for portion, parts in zip(portions, pool.map(work, portions), strict=True):
                found += parts
                done += len(portion)
                progress(done, len(positions))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shape = (0, config.channels, config.image_size, config.image_size)
    return np.concatenate(found) if found else np.empty(shape, np.uint8)


def plain_batches(
    source: Source, rows: Rows, config: Data, positions: Positions, *, size: int
) -> Iterator[tuple[Positions, torch.Tensor]]:
    """Samples as they are scored, some at a time; those of a shard together.

    Args:
        source: where they are.
        rows: of all samples.
        config: tells the transforms.
        positions: which samples.
        size: most of a batch.

    Yields:
        Which samples, and (k, channels, image size, image size) uint8; what cannot be had is
        missing.

    Raises:
        RunError: storage does not answer.
    """
    ordered = positions[np.argsort(rows.shard[positions], kind="stable")]
    piece, total = Piece(ordered), len(ordered)  # a single one: no shard is read twice
    batches = (
        (Wanted(piece, i, i) for i in range(start, min(start + size, total)))
        for start in range(0, total, size)
    )
    for part in read_parts(source, rows, config, batches):
        if part.broken is not None:
            raise RunError(f"data: storage no longer answers: {part.broken}")
        if part.plain is not None:
            yield ordered[np.array(part.plain_slot)], part.plain
