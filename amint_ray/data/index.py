"""The first pass over a source: what each image is, which role it gets, and what cannot be used.

Any process can examine any shard alone; what they find is put together in the shards' order, so
that neither their number nor their order leaves a trace.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from amint_ray.config.data_schema import Data
from amint_ray.contracts import Role, RunError, UserError
from amint_ray.data.images import BadImage, decode, perceptual_hash
from amint_ray.data.near_duplicates import near_duplicate_groups
from amint_ray.data.roles import Manifest, build_manifest, content_hash
from amint_ray.data.sources import DamagedError, Fault, Raw, Source, count, external_from

Progress = Callable[[int, int], None]
Keep = Callable[[int, Image.Image], None]

_VERSION = 1
_CHUNK_ROWS = 2048
# A larger label is a mistake (an identifier, a hash), not one of that many classes.
_MOST_CLASSES = 1_000_000
_ROLES = [role.value for role in Role]

SCHEMA = pa.schema(
    {
        "shard": pa.int32(),
        "row": pa.int32(),
        "sample_id": pa.string(),
        "label": pa.int64(),
        "content": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "perceptual": pa.int64(),
        "fault": pa.string(),
    }
)
"""What examining a shard gives, a row an image; `fault` is null where the image can be used."""


@dataclass(frozen=True)
class Rows:
    """What a worker must know of n samples: 13 bytes each, so that any number fits.

    Attributes:
        role: (n,) uint8, positions in `list(Role)`.
        label: (n,) int32; −1 where there is none.
        shard: (n,) int32.
        row: (n,) int32, within the shard.
    """

    role: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int32]
    shard: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]

    def having(self, roles: Iterable[Role]) -> npt.NDArray[np.int64]:
        """Positions of the samples with one of these roles."""
        codes = [_ROLES.index(role.value) for role in roles]
        return np.flatnonzero(np.isin(self.role, codes))


@dataclass(frozen=True)
class Index:
    """All of a source's usable images, and the others.

    Attributes:
        manifest: who is a member.
        shard: (n,) where each sample is, in the manifest's order.
        row: (n,) within the shard.
        width: (n,) pixels as stored.
        height: (n,) pixels as stored.
        class_names: one a class.
        quarantine: (sample id, reason) of what cannot be used.
        overlap: images of `data.external` left out because the pool has them, too.
        groups: how many different contents, or groups of near-duplicates, there are.
    """

    manifest: Manifest
    shard: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    class_names: list[str]
    quarantine: list[tuple[str, str]]
    overlap: int
    groups: int

    def rows(self) -> Rows:
        """What a worker needs of it."""
        codes = {role: code for code, role in enumerate(_ROLES)}
        return Rows(
            role=np.array([codes[role] for role in self.manifest.role.tolist()], np.uint8),
            label=self.manifest.label.astype(np.int32),
            shard=self.shard,
            row=self.row,
        )


def examine(
    source: Source,
    shard: int,
    config: Data,
    *,
    keep: Keep | None = None,
    stored: Sequence[Raw] | None = None,
) -> pa.Table:
    """Look at each image of a shard.

    Args:
        source: the shard is of.
        shard: its number.
        config: tells limits, and whether perceptual hashes are wanted.
        keep: called with (row, RGB image) for each that can be used; without it, what is stored
            about the images spares decoding them.
        stored: the shard's images, where they were read already.

    Returns:
        A table of `SCHEMA`.

    Raises:
        OSError: the shard cannot be read now.
    """
    n = source.shards[shard].rows
    columns: dict[str, list[object]] = {
        name: [None] * n for name in ("content", "width", "height", "perceptual", "fault")
    }
    labels: Sequence[int | None] = [None] * n
    try:
        labels = source.labels(shard)
        known = source.known(shard) if keep is None else None
        if known is not None:
            for name in ("content", "width", "height", "perceptual"):
                columns[name] = list(getattr(known, name))
            pixels = known.width.astype(np.int64) * known.height
            for row in np.flatnonzero(pixels > config.max_megapixels * 1e6).tolist():
                size = f"{known.width[row]}×{known.height[row]}"
                columns["fault"][row] = f"{size} pixels, more than data.max_megapixels allows"
        else:
            for row, raw in enumerate(stored or source.read(shard, range(n))):
                try:
                    if isinstance(raw, Fault):
                        raise BadImage(raw.reason)
                    image = decode(raw, max_megapixels=config.max_megapixels)
                except BadImage as error:
                    columns["fault"][row] = str(error)
                    continue
                columns["content"][row] = content_hash(np.asarray(image))
                columns["width"][row], columns["height"][row] = image.size
                if config.near_duplicates is not None:
                    columns["perceptual"][row] = perceptual_hash(image)
                if keep is not None:
                    keep(row, image)
    except DamagedError as error:
        columns["fault"] = [str(error)] * n
    inside = shard < external_from(source)
    for row, label in enumerate(labels):
        if columns["fault"][row] is None and inside:
            columns["fault"][row] = _label_fault(label, source.class_names)
    labels = [
        label if label is not None and abs(label) < _MOST_CLASSES else None for label in labels
    ]
    return pa.table(
        {
            "shard": np.full(n, shard, np.int32),
            "row": np.arange(n, dtype=np.int32),
            "sample_id": source.sample_ids(shard),
            "label": pa.array(labels, pa.int64()),
            **columns,
        },
        schema=SCHEMA,
    )


def _label_fault(label: int | None, names: Sequence[str] | None) -> str | None:
    if label is None:
        return "has no label"
    most = _MOST_CLASSES if names is None else len(names)
    if 0 <= label < most:
        return None
    return f"label {label} is not one of the {most:,} classes 0 to {most - 1}"


def chunks(source: Source) -> list[list[int]]:
    """The shards in groups of a few thousand images, which one call examines."""
    groups: list[list[int]] = []
    rows = _CHUNK_ROWS
    for shard, found in enumerate(source.shards):
        if rows >= _CHUNK_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(shard)
        rows += found.rows
    return groups


def examine_chunk(source: Source, shards: Sequence[int], config: Data) -> pa.Table:
    """Several shards' tables as one."""
    return pa.concat_tables([examine(source, shard, config) for shard in shards])


