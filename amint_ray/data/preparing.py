"""Any source as Parquet files in the hub's layout, with what a first pass would find out beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.data.images import encode_png
from amint_ray.data.index import examine
from amint_ray.data.parquet import PREPARED
from amint_ray.data.sources import DamagedError, Fault, Raw, Source
from amint_ray.storage import Location, list_files, open_input, write_atomically

_VERSION = 1
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


def already_written(
    location: Location, outputs: Sequence[Output], fingerprint: str
) -> dict[str, Written]:
    """Which files of the plan are there, whole.

    Raises:
        UserError: the folder holds other Parquet files, which would mix with these.
    """
    expected = {output.name for output in outputs}
    found: dict[str, Written] = {}
    for entry in list_files(location, ".parquet"):
        metadata: dict[str, Any] = {}
        try:
            with open_input(location, entry.name) as file:
                footer = pq.ParquetFile(file)
                metadata = json.loads((footer.metadata.metadata or {}).get(PREPARED, b"{}"))
                rows = footer.metadata.num_rows
        except (OSError, ValueError):
            rows = 0
        if entry.name not in expected or metadata.get("plan") != fingerprint:
            raise UserError(
                f"prepare: {location.uri} holds {entry.name}, which is not of this source with "
                "these settings; choose another destination, or remove it"
            )
        found[entry.name] = Written(rows, [(i, r) for i, r in metadata["quarantine"]])
    return found


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
