"""Addresses, and the same few verbs for whatever they name."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from pyarrow import fs

from amint_ray.contracts import UserError, first_line
from amint_ray.storage.s3 import AddressError, Objects, open_bucket


@dataclass(frozen=True)
class Location:
    """Where something is or will be kept; can be pickled, and holds no credentials.

    Attributes:
        uri: as the user wrote it.
        filesystem: takes `path` and what lies below it.
        path: absolute and local, or `bucket/prefix`.
    """

    uri: str
    filesystem: fs.FileSystem
    path: str

    @property
    def remote(self) -> bool:
        """Whether it is on object storage."""
        return _objects(self) is not None

    def below(self, relative: str) -> Location:
        """The location of what lies in it under this name, with `/`."""
        uri = f"{self.uri.rstrip('/')}/{relative}"
        return Location(uri, self.filesystem, _below(self, relative))

    def with_patience(self, *, seconds: float, attempts: int) -> Location:
        """The same place, with other patience for its server (as in `locate`)."""
        objects = _objects(self)
        if objects is None:
            return self
        handler = replace(objects, seconds=seconds, attempts=attempts)
        return Location(self.uri, fs.PyFileSystem(handler), self.path)


@dataclass(frozen=True)
class FileEntry:
    """One file of a location.

    Attributes:
        name: relative to the location, with `/`; the bare name where the location is the file.
        path: what the location's filesystem takes.
        size: bytes.
        version: changes with the content: the ETag on S3, the time of modification elsewhere.
    """

    name: str
    path: str
    size: int
    version: str


def locate(uri: str, key: str, *, seconds: float = 30.0, attempts: int = 3) -> Location:
    """The place that an address names; for S3 the bucket is asked whether it can be listed.

    A local path need not exist, neither must a prefix.

    Args:
        uri: a local path, relative to the working directory or absolute, `~` allowed; or
            `s3://bucket/prefix`. Another S3 server than Amazon's is named by AWS_ENDPOINT_URL.
        key: the configuration key or argument that set it, for errors.
        seconds: how long a server may keep silent, before this gives up and before whatever is done
            with the location later tries again.
        attempts: how often that is tried in all, at growing intervals of up to 20 s.

    Raises:
        UserError: the address means nothing, or S3 does not let us in.
    """
    try:
        if not uri.strip():
            raise AddressError("names nothing; write a local path or s3://BUCKET/PREFIX")
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|s3:", uri)
        if scheme is None:
            return Location(uri, fs.LocalFileSystem(), str(_absolute(uri)))
        if scheme[1] not in (None, "s3"):
            raise AddressError("cannot be reached; write a local path or s3://BUCKET/PREFIX")
        bucket, prefix = _bucket_and_prefix(uri)
        objects = open_bucket(bucket, prefix, seconds=seconds, attempts=attempts)
        return Location(uri, fs.PyFileSystem(objects), f"{bucket}/{prefix}".rstrip("/"))
    except AddressError as error:
        raise UserError(f"{key} = {without_secrets(uri)!r}: {error}") from None


def exists(location: Location, relative: str = "") -> bool:
    """Whether a file or folder is there.

    Raises:
        OSError: it cannot be told, for instance because a server does not answer.
    """
    info = location.filesystem.get_file_info(_below(location, relative))
    return bool(info.type != fs.FileType.NotFound)


def list_files(
    location: Location, suffix: str | None = None, *, follow_links: bool = True
) -> list[FileEntry]:
    """The files at and below a location, by name; none where nothing is there.

    Skipped is whatever has a part of its relative name that begins with `.` or `_`. A symbolic
    link back to a folder that it is in is not followed.

    Args:
        location: a folder, a prefix, or one file.
        suffix: what the names end with, such as ".parquet"; None: any.
        follow_links: whether other links to folders are.

    Raises:
        OSError: a folder cannot be read, a link leads nowhere, or a server does not answer.
    """
    objects = _objects(location)
    if objects is None:
        found = _local_files(location, follow_links=follow_links)
    else:
        found = _remote_files(objects, location)
    listed = [
        entry
        for entry in found
        if entry.name.endswith(suffix or "")
        and (entry.path == location.path or not _hidden(entry.name))
    ]
    return sorted(listed, key=lambda entry: entry.name)


def open_input(location: Location, relative: str) -> Any:
    """A `pyarrow.NativeFile` that can seek, to be closed by whoever opened it.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
    """
    return location.filesystem.open_input_file(_below(location, relative))


@contextmanager
def write_atomically(location: Location, relative: str) -> Iterator[IO[bytes]]:
    """A file to write to, which appears under its name when the body has ended without an error.

    Locally, folders are made as needed and the file is written beside its final place under a name
    that begins with a dot. For S3 it is kept in the local temporary folder until the end. The body
    must not close it.

    Raises:
        OSError: it cannot be written; no trace is left.
    """
    target = _below(location, relative)
    objects = _objects(location)
    if objects is not None:
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            objects.upload(spool, target)
        return
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves the name without the content
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def delete(location: Location, relative: str) -> None:
    """Remove one file; does nothing where there is none.

    Raises:
        OSError: it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        location.filesystem.delete_file(_below(location, relative))


