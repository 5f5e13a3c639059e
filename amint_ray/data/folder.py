"""Folders of image files, local or on S3; what the folders mean is in `folder_layouts`."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileType

from amint_ray.contracts import UserError, first_line
from amint_ray.data.folder_layouts import LayoutError, arrange
from amint_ray.data.sources import Fault, Known, Raw, Shard, Unreadable
from amint_ray.storage import Location, locate

_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp"),
    *(".webp", ".tif", ".tiff", ".ppm", ".pgm"),
)
_SHARD_ROWS = 256
_READS_AT_ONCE = 16
_PASSING = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)
_SECONDS_BETWEEN_TRIES = (0.5, 2.0)


@dataclass(frozen=True)
class Files:
    """Image files, a row each.

    Attributes:
        path: n paths relative to the source's folder, with `/`, all different.
        label: (n,) class indices; −1: none.
        test: (n,) whether they are of the publisher's test split.
        size: (n,) bytes.
        version: (n,) what changes when a file's content does.
    """

    path: list[str]
    label: npt.NDArray[np.int32]
    test: npt.NDArray[np.bool_]
    size: npt.NDArray[np.int64]
    version: npt.NDArray[np.int64]


class FileSource:
    """Image files below one folder; a `sources.Source` that takes little room for millions.

    Files lie sorted by class, and streaming shuffles whole shards: so shards are cut from all files
    of a split in an order that a hash of their paths decides.
    """

    def __init__(
        self,
        location: Location,
        files: Files,
        *,
        class_names: list[str] | None,
        limit: int | None,
        notes: list[str],
    ) -> None:
        """Cut the files into shards.

        Args:
            location: of the folder.
            files: in any order.
            class_names: one a class; None: there are no classes.
            limit: files of each official split, the first in the shards' order; None: all.
            notes: what was left out and why.
        """
        self._location = location
        self.class_names = class_names
        self.notes = notes
        self.unreadable: list[Unreadable] = []
        self.shards: list[Shard] = []
        hashes = np.fromiter((_hash(path) for path in files.path), np.uint64, len(files.path))
        order = np.argsort(hashes, kind="stable")
        splits = [order[files.test[order] == test][:limit] for test in (False, True)]
        for test, split in zip((False, True), splits, strict=True):
            for first in range(0, len(split), _SHARD_ROWS):
                piece = split[first : first + _SHARD_ROWS]
                self.shards.append(Shard(len(piece), test, int(files.size[piece].sum())))
        chosen = np.concatenate(splits)
        self._starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._paths = pa.array([files.path[i] for i in chosen], pa.string())
        self._labels = files.label[chosen]
        digest = hashlib.sha256(repr((location.path, class_names)).encode())
        for i in sorted(chosen.tolist(), key=files.path.__getitem__):
            numbers = (files.label[i], files.test[i], files.size[i], files.version[i])
            digest.update(repr((files.path[i], *map(int, numbers))).encode())
        self.identity = digest.hexdigest()

    def sample_ids(self, shard: int) -> list[str]:
        """The files' relative paths."""
        rows = self._paths.slice(self._starts[shard], self.shards[shard].rows)
        paths: list[str] = rows.to_pylist()
        return paths

    def labels(self, shard: int) -> list[int | None]:
        """The rows' class indices."""
        labels = self._labels[self._starts[shard] : self._starts[shard + 1]].tolist()
        return [label if label >= 0 else None for label in labels]

    def read(self, shard: int, rows: Sequence[int]) -> list[Raw]:
        """Some rows' files; one that cannot be read is a fault of its own.

        Raises:
            OSError: object storage keeps silent, or the system has no more files to open.
        """
        paths = self.sample_ids(shard)
        wanted = [paths[row] for row in rows]
        remote = self._location.uri.startswith("s3://")
        if remote:
            with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
                found = list(pool.map(self._read_persistently, wanted))
        else:
            found = [self._read(path) for path in wanted]
        for error in found:
            if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
                continue
            if remote or error.errno in _PASSING:
                # Nothing is wrong with the image; as a fault it would be remembered.
                raise OSError(f"{self._location.uri}: {_reason(error)}")
        return [raw if isinstance(raw, bytes) else Fault(_reason(raw)) for raw in found]

    def known(self, shard: int) -> Known | None:
        """Nothing."""
        return None

    def _read(self, path: str) -> bytes | Exception:
        try:
            with self._location.filesystem.open_input_file(_below(self._location, path)) as file:
                content: bytes = file.read()
                return content
        except (OSError, ValueError) as error:  # ValueError: pyarrow on a path it dislikes
            return error

    def _read_persistently(self, path: str) -> bytes | Exception:
        """Asks again after a pause where it may have been the network."""
        for pause in _SECONDS_BETWEEN_TRIES:
            found = self._read(path)
            if isinstance(found, bytes | FileNotFoundError):
                return found
            time.sleep(pause)
        return self._read(path)


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def _below(location: Location, path: str) -> str:
    return f"{location.path.rstrip('/')}/{path}"


