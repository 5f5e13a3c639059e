"""Folders of image files, local or on S3; what the folders mean is in `folder_layouts`."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileType

from amint_ray.contracts import UserError, first_line, numbered
from amint_ray.data.folder_layouts import LayoutError, arrange
from amint_ray.data.sources import Fault, Known, Raw, Shard, Unreadable
from amint_ray.storage import Location, locate

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp"),
    *(".webp", ".tif", ".tiff", ".ppm", ".pgm"),
)
_SHARD_ROWS = 256
_READS_AT_ONCE = 16
_PATIENCE = 4
"""Times the time-out: somewhat longer than the three attempts of the storage's client."""
_GONE = (errno.ENOENT, errno.ENOTDIR)
_OWN = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# What S3 says of one object. For words that it alone has, such as InvalidObjectState of what is in
# an archive, pyarrow has a number above 128, and now and then takes them for ACCESS_DENIED.
_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|OBJECT_NOT_IN_ACTIVE_TIER|NO_SUCH_KEY|RESOURCE_NOT_FOUND|"
    r"UNKNOWN \(HTTP status 403\)|\[code (129|1[3-9]\d)\])"
)


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
        seconds: float,
    ) -> None:
        """Cut the files into shards.

        Args:
            location: of the folder.
            files: in any order.
            class_names: one a class; None: there are no classes.
            limit: files of each official split, the first in the shards' order; None: all.
            notes: what was left out and why.
            seconds: that object storage may keep silent.
        """
        self._location = location
        self._seconds = seconds
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
        """Some rows' files; one that is gone, or closed to us, is a fault of its own.

        From object storage several are read at once. Its client makes three attempts for each
        request and waits `seconds` in each; nothing is asked again here. The first file that fails
        so ends the whole read, and so does a time of 4 · `seconds` in which the next file does not
        arrive: a server that keeps silent is waited for no longer than that.

        Raises:
            OSError: object storage keeps silent, or refuses all of several files, or the system
                cannot read now.
        """
        paths = self.sample_ids(shard)
        wanted = [paths[row] for row in rows]
        if not self._location.uri.startswith("s3://"):
            return [self._read(path) for path in wanted]
        found = self._read_at_once(wanted)
        refused = [raw for raw in found if isinstance(raw, Fault) and _REFUSED.search(raw.reason)]
        if 1 < len(refused) == len(found):
            # It is the bucket or the credentials, and no image is to blame.
            raise OSError(f"{self._location.uri}: {refused[0].reason}")
        return found

    def _read_at_once(self, paths: Sequence[str]) -> list[Raw]:
        """Several files of object storage.

        Raises:
            OSError: it keeps silent.
        """
        pool = ThreadPoolExecutor(_READS_AT_ONCE)
        patience = _PATIENCE * self._seconds
        waiting = [pool.submit(self._read, path) for path in paths]
        found: list[Raw] = []
        try:
            for path, file in zip(paths, waiting, strict=True):
                try:
                    found.append(file.result(patience))
                except TimeoutError as error:
                    where = _below(self._location.uri, path)
                    raise OSError(f"{where}: did not arrive within {patience:g} s") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return found

    def known(self, shard: int) -> Known | None:
        """Nothing."""
        return None

    def _read(self, path: str) -> Raw:
        """A file.

        Raises:
            OSError: nothing is wrong with it alone.
        """
        place = self._location
        try:
            with place.filesystem.open_input_file(_below(place.path, path)) as file:
                content: bytes = file.read()
                return content
        except (OSError, ValueError) as error:  # ValueError: pyarrow on a path it dislikes
            fault = _own_fault(error, remote=place.uri.startswith("s3://"))
            if fault is None:
                raise OSError(f"{_below(place.uri, path)}: {_reason(error)}") from error
            return fault


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def _below(folder: str, path: str) -> str:
    return f"{folder.rstrip('/')}/{path}"


def _reason(error: Exception) -> str:
    """In one line, without the path where the system's own word is known."""
    number = getattr(error, "errno", None)
    return f"cannot be read: {os.strerror(number) if number else first_line(error)}"


def _own_fault(error: Exception, *, remote: bool) -> Fault | None:
    """What an error says of one file; None: it may be the machine, the network or the server."""
    reason = _reason(error)
    if not isinstance(error, OSError) or error.errno in _GONE:
        return Fault(reason, "absent")
    if remote:
        return Fault(reason, "absent") if _REFUSED.search(str(error)) else None
    # pyarrow gives no number where a folder has taken the file's place.
    own = error.errno is None or error.errno in _OWN
    return Fault(reason, "unread") if own else None


def open_folder(
    path: str,
    *,
    limit: int | None,
    seconds: float,
    where: str,
    classes_needed: bool,
    follow_links: bool = True,
) -> FileSource:
    """Find the image files and learn from their folders what they are.

    Args:
        path: the folder, local or `s3://`.
        limit: images of each official split; None: all.
        seconds: that object storage may keep silent.
        where: section of the configuration, for errors.
        classes_needed: whether images without a label are of no use.
        follow_links: whether links to folders are.

    Raises:
        UserError: it is not there, or holds no images in folders that can be understood.
    """
    location = locate(path, f"{where}.path", seconds=seconds)
    said = f"{where}: {where}.path={path}"
    try:
        listing = _list(location, follow_links=follow_links)
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
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Listing:
    """What is in a folder: (bytes, time of change in ns) of each image, folders, what is odd."""

    images: dict[str, tuple[int, int]]
    folders: list[str]
    notes: list[str]


def _list(location: Location, *, follow_links: bool) -> _Listing:
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
    unnameable: Counter[str] = Counter()
    parquet = 0
    start = len(_below(location.path, ""))
    for info in entries(location, None if follow_links else []):
        try:
            name = info.path[start:]
        except UnicodeDecodeError:
            unnameable[not_in_utf8(info)] += 1
            continue
        if name.startswith(".") or "/." in name:
            continue
        if info.type == FileType.Directory:
            folders.append(name)
        elif name.lower().endswith(SUFFIXES):
            images[name] = (info.size, info.mtime_ns)
        else:
            parquet += name.endswith(".parquet")
    if not images:
        instead = "; it holds Parquet files, which are for source=parquet" if parquet else ""
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise LayoutError(f"holds no image files ({kinds}){instead}")
    odd = [f"{numbered(number, kind)}, left out" for kind, number in unnameable.items()]
    return _Listing(images, folders, odd)


def not_in_utf8(info: FileInfo) -> str:
    """What those are called of which not even the name can be told."""
    kind = "folders" if info.type == FileType.Directory else "files"
    return f"{kind} not named in UTF-8"


def entries(location: Location, links: list[str] | None = None) -> Iterator[FileInfo]:
    """Files and folders below a folder, but for links back to a folder that they are in.

    A folder whose name is not UTF-8, so that `FileInfo.path` raises, is not looked into.

    Args:
        location: the folder.
        links: links to folders are added here and not followed; None: they are followed.
    """
    if location.uri.startswith("s3://"):
        yield from location.filesystem.get_file_info(FileSelector(location.path, recursive=True))
        return
    waiting = [(location.path, frozenset({os.path.realpath(location.path)}))]
    while waiting:
        folder, above = waiting.pop()
        for info in location.filesystem.get_file_info(FileSelector(folder)):
            if info.type == FileType.Directory:
                try:
                    path = info.path
                except UnicodeDecodeError:
                    yield info
                    continue
                if links is not None and Path(path).is_symlink():
                    links.append(path)
                    continue
                real = os.path.realpath(path)
                if real in above:
                    continue
                waiting.append((path, above | {real}))
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
