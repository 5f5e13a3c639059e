"""Where images come from: a source is shards of rows that any process can read on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError

MOST_CLASSES = 1_000_000
"""A larger label is a mistake (an identifier, a hash), not one of that many classes."""
_MOST_UNUSED = 10
_LABELS_SHOWN = 3

# The words by which publishers call their splits, in folders and in the hub's file names.
TRAIN_WORDS = ("train", "training")
VALIDATION_WORDS = ("val", "valid", "validation", "dev")
TEST_WORDS = (*VALIDATION_WORDS, "test", "testing", "eval", "evaluation")


@dataclass(frozen=True)
class Fault:
    """Why a row or a file cannot be used, in one line.

    Attributes:
        reason: the line.
        cause: `content`: what is stored is no usable image, which a first pass remembers. `absent`:
            it is gone, or storage refuses it alone: a first pass leaves it out and the next one
            looks again. `unread`: this machine cannot read it: a first pass stops, since mending
            that would not change the file, by which findings are remembered.
    """

    reason: str
    cause: Literal["content", "absent", "unread"] = "content"


class DamagedError(OSError):
    """A shard that cannot be read, now or later."""


Raw = bytes | Image.Image | Fault
"""What a source gives for a row: the encoded file, an image that needs no decoding, or neither."""


@dataclass(frozen=True)
class Shard:
    """A piece of a source that is read as a whole.

    Attributes:
        rows: how many images it has.
        test: whether they belong to the publisher's test split.
        size: about how many bytes reading it takes.
    """

    rows: int
    test: bool
    size: int


@dataclass(frozen=True)
class Known:
    """What `amint prepare` found out about a shard's images, so that nobody need decode them again.

    Attributes:
        content: (rows,) content hashes.
        width: (rows,) pixels.
        height: (rows,) pixels.
        perceptual: (rows,) 64-bit perceptual hashes, as int64.
    """

    content: Sequence[str]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    perceptual: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Unreadable:
    """A whole file that cannot be opened.

    Attributes:
        name: as the user knows it.
        reason: in one line.
        size: its bytes.
        external: whether it is of `data.external`.
    """

    name: str
    reason: str
    size: int
    external: bool = False


class Source(Protocol):
    """A source that was found and counted; nothing is decoded yet. It can be pickled."""

    class_names: list[str] | None
    """One name a class; None: there are as many classes as the largest label says."""
    shards: list[Shard]
    notes: list[str]
    """What was left out and why, to be shown."""
    unreadable: list[Unreadable]
    """Files that cannot be opened."""
    identity: str
    """Changes when the files do."""

    def sample_ids(self, shard: int) -> list[str]:
        """The rows' names, unique in the source."""

    def labels(self, shard: int) -> list[int | None]:
        """The rows' class indices; None where there is none."""

    def read(self, shard: int, rows: Sequence[int]) -> list[Raw]:
        """Some rows' images.

        Raises:
            DamagedError: the shard is damaged for good.
            FileNotFoundError: it is gone.
            OSError: it cannot be read now.
        """

    def known(self, shard: int) -> Known | None:
        """What is stored about the images beside them, if anything is.

        Raises:
            OSError: the shard cannot be read at all.
        """


def count(source: Source) -> int:
    """Images in all."""
    return sum(shard.rows for shard in source.shards)


def open_source(config: Data) -> Source:
    """Find a source and count its images.

    Args:
        config: which source, and where; `config.external` beside it.

    Raises:
        UserError: it is not there, or does not hold what it should.
    """
    main = _open(
        config.source, config.path, config.image_column, config.label_column, config, "data"
    )
    other = config.external
    if other.source is None:
        return main
    external = _open(
        other.source, other.path, other.image_column, other.label_column, config, "data.external"
    )
    return JoinedSource(main, external)


def open_images(path: str, config: Data, where: str) -> Source:
    """Images alone, whose labels nobody reads.

    Args:
        path: a folder of image files, or of Parquet files, or such a file; local or s3://.
        config: tells the time-out and the Parquet files' image column.
        where: what the path is called, for errors.

    Raises:
        UserError: it is not there, or holds no images.
    """
    from amint_ray.data.contents import look_into
    from amint_ray.storage import locate

    location = locate(path, where, seconds=config.timeout_seconds)
    parquet = look_into(location, f"{where}={path}").parquet > 0
    kind = "parquet" if parquet else "folder"
    try:
        return _open(kind, path, config.image_column if parquet else None, None, config, where)
    except UserError as error:  # which names a key of a configuration, and there is none
        raise UserError(str(error).replace(f"{where}: {where}.path=", f"{where}=")) from error


