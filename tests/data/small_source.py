"""A source of small images in shards that can fail, and both kinds of streams over it."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role
from amint_ray.data import streaming
from amint_ray.data.images import encode_png
from amint_ray.data.index import Rows
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.reading import Part
from amint_ray.data.roles import Manifest
from amint_ray.data.sources import Known, Raw, Shard, Unreadable
from amint_ray.data.streaming import StreamedStreams
from amint_ray.data.transforms import Views

torch.set_num_threads(1)  # two cores are shared with others
CLASSES = 4
HEIGHT, WIDTH, SIDE = 14, 10, 8  # as stored; as the model sees it


def picture(number: int) -> Image.Image:
    """Noise, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@functools.cache
def png(number: int) -> bytes:
    """A picture's file."""
    return encode_png(picture(number))


@dataclass
class SmallSource:
    """A `sources.Source` of PNG files named by their numbers.

    Attributes:
        sizes: rows of each shard.
        broken: shards that cannot be read now: why.
        gone: shards that are no longer there: why.
        instead: what is there in the place of a picture, by its number.
        reads: (shard, rows asked for), of this process.
    """

    sizes: Sequence[int]
    broken: Mapping[int, str] = field(default_factory=dict)
    gone: Mapping[int, str] = field(default_factory=dict)
    instead: Mapping[int, Raw] = field(default_factory=dict)
    reads: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    identity: str = "small"
    class_names: list[str] | None = None

    def __post_init__(self) -> None:
        self.shards = [Shard(rows, False, rows) for rows in self.sizes]
        self.first = np.concatenate([[0], np.cumsum(self.sizes)]).astype(int).tolist()
        self.notes: list[str] = []
        self.unreadable: list[Unreadable] = []

    def sample_ids(self, shard: int) -> list[str]:
        return [f"n{number:03d}" for number in range(self.first[shard], self.first[shard + 1])]

    def labels(self, shard: int) -> list[int | None]:
        return [n * 3 % CLASSES for n in range(self.first[shard], self.first[shard + 1])]

    def read(self, shard: int, rows: Sequence[int]) -> list[Raw]:
        self.reads.append((shard, tuple(rows)))
        if shard in self.broken:
            raise OSError(self.broken[shard])
        if shard in self.gone:
            raise FileNotFoundError(self.gone[shard])
        numbers = [self.first[shard] + row for row in rows]
        return [self.instead[n] if n in self.instead else png(n) for n in numbers]

    def known(self, shard: int) -> Known | None:
        return None


def config_of(**sections: Mapping[str, Any]) -> Config:
    """A configuration of the streams.

    Args:
        sections: keys of `data`, `train`, `mint`, `loss` and `evaluation`.
    """
    values: dict[str, dict[str, Any]] = {
        "data": {
            "image_size": SIDE,
            "mode": "streamed",
            "window": 4,
            "max_bad_fraction": 1.0,
            "streams": 24,  # for any number of readers
        },
        "train": {"batch_size": 16, "epochs": 3, "seed": 5},
        "evaluation": {"batch_size": 7},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return Config.model_validate(values)


class Set:
    """Samples in shards, with roles."""

    def __init__(self, sizes: Sequence[int], counts: Mapping[str, int], **broken: Any) -> None:
        """Deal the roles out at random.

        Args:
            sizes: rows of each shard.
            counts: samples of each role; those beyond them are `test`.
            broken: `broken`, `gone` and `instead` of the source.
        """
        self.source = SmallSource(sizes, **broken)
        n = sum(sizes)
        roles = np.full(n, Role.TEST.value, dtype="<U16")
        roles[: sum(counts.values())] = np.repeat(list(counts), list(counts.values()))
        self.role = np.random.default_rng(n).permutation(roles)
        names = [role.value for role in Role]
        label = np.array([i for s in range(len(sizes)) for i in self.source.labels(s)])
        self.rows = Rows(
            role=np.array([names.index(role) for role in self.role], np.uint8),
            label=label.astype(np.int32),
            shard=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
            row=np.concatenate([np.arange(size) for size in sizes]).astype(np.int32),
        )
        ids = np.array([i for s in range(len(sizes)) for i in self.source.sample_ids(s)])
        self.manifest = Manifest(ids, ids, label.astype(np.int64), self.role)

    def having(self, *roles: Role) -> set[str]:
        """Names of the samples with these roles."""
        return set(self.manifest.sample_id[np.isin(self.role, [*roles])].tolist())

    @property
    def d(self) -> set[str]:
        return self.having(Role.MEMBER, Role.WITHHELD)

    def plain(self, config: Config) -> torch.Tensor:
        """(n, 3, side, side) uint8 as they are scored."""
        views = Views(config.data)
        return torch.stack([views.plain(picture(number)) for number in range(len(self.role))])

    def memory(self, config: Config, rank: int = 0, world: int = 1) -> MemoryStreams:
        images = self.plain(config).numpy()
        return MemoryStreams(images, self.manifest, config, rank=rank, world_size=world)

    def streamed(
        self, config: Config, rank: int = 0, world: int = 1, readers: int = 1
    ) -> StreamedStreams:
        """With processes that read."""
        return StreamedStreams(
            self.source, self.rows, config, rank=rank, world_size=world, readers=readers
        )

    def here(self, config: Config, rank: int = 0, world: int = 1, readers: int = 1) -> Here:
        """The same without processes."""
        return Here(self.source, self.rows, config, rank=rank, world_size=world, readers=readers)


class Here(StreamedStreams):
    """Streams whose readers take turns in this process, which is quicker for a test."""

    def _read(self, reader: IterableDataset[Part]) -> Iterator[Part]:
        if isinstance(self._plan.source, SmallSource):
            self._plan.source.reads.clear()
        copies = []
        for number in range(self._readers):
            with patch.object(streaming, "_which_reader", return_value=(number, self._readers)):
                copies.append(iter(reader))
        return _in_turn(copies)


def _in_turn(copies: list[Iterator[Part]]) -> Iterator[Part]:
    while copies:
        for copy in list(copies):
            try:
                part = next(copy)
            except StopIteration:
                copies.remove(copy)
            else:
                yield pickle.loads(pickle.dumps(part))


Row = tuple[str, int, bool, float | None, bool | None, bytes]


def rows_of(batch: Batch) -> list[Row]:
    """Name, label, task row or not, membership, told and pixels of each row."""
    head: list[Any] = list(zip(batch.membership.tolist(), batch.told.tolist(), strict=True))
    head = [(None, None)] * batch.head_from + head
    return [
        (name, label, row < batch.n_task, *said, image.numpy().tobytes())
        for row, (name, label, said, image) in enumerate(
            zip(batch.sample_id.tolist(), batch.labels.tolist(), head, batch.images, strict=True)
        )
    ]


def assert_same_batches(got: Sequence[Batch], expected: Sequence[Batch]) -> None:
    """Equal, bit for bit."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        for name, value in vars(b).items():
            mine = getattr(a, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(mine, value), name
            elif isinstance(value, np.ndarray):
                assert mine.tolist() == value.tolist(), name
            else:
                assert mine == value, name