def index_here(
    source: Source,
    config: Data,
    *,
    readers: int,
    progress: Progress = lambda done, total: None,
    keep: Callable[[int, int, Image.Image], None] | None = None,
) -> Index:
    """The first pass by threads of this process; Pillow and hashing let them run side by side.

    Args:
        source: to be examined.
        config: tells limits and roles.
        readers: threads.
        progress: called with (images done, images in all).
        keep: called with (shard, row, RGB image) for each image that can be used.

    Raises:
        UserError: nothing in it can be used.
        RunError: storage does not answer.
    """
    total, done, tables = count(source), 0, []

    def look(shard: int) -> pa.Table:
        return examine(
            source, shard, config, keep=keep and (lambda row, image: keep(shard, row, image))
        )

    with ThreadPoolExecutor(readers) as pool:
        try:
            for table in pool.map(look, range(len(source.shards))):
                tables.append(table)
                done += len(table)
                progress(done, total)
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise RunError(f"data: cannot be read now: {error}") from error
    return settle(source, tables, config)


class IndexFolder:
    """Parts of an index on disk, so that a pass can be shared, interrupted and used again."""

    def __init__(self, root: Path, source: Source, config: Data) -> None:
        """Name the folder by all that the parts depend on.

        Args:
            root: where indexes are kept; all readers must see it.
            source: what is indexed.
            config: tells what the parts depend on beside the source.
        """
        asked = [_VERSION, source.identity, config.max_megapixels, config.near_duplicates is None]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
        self.path = root / "indexes" / key
        self._chunks = chunks(source)

    def _part(self, chunk: int) -> Path:
        return self.path / f"part-{chunk:06d}.parquet"

    def missing(self) -> list[int]:
        """Chunks that nobody has examined yet."""
        return [c for c in range(len(self._chunks)) if not self._part(c).is_file()]

    def rows(self, chunk: int, source: Source) -> int:
        """How many images a chunk has."""
        return sum(source.shards[shard].rows for shard in self._chunks[chunk])

    def write(self, chunk: int, source: Source, config: Data) -> None:
        """Examine a chunk and keep what was found.

        Raises:
            OSError: a shard cannot be read now.
        """
        table = examine_chunk(source, self._chunks[chunk], config)
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / f".part-{chunk:06d}-{uuid.uuid4().hex}"
        pq.write_table(table, draft)
        draft.replace(self._part(chunk))

    def read(self, source: Source, config: Data) -> Index:
        """All parts together.

        Raises:
            UserError: nothing in the source can be used.
        """
        parts = [pq.read_table(self._part(c)) for c in range(len(self._chunks))]
        return settle(source, parts, config)


def settle(source: Source, tables: Sequence[pa.Table], config: Data) -> Index:
    """Who gets which role, and what is left out; the tables may come in any order.

    Raises:
        UserError: nothing can be used.
    """
    table = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("row", "ascending")])
    quarantine = [(file.name, file.reason) for file in source.unreadable]
    broken = table.filter(table["fault"].is_valid())
    quarantine += zip(broken["sample_id"].to_pylist(), broken["fault"].to_pylist(), strict=True)
    table = table.filter(table["fault"].is_null())
    external = table["shard"].to_numpy() >= external_from(source)
    content = table["content"].to_pylist()
    group = _groups(table, config.near_duplicates)
    inside = {key for key, own in zip(group, external, strict=True) if not own}
    overlap = np.array([own and key in inside for key, own in zip(group, external, strict=True)])
    if overlap.any():
        keep = np.flatnonzero(~overlap)
        table, external = table.take(keep), external[keep]
        content, group = [content[i] for i in keep], [group[i] for i in keep]
    if len(table) == 0:
        reason = f"; {quarantine[0][0]}: {quarantine[0][1]}" if quarantine else ""
        raise UserError(f"data: no image can be used ({len(quarantine)} quarantined{reason})")
    label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    shard = table["shard"].to_numpy()
    test = np.array([s.test for s in source.shards], np.bool_)[shard]
    manifest = build_manifest(
        table["sample_id"].to_pylist(),
        content,
        label,
        test,
        shares=config.shares,
        seed=config.split_seed,
        group=group,
        external=external,
    )
    return Index(
        manifest=manifest,
        shard=shard,
        row=table["row"].to_numpy(),
        width=table["width"].to_numpy(),
        height=table["height"].to_numpy(),
        class_names=source.class_names or [str(c) for c in range(int(label.max()) + 1)],
        quarantine=quarantine,
        overlap=int(overlap.sum()),
        groups=len(set(group)),
    )


def _groups(table: pa.Table, distance: int | None) -> list[str]:
    """What decides each row's role: its content, or that of the first of its near-duplicates."""
    content: list[str] = table["content"].to_pylist()
    if distance is None:
        return content
    group = near_duplicate_groups(table["perceptual"].to_numpy(), distance)
    leader: dict[int, str] = {}
    for number, key in zip(group.tolist(), content, strict=True):
        leader[number] = min(key, leader.get(number, key))
    return [leader[number] for number in group.tolist()]
