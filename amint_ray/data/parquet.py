"""Parquet files in the Hugging Face hub's layout, local or on S3; a shard is a row group."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from amint_ray.contracts import RunError, UserError, first_line
from amint_ray.data.parquet_columns import Columns, holds_indices
from amint_ray.data.sources import TEST_WORDS, DamagedError, Fault, Known, Raw, Shard, Unreadable
from amint_ray.storage import FileEntry, Location, exists, list_files, locate

PREPARED = b"amint_ray"
"""Key of the file metadata in which `amint prepare` says what it wrote."""
_KNOWN = ("content", "width", "height", "perceptual")
_OPEN_FILES = 8
_FOOTERS_AT_ONCE = 8
_ROWS_OF_A_BATCH = 64
_FAILURES = (OSError, ValueError, MemoryError, pa.lib.ArrowException)
"""What pyarrow raises, whatever a file holds."""
_TEST_SPLIT = re.compile(rf"({'|'.join(TEST_WORDS)})(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class _File:
    """A file whose footer was read."""

    path: str
    name: str
    test: bool
    image_column: str
    prepared: bool
    groups: tuple[tuple[int, int], ...]
    """(rows, bytes) of each row group."""


class ParquetSource:
    """Row groups of one or more files; a `sources.Source`."""

    def __init__(
        self,
        location: Location,
        files: Sequence[_File],
        *,
        label_column: str | None,
        class_names: list[str] | None,
        limit: int | None,
        identity: str,
        notes: list[str],
        unreadable: list[Unreadable],
    ) -> None:
        self._location = location
        self._label_column = label_column
        self._files = list(files)
        self._groups: list[tuple[int, int, int]] = []  # file, row group, first row in the file
        self.shards: list[Shard] = []
        taken = {False: 0, True: 0}
        for number, file in enumerate(files):
            first = 0
            for group, (rows, size) in enumerate(file.groups):
                used = rows if limit is None else min(rows, limit - taken[file.test])
                if used > 0:
                    self._groups.append((number, group, first))
                    self.shards.append(Shard(used, file.test, size))
                    taken[file.test] += used
                first += rows
        self.class_names = class_names
        self.notes = notes
        self.unreadable = unreadable
        self.identity = identity
        self._opened = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._opened = threading.local()

    def sample_ids(self, shard: int) -> list[str]:
        """`FILE#ROW`, rows counted from 0 within the file."""
        file, _, first = self._groups[shard]
        name = self._files[file].name
        return [f"{name}#{first + row}" for row in range(self.shards[shard].rows)]

    def labels(self, shard: int) -> list[int | None]:
        """Class indices as they stand in the file."""
        if self._label_column is None:
            return [None] * self.shards[shard].rows
        labels: list[int | None] = self._column(shard, self._label_column).to_pylist()
        return labels[: self.shards[shard].rows]

    def read(self, shard: int, rows: Sequence[int]) -> list[Raw]:
        """The encoded images."""
        file = self._files[self._groups[shard][0]]
        column = self._column(shard, file.image_column)
        # Chunk by chunk, since one array of bytes holds no more than 2 GiB.
        if pa.types.is_struct(column.type):  # a null struct has null fields
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        cells = [column[row].as_py() for row in rows]
        return [cell if cell is not None else Fault("the image column is empty") for cell in cells]

    def known(self, shard: int) -> Known | None:
        """What `amint prepare` stored."""
        file = self._files[self._groups[shard][0]]
        if not file.prepared:
            return None
        table = self._read(shard, list(_KNOWN)).slice(0, self.shards[shard].rows)
        return Known(
            table["content"].to_pylist(),
            *(table[name].to_numpy() for name in _KNOWN[1:]),
        )

    def _column(self, shard: int, name: str) -> pa.ChunkedArray:
        return self._read(shard, [name]).column(name)

    def _read(self, shard: int, columns: list[str]) -> pa.Table:
        """A row group's columns; object storage is asked three times by its client."""
        number, group, _ = self._groups[shard]
        try:
            table = _row_group(self._open(number), group, columns)
            table.validate()
            if table.num_rows != self._files[number].groups[group][0]:
                raise ValueError("a column is cut short")
            return table
        except _FAILURES as error:
            vars(self._opened).pop("files", None)  # a broken handle must not be kept
            name = self._files[number].name
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{name}: is gone: {first_line(error)}") from error
            kind = OSError if may_pass(error) else DamagedError
            raise kind(f"{name}: cannot be read: {first_line(error)}") from error

    def _open(self, number: int) -> pq.ParquetFile:
        """A file's handle; each thread keeps a few open."""
        files: dict[int, pq.ParquetFile] = vars(self._opened).setdefault("files", {})
        if number not in files:
            if len(files) >= _OPEN_FILES:
                del files[next(iter(files))]
            opened = self._location.filesystem.open_input_file(self._files[number].path)
            files[number] = pq.ParquetFile(opened, pre_buffer=True)
        return files[number]