def _reason(error: Exception) -> str:
    """In one line, without the path where the system's own word is known."""
    number = getattr(error, "errno", None)
    return f"cannot be read: {os.strerror(number) if number else first_line(error)}"


def open_folder(
    path: str, *, limit: int | None, seconds: float, where: str, classes_needed: bool
) -> FileSource:
    """Find the image files and learn from their folders what they are.

    Args:
        path: the folder, local or `s3://`.
        limit: images of each official split; None: all.
        seconds: that object storage may keep silent.
        where: section of the configuration, for errors.
        classes_needed: whether images without a label are of no use.

    Raises:
        UserError: it is not there, or holds no images in folders that can be understood.
    """
    location = locate(path, f"{where}.path", seconds=seconds)
    said = f"{where}: {where}.path={path}"
    try:
        listing = _list(location)
        layout = arrange(
            listing.images,
            listing.folders,
            lambda name, up: _side(location, name, up),
            classes_needed=classes_needed,
        )
    except LayoutError as error:
        raise UserError(f"{said}: {error}") from error
    except OSError as error:
        raise UserError(f"{said}: cannot be read: {first_line(error)}") from error
    details = np.array([listing.images[name] for name in layout.path], np.int64).reshape(-1, 2)
    return FileSource(
        location,
        Files(
            path=layout.path,
            label=np.array(layout.label, np.int32),
            test=np.array(layout.test, np.bool_),
            size=details[:, 0],
            version=details[:, 1],
        ),
        class_names=layout.class_names,
        limit=limit,
        notes=[*listing.notes, *layout.notes],
    )


@dataclass(frozen=True)
class _Listing:
    """What is in a folder: (bytes, time of change in ns) of each image, folders, what is odd."""

    images: dict[str, tuple[int, int]]
    folders: list[str]
    notes: list[str]


def _list(location: Location) -> _Listing:
    """Everything below the folder but what is hidden.

    Raises:
        LayoutError: there is no such folder, or no image in it.
    """
    kind = location.filesystem.get_file_info(location.path).type
    if kind == FileType.NotFound:
        raise LayoutError("there is no such folder")
    if kind != FileType.Directory:
        raise LayoutError("is a file, not a folder of image files")
    images: dict[str, tuple[int, int]] = {}
    folders: list[str] = []
    unnameable = parquet = 0
    start = len(_below(location, ""))
    for info in _entries(location):
        try:
            name = info.path[start:]
        except UnicodeDecodeError:
            unnameable += 1
            continue
        if name.startswith(".") or "/." in name:
            continue
        if info.type == FileType.Directory:
            folders.append(name)
        elif name.lower().endswith(_SUFFIXES):
            images[name] = (info.size, info.mtime_ns)
        else:
            parquet += name.endswith(".parquet")
    if not images:
        instead = "; it holds Parquet files, which are for source=parquet" if parquet else ""
        kinds = ", ".join(suffix[1:] for suffix in _SUFFIXES)
        raise LayoutError(f"holds no image files ({kinds}){instead}")
    odd = f"{unnameable:,} files whose names are not UTF-8, left out"
    return _Listing(images, folders, [odd] if unnameable else [])


def _entries(location: Location) -> Iterator[FileInfo]:
    """All below a folder; a link that leads back to a folder it is in is not followed."""
    if location.uri.startswith("s3://"):
        yield from location.filesystem.get_file_info(FileSelector(location.path, recursive=True))
        return
    waiting = [(location.path, frozenset({os.path.realpath(location.path)}))]
    while waiting:
        folder, above = waiting.pop()
        for info in location.filesystem.get_file_info(FileSelector(folder)):
            if info.type == FileType.Directory:
                real = os.path.realpath(info.path)
                if real in above:
                    continue
                waiting.append((info.path, above | {real}))
            yield info


def _side(location: Location, name: str, up: int) -> bytes | None:
    """A file below the folder's n-th parent; None: it is not there, or beyond what is ours."""
    root = location.path.rstrip("/")
    for _ in range(up):
        root = root.rpartition("/")[0]
    if not root:
        return None
    try:
        with location.filesystem.open_input_file(f"{root}/{name}") as file:
            content: bytes = file.read()
            return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        if up:
            return None
        raise