def _open(
    kind: str,
    path: str | None,
    image_column: str | None,
    label_column: str | None,
    config: Data,
    where: str,
) -> Source:
    """One source; libraries that only some kinds need are imported here."""
    limit = config.limit if where == "data" else config.external.limit
    if kind == "digits":
        from amint_ray.data.arrays import open_digits

        return open_digits(limit)
    if kind == "folder":
        from amint_ray.data.folder import open_folder

        assert path is not None
        return open_folder(
            path,
            limit=limit,
            seconds=config.timeout_seconds,
            where=where,
            classes_needed=where == "data",
        )
    if kind == "parquet":
        from amint_ray.data.parquet import open_parquet

        assert path is not None
        return open_parquet(
            path,
            image_column=image_column,
            label_column=label_column,
            limit=limit,
            seconds=config.timeout_seconds,
            where=where,
        )
    from amint_ray.data.torchvision_sets import open_torchvision

    return open_torchvision(kind.partition(":")[2], path, limit=limit, where=where)


class JoinedSource:
    """A source, and behind it one of images that are all `external`.

    Attributes:
        external_from: the first shard of the second.
    """

    def __init__(self, main: Source, external: Source) -> None:
        self._parts = (main, external)
        self.external_from = len(main.shards)
        self.class_names = main.class_names
        # Labels of the second mean the same only where its classes do.
        self._same_classes = (
            main.class_names is not None and main.class_names == external.class_names
        )
        self.shards = [*main.shards, *(Shard(s.rows, False, s.size) for s in external.shards)]
        self.notes = [*main.notes, *external.notes]
        self.unreadable = [
            *main.unreadable,
            *(replace(f, name=f"external/{f.name}", external=True) for f in external.unreadable),
        ]
        both = f"{main.identity} {external.identity}"
        self.identity = hashlib.sha256(both.encode()).hexdigest()

    def _find(self, shard: int) -> tuple[Source, int]:
        if shard < self.external_from:
            return self._parts[0], shard
        return self._parts[1], shard - self.external_from

    def sample_ids(self, shard: int) -> list[str]:
        """Those of the second begin with `external/`."""
        source, own = self._find(shard)
        ids = source.sample_ids(own)
        return ids if source is self._parts[0] else [f"external/{name}" for name in ids]

    def labels(self, shard: int) -> list[int | None]:
        """None in the second, unless both have the same classes."""
        source, own = self._find(shard)
        if source is self._parts[0]:
            return source.labels(own)
        if not self._same_classes:
            return [None] * self.shards[shard].rows
        known = range(len(self.class_names or ()))
        return [label if label in known else None for label in source.labels(own)]

    def read(self, shard: int, rows: Sequence[int]) -> list[Raw]:
        """Some rows' images."""
        source, own = self._find(shard)
        return source.read(own, rows)

    def known(self, shard: int) -> Known | None:
        """What is stored about the images beside them, if anything is."""
        source, own = self._find(shard)
        return source.known(own)


def external_from(source: Source) -> int:
    """The first shard whose images are all `external`; behind the last one where there is none."""
    return source.external_from if isinstance(source, JoinedSource) else len(source.shards)


def label_fault(label: int | None, names: Sequence[str] | None) -> str | None:
    """Why a label is not one of the classes; None: it is.

    Args:
        label: None: there is none.
        names: one a class; None: any number may be one.
    """
    if label is None:
        return "has no label"
    if label < 0:
        return f"label {label} is negative; labels are counted from 0"
    most = MOST_CLASSES if names is None else len(names)
    if label < most:
        return None
    return f"label {label} is not one of the {most:,} classes 0 to {most - 1}"


def classes_from_labels(
    label: npt.NDArray[np.int64], sample_id: Sequence[str], *, limited: bool
) -> list[str]:
    """Names of the classes where a source has none: the numbers up to the largest label.

    Args:
        label: (n,) labels; −1: none.
        sample_id: the images' names.
        limited: whether these are a part of the source, in which few may have a class.

    Raises:
        UserError: most of these classes would be of no image: a label is a mistake.
    """
    classes = int(label.max()) + 1
    there = np.unique(label[label >= 0]).tolist()
    unseen = limited and len(label) < classes
    if classes > 2 * len(there) and classes - len(there) > _MOST_UNUSED and not unseen:
        shown = [str(number) for number in there]
        if len(shown) > 2 * _LABELS_SHOWN:
            shown[_LABELS_SHOWN:-_LABELS_SHOWN] = ["…"]
        raise UserError(
            f"data: {len(there):,} different labels ({', '.join(shown)}) would make {classes:,} "
            f"classes, since labels are counted from 0; {there[-1]} is that of "
            f"{sample_id[int(label.argmax())]}; name another column by data.label_column=NAME, or "
            "renumber them without gaps"
        )
    return [str(number) for number in range(classes)]