def _row_group(parquet: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
    try:
        return parquet.read_row_group(group, columns=columns)
    except pa.lib.ArrowNotImplementedError:  # images of more than 2 GiB in the hub's structs
        batches = parquet.iter_batches(_ROWS_OF_A_BATCH, row_groups=[group], columns=columns)
        return pa.Table.from_batches(batches)


def open_parquet(
    path: str,
    *,
    image_column: str | None,
    label_column: str | None,
    limit: int | None,
    seconds: float,
    where: str,
    labels_needed: bool = True,
    follow_links: bool = True,
) -> ParquetSource:
    """Find the files and read their footers.

    Args:
        path: file or folder, local or `s3://`.
        image_column: None: the only one that holds images.
        label_column: None: none is read.
        limit: images of each official split; None: all.
        seconds: that object storage may keep silent.
        where: section of the configuration, for errors.
        labels_needed: whether a test split without labels is of no use.
        follow_links: whether links to folders are.

    Raises:
        UserError: nothing is there, not all is there, or a column is not there.
    """
    from amint_ray.data.preparing import check_complete  # which imports this module

    location = locate(path, f"{where}.path", seconds=seconds)
    try:
        entries = list_files(location, ".parquet", follow_links=follow_links)
        there = bool(entries) or exists(location)
    except OSError as error:
        raise UserError(f"{where}: {where}.path={path}: {first_line(error)}") from error
    if not entries:
        if not there:
            raise UserError(f"{where}: {where}.path={path}: there is no such file or folder")
        raise UserError(f"{where}: {where}.path={path}: holds no *.parquet file")
    columns = Columns(image_column, label_column, where)
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        try:
            footers = list(pool.map(lambda entry: _footer(location, entry, label_column), entries))
            ours = [not isinstance(footer, Fault) and footer.prepared for footer in footers]
            notes = check_complete(location, entries, ours, limit=limit, where=where)
        except OSError as error:
            raise RunError(f"{where}: {where}.path={path}: {first_line(error)}") from error
    files: list[_File] = []
    unreadable: list[Unreadable] = []
    unlabelled: list[str] = []
    names: list[str] | None = None
    named_by = ""
    for entry, footer in zip(entries, footers, strict=True):
        if isinstance(footer, Fault):
            unreadable.append(Unreadable(entry.name, footer.reason, entry.size))
            continue
        found = columns.check(footer.schema, entry.name)
        if footer.unlabelled and labels_needed:
            unlabelled.append(entry.name)
            continue
        theirs = _class_names(footer.schema, label_column)
        if names is not None and theirs is not None and theirs != names:
            raise UserError(
                f"{where}: {named_by} and {entry.name} name different classes ({len(names)} and "
                f"{len(theirs)}); give them paths of their own, or write one label for one class"
            )
        if names is None and theirs is not None:
            names, named_by = theirs, entry.name
        files.append(
            _File(
                path=entry.path,
                name=entry.name,
                test=_is_test_split(entry.name),
                image_column=found,
                prepared=footer.prepared,
                groups=footer.groups,
            )
        )
    if not any(rows for file in files for rows, _ in file.groups):
        if unreadable:
            raise UserError(f"{where}: {unreadable[0].name} {unreadable[0].reason}")
        raise UserError(f"{where}: {where}.path={path}: the Parquet files hold no rows")
    # What shards are numbered by belongs to it: a file that could not be opened today has none.
    versions = [(entry.path, entry.size, entry.version) for entry in entries]
    shards = [(f.name, f.test, f.image_column, f.groups) for f in files]
    text = json.dumps([versions, shards, label_column, limit, names])
    return ParquetSource(
        location,
        files,
        label_column=label_column,
        class_names=names,
        limit=limit,
        identity=hashlib.sha256(text.encode()).hexdigest(),
        notes=notes + [f"{name}: a test split without labels, left out" for name in unlabelled],
        unreadable=unreadable,
    )


@dataclass(frozen=True)
class _Footer:
    """What a file's footer says; the file is closed again."""

    schema: pa.Schema
    groups: tuple[tuple[int, int], ...]
    prepared: bool
    unlabelled: bool


def _footer(location: Location, entry: FileEntry, label_column: str | None) -> _Footer | Fault:
    """A file's footer, or why there is none.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        with (
            location.filesystem.open_input_file(entry.path) as opened,
            pq.ParquetFile(opened) as parquet,
        ):
            metadata, schema = parquet.metadata, parquet.schema_arrow
            groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
            return _Footer(
                schema=schema,
                groups=tuple((g.num_rows, g.total_byte_size) for g in groups),
                prepared=PREPARED in (metadata.metadata or {}),
                unlabelled=label_column is not None
                and _is_test_split(entry.name)
                and _unlabelled(parquet, label_column),
            )
    except _FAILURES as error:
        if may_pass(error):
            raise OSError(f"{entry.name}: cannot be read: {first_line(error)}") from error
        return Fault(f"is not a Parquet file, or was cut short: {first_line(error)}")


def may_pass(error: Exception) -> bool:
    """A damaged file is one thing, storage that does not answer and want of memory another."""
    if isinstance(error, OSError):
        return error.errno is not None or "AWS Error" in str(error)
    return isinstance(error, MemoryError | pa.lib.ArrowCancelled)


def _is_test_split(name: str) -> bool:
    """`test-00000-of-00001.parquet`, `validation/0.parquet`: the publisher's word for the split."""
    return any(_TEST_SPLIT.match(part) for part in PurePosixPath(name).parts)


def _unlabelled(parquet: pq.ParquetFile, label_column: str) -> bool:
    """Whether its publisher keeps the labels: all are −1.

    Statistics would tell without reading, but where a damaged footer has them wrong, pyarrow aborts
    the whole process.
    """
    schema = parquet.schema_arrow
    if schema.names.count(label_column) != 1 or not holds_indices(schema.field(label_column).type):
        return False  # `Columns` says what is wrong
    try:
        for group in range(parquet.num_row_groups):
            labels = parquet.read_row_group(group, columns=[label_column]).column(0)
            if any(label not in (None, -1) for label in labels.to_pylist()):
                return False
    except _FAILURES as error:
        if may_pass(error):
            raise
        return False  # reading tells which rows are damaged
    return bool(parquet.metadata.num_rows > 0)


def _class_names(schema: pa.Schema, label_column: str | None) -> list[str] | None:
    """The label column's class names, from the hub's schema metadata if there are any."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None or label_column is None:
        return None
    try:
        names = json.loads(stored)["info"]["features"][label_column]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    return [str(name) for name in names] if names else None
