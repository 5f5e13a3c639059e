"""Any source as Parquet files in the hub's layout, with what a first pass would find out beside."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pyarrow.fs import LocalFileSystem

from amint_ray.config.data_schema import Data
from amint_ray.contracts import RunError, UserError, first_line
from amint_ray.data.images import encode_png
from amint_ray.data.index import examine
from amint_ray.data.parquet import PREPARED, may_pass
from amint_ray.data.sources import DamagedError, Fault, Raw, Source
from amint_ray.storage import (
    FileEntry,
    Location,
    exists,
    list_files,
    open_input,
    write_atomically,
)

_VERSION = 1
_SUMMARY = "prepared.json"
_LOCK = ".prepare.lock"
# Ours and the hub's, which puts a hash behind the number in some sets.
_OF_A_SET = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(?:-[0-9a-f]+)?\.parquet")
_DRAFT = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")  # as `write_atomically` names them
_GROUP_BYTES = 8 * 2**20
_GROUP_ROWS = 1000
_COLUMNS = pa.schema(
    {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "label": pa.int64(),
        "content": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "perceptual": pa.int64(),
    }
)


@dataclass(frozen=True)
class Output:
    """One file to be written.

    Attributes:
        name: of the file.
        shards: what goes into it.
    """

    name: str
    shards: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        rows: images.
        quarantine: (sample id, reason) of what was left out.
    """

    rows: int
    quarantine: list[tuple[str, str]]


def plan_outputs(source: Source, file_mib: float) -> list[Output]:
    """Files of about this size, the official test split in its own; the same plan every time."""
    groups: dict[bool, list[list[int]]] = {False: [], True: []}
    size = {False: 0, True: 0}
    for number, shard in enumerate(source.shards):
        if not groups[shard.test] or size[shard.test] + shard.size > file_mib * 2**20:
            groups[shard.test].append([])
            size[shard.test] = 0
        groups[shard.test][-1].append(number)
        size[shard.test] += shard.size
    return [
        Output(f"{split}-{i:05d}-of-{len(groups[test]):05d}.parquet", tuple(shards))
        for test, split in ((False, "train"), (True, "test"))
        for i, shards in enumerate(groups[test])
    ]


def plan_fingerprint(source: Source, config: Data, outputs: Sequence[Output]) -> str:
    """Changes when the same file name would hold something else."""
    plan = [_VERSION, source.identity, config.max_megapixels, [list(o.shards) for o in outputs]]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


@contextmanager
def sole_writer(location: Location) -> Iterator[None]:
    """Keep other calls from writing to a local folder, which is made, as long as this one does.

    On S3 nothing is kept out: files appear there whole, and two calls write the same.

    Raises:
        UserError: another call is writing there.
        RunError: the folder cannot be made or locked.
    """
    if not isinstance(location.filesystem, LocalFileSystem):
        yield
        return
    folder = Path(location.path)
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"prepare: another call is writing to {location.uri}; wait until it has ended, or "
            "choose another destination"
        ) from None
    except OSError as error:
        raise RunError(
            f"prepare: {location.uri} cannot be locked: {first_line(error)}; choose another "
            "destination"
        ) from error
    try:
        yield
    finally:
        lock.release()


def remove_drafts(location: Location, outputs: Sequence[Output]) -> None:
    """Remove what killed processes had begun to write; for the sole writer alone.

    Only drafts of these outputs and of the summary go; on S3 there are none.

    Args:
        location: of the folder.
        outputs: of the plan.
    """
    if not isinstance(location.filesystem, LocalFileSystem):
        return
    ours = {_SUMMARY, *(output.name for output in outputs)}
    for path in Path(location.path).glob(".*.tmp"):
        draft = _DRAFT.fullmatch(path.name)
        if draft is not None and draft[1] in ours:
            path.unlink(missing_ok=True)


def already_written(
    location: Location, outputs: Sequence[Output], fingerprint: str
) -> dict[str, Written]:
    """Which files of the plan are there, whole.

    Raises:
        UserError: the folder holds other Parquet files, which would mix with these.
        RunError: storage does not answer.
    """
    expected = {output.name for output in outputs}
    found: dict[str, Written] = {}
    try:
        entries = list_files(location, ".parquet")
    except OSError as error:
        raise RunError(
            f"prepare: {location.uri} cannot be read now: {first_line(error)}; the same command "
            "goes on"
        ) from error
    for entry in entries:
        metadata: dict[str, Any] = {}
        try:
            with open_input(location, entry.name) as file:
                footer = pq.ParquetFile(file)
                metadata = json.loads((footer.metadata.metadata or {}).get(PREPARED, b"{}"))
                rows = footer.metadata.num_rows
        except Exception as error:  # pyarrow raises many kinds for a broken file
            if may_pass(error):  # the file may be as good as the others
                raise RunError(
                    f"prepare: {location.uri}: {entry.name} cannot be read now: "
                    f"{first_line(error)}; the same command goes on"
                ) from error
            rows = 0
        if entry.name not in expected or metadata.get("plan") != fingerprint:
            raise UserError(
                f"prepare: {location.uri} holds {entry.name}, which is not of this source with "
                "these settings; choose another destination, or remove it"
            )
        found[entry.name] = Written(rows, [(i, r) for i, r in metadata["quarantine"]])
    return found