def check_writable(location: Location, key: str) -> None:
    """Write something and remove it again, before work is done that could not be kept.

    Args:
        location: a folder, which need not exist, or a prefix.
        key: the configuration key that set it, for the error.

    Raises:
        UserError: it cannot be written to.
    """
    if not location.remote:
        writable_folder(location.path, key)
        return
    probe = f".amint-probe-{uuid.uuid4().hex}"
    try:
        with write_atomically(location, probe) as file:
            file.write(b"probe")
        delete(location, probe)
    except OSError as error:
        raise UserError(
            f"{key} = {without_secrets(location.uri)!r}: cannot be written to: {first_line(error)}"
        ) from error


def writable_folder(path: str | Path, key: str) -> Path:
    """The absolute path of a folder that can be written or made; nothing is left behind by asking.

    Args:
        path: the folder, relative to the working directory or absolute; it need not exist.
        key: the configuration key or variable that set it, for the error.

    Raises:
        UserError: it cannot be made or written to.
    """
    if "://" in str(path):
        raise UserError(f"{key} = {str(path)!r}: only folders are supported, no addresses")
    try:
        folder = Path(path).expanduser().absolute()
        with tempfile.TemporaryDirectory(dir=_standing(folder)):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        raise _not_writable(path, key, error) from error
    return folder


def check_access(location: Location, key: str) -> None:
    """Whether it seems that a location can be written to; nothing is written to find out.

    What only a write would tell, such as rights on object storage, is not found.

    Args:
        location: a folder, which need not exist, or a prefix.
        key: the configuration key that set it, for the error.

    Raises:
        UserError: it cannot.
    """
    if location.remote:
        return
    check_folder(location, key)
    try:
        standing = _standing(Path(location.path))
        if not os.access(standing, os.W_OK | os.X_OK):
            raise PermissionError(f"{standing} may not be written to")
    except OSError as error:
        raise _not_writable(location.path, key, error) from error


def check_folder(location: Location, key: str) -> None:
    """Whether a local location is a folder, or can become one.

    Args:
        location: where nothing need be yet.
        key: the configuration key that set it, for the error.

    Raises:
        UserError: a file is in its place.
    """
    if location.remote:
        return
    try:
        standing = _standing(Path(location.path))
        if not standing.is_dir():
            raise NotADirectoryError(f"{standing} is no folder")
    except OSError as error:
        raise _not_writable(location.path, key, error) from error


def _standing(folder: Path) -> Path:
    """What is there of a path: itself, or that in which the rest would be made."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _not_writable(path: str | Path, key: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(
        f"{key}: cannot write to {str(path)!r} (in {Path.cwd()}): {reason}; "
        "name another folder, or work in one that is writable"
    )


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:  # ~nobody
        raise AddressError(
            "names the home of a user who is not there; write the path in full"
        ) from None


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    if "?" in uri:
        raise AddressError("takes no options behind a ?; name the server by AWS_ENDPOINT_URL")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise AddressError("holds credentials, which belong into the standard AWS variables")
    if not bucket or not uri.startswith("s3://"):
        raise AddressError("names no bucket; write s3://BUCKET/PREFIX")
    prefix = prefix.strip("/")
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        raise AddressError("has an empty part, '.' or '..' in it; write s3://BUCKET/PREFIX")
    return bucket, prefix


def without_secrets(uri: str) -> str:
    """The address without what other tools let one write into it: `KEY:SECRET@` and `?options`."""
    if "://" not in uri:
        return uri
    return re.sub(r"\?.*", "?***", re.sub(r"://[^/]*@", "://***@", uri), flags=re.S)


def _below(location: Location, relative: str) -> str:
    return f"{location.path.rstrip('/')}/{relative}" if relative else location.path


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _objects(location: Location) -> Objects | None:
    handler = getattr(location.filesystem, "handler", None)
    return handler if isinstance(handler, Objects) else None


def _remote_files(objects: Objects, location: Location) -> Iterator[FileEntry]:
    bucket = location.path.partition("/")[0]
    for found in list(objects.below(location.path)) or objects.at(location.path):
        path = f"{bucket}/{found['Key']}"
        name = path.removeprefix(f"{location.path}/")
        name = path.rpartition("/")[2] if path == location.path else name
        if not name.endswith("/"):  # the marker of a folder, left by another program
            yield FileEntry(name, path, found["Size"], found["ETag"].strip('"'))


def _local_files(location: Location, *, follow_links: bool) -> Iterator[FileEntry]:
    def entry(path: Path, name: str) -> FileEntry:
        status = path.stat()
        return FileEntry(name, str(path), status.st_size, str(status.st_mtime_ns))

    def walk(folder: Path, prefix: str, inside: frozenset[tuple[int, int]]) -> Iterator[FileEntry]:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in inside:
            return
        with os.scandir(folder) as children:
            for child in children:
                if _hidden(child.name):
                    continue
                if child.is_dir():
                    if child.is_symlink() and not follow_links:
                        continue
                    yield from walk(folder / child.name, f"{prefix}{child.name}/", inside | {here})
                else:
                    yield entry(folder / child.name, prefix + child.name)

    top = Path(location.path)
    if top.is_dir():
        yield from walk(top, "", frozenset())
    elif top.exists():
        yield entry(top, top.name)