def mark_finished(location: Location, summary: Mapping[str, Any]) -> None:
    """Say that all files are there, in a file beside them without which nobody reads them.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with write_atomically(location, _SUMMARY) as file:
            file.write(json.dumps(summary, indent=2).encode())
    except OSError as error:
        raise RunError(
            f"prepare: {_SUMMARY} cannot be written: {first_line(error)}; the same command goes on"
        ) from error


def mark_unfinished(location: Location) -> None:
    """Take that back, before anything is changed or since it does not hold.

    Raises:
        RunError: it cannot be removed.
    """
    try:
        with suppress(FileNotFoundError):
            if exists(location, _SUMMARY):
                location.filesystem.delete_file(f"{location.path.rstrip('/')}/{_SUMMARY}")
    except OSError as error:
        raise RunError(
            f"prepare: {location.uri}: {_SUMMARY} cannot be removed: {first_line(error)}; remove "
            "it, the files beside it are not all there"
        ) from error


def check_complete(
    location: Location,
    entries: Sequence[FileEntry],
    prepared: Sequence[bool],
    *,
    limit: int | None,
    where: str,
) -> list[str]:
    """Whether a folder holds all the files that it should; whoever names one file wants that one.

    Args:
        location: of the source.
        entries: its Parquet files.
        prepared: which of them were written here.
        limit: images of each official split; None: all.
        where: section of the configuration, for errors.

    Returns:
        What is missing where a limit was given, to be shown.

    Raises:
        UserError: files are missing.
        OSError: storage does not answer.
    """
    if entries[0].path == location.path:
        return []
    said = f"{where}: {where}.path={location.uri}"
    missing = _missing_members(entry.name for entry in entries)
    if missing and limit is None:
        raise UserError(
            f"{said}: {' and '.join(missing)}; finish `amint prepare`, or the download, or take "
            f"what is there with {where}.limit=N"
        )
    folders: dict[str, str] = {}
    for entry, ours in zip(entries, prepared, strict=True):
        if ours:
            folders.setdefault(str(PurePosixPath(entry.name).with_name(_SUMMARY)), entry.name)
    for summary, name in folders.items():
        if not exists(location, summary):
            raise UserError(
                f"{said}: {name} has no {_SUMMARY} beside it, with which `amint prepare` ends; "
                "finish it, or the download"
            )
    return missing


def _missing_members(names: Iterable[str]) -> list[str]:
    """A phrase for each set of numbered files, as `train-00003-of-00010.parquet`, not all there."""
    there: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in names:
        if (member := _OF_A_SET.fullmatch(name)) is not None:
            split, number, amount = member.groups()
            there[split, amount].add(number)
    return [
        f"{len(numbers):,} of the {int(amount):,} files {split}-…-of-{amount}.parquet are there"
        for (split, amount), numbers in there.items()
        if len(numbers) < int(amount)
    ]


def write_output(
    source: Source, config: Data, output: Output, location: Location, fingerprint: str
) -> Written:
    """Write one file; it appears whole or not at all.

    Args:
        source: where the images come from.
        config: tells what cannot be used.
        output: which file.
        location: of the folder.
        fingerprint: of the plan, kept in the file.
    """
    # A perceptual hash is stored for whoever wants to group near-duplicates later.
    config = config.model_copy(update={"near_duplicates": 0})
    quarantine: list[tuple[str, str]] = []
    rows = 0
    hub = (
        None if source.class_names is None else {b"huggingface": _hub_metadata(source.class_names)}
    )
    with (
        write_atomically(location, output.name) as file,
        pq.ParquetWriter(file, _COLUMNS.with_metadata(hub)) as writer,
    ):
        for shard in output.shards:
            stored: list[Raw]
            try:
                stored = source.read(shard, range(source.shards[shard].rows))
            except DamagedError as error:
                stored = [Fault(str(error))] * source.shards[shard].rows
            table = examine(source, shard, config, stored=stored)
            if pc.any(table["passing"]).as_py():
                lost = table.filter(table["passing"])
                raise OSError(f"{lost['sample_id'][0].as_py()}: {lost['fault'][0].as_py()}")
            bad = table.filter(table["fault"].is_valid())
            quarantine += zip(bad["sample_id"].to_pylist(), bad["fault"].to_pylist(), strict=True)
            table = table.filter(table["fault"].is_null())
            step = _rows_of_group(source, shard)
            for start in range(0, len(table), step):
                group = _with_images(table.slice(start, step), stored)
                writer.write_table(group.cast(writer.schema))
            rows += len(table)
        mine = {"version": _VERSION, "plan": fingerprint, "quarantine": quarantine}
        writer.add_key_value_metadata({PREPARED: json.dumps(mine)})
    return Written(rows, quarantine)


def _rows_of_group(source: Source, shard: int) -> int:
    """Rows that make a row group small enough to be held by the dozen."""
    each = max(1, source.shards[shard].size // max(1, source.shards[shard].rows))
    return int(np.clip(_GROUP_BYTES // each, 1, _GROUP_ROWS))


def _with_images(rows: pa.Table, stored: Sequence[Raw]) -> pa.Table:
    """The rows of one row group with their encoded images."""
    cells = []
    for row, name in zip(rows["row"].to_pylist(), rows["sample_id"].to_pylist(), strict=True):
        raw = stored[row]
        assert not isinstance(raw, Fault), "it was examined"
        encoded = raw if isinstance(raw, bytes) else encode_png(raw)
        cells.append({"bytes": encoded, "path": name})
    image = pa.array(cells, _COLUMNS.field("image").type)
    columns = {name: rows[name] for name in _COLUMNS.names[1:]}
    return pa.table({"image": image, **columns})


def _hub_metadata(class_names: Sequence[str]) -> bytes:
    """The features as the hub's `datasets` writes and reads them."""
    plain = {"_type": "Value"}
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        "content": {"dtype": "string", **plain},
        "width": {"dtype": "int32", **plain},
        "height": {"dtype": "int32", **plain},
        "perceptual": {"dtype": "int64", **plain},
    }
    return json.dumps({"info": {"features": features}}).encode()
