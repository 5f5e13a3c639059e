"""The first pass over a source: what each image is, which role it gets, and what cannot be used.

Any process can examine any shard alone; what they find is put together in the shards' order, so
that neither their number nor their order leaves a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from amint_ray.config.data_schema import Data
from amint_ray.contracts import Role, RunError, UserError
from amint_ray.data.images import BadImage, decode, perceptual_hash
from amint_ray.data.keys import image_content
from amint_ray.data.near_duplicates import deciding_content, largest_group
from amint_ray.data.roles import Manifest, build_manifest, content_hash
from amint_ray.data.sources import (
    MOST_CLASSES,
    DamagedError,
    Fault,
    Raw,
    Source,
    classes_from_labels,
    count,
    external_from,
    label_fault,
)
from amint_ray.data.transforms import Views

Progress = Callable[[int, int], None]
Keep = Callable[[int, Image.Image], None]

_CHUNK_ROWS = 2048
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
        "scored": pa.binary(),
        "fault": pa.string(),
        "passing": pa.bool_(),
    }
)
"""What examining a shard gives, a row an image; `fault` is null where the image can be used, and
`passing` is true where that may change though the source does not. `scored` is the hash of the
pixels as they are scored, where it is wanted."""

Hashes = Literal["roles", "content", "perceptual"]
"""Which hashes of an image are wanted: those that roles need, or also those that codes are of."""


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
        largest_group: images in the largest of these; None: near-duplicates are not grouped.
        notes: what the user should know of it.
        scored: (n,) hashes of the pixels as they are scored; None: they were not wanted.
        perceptual: (n,) perceptual hashes; None likewise.
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
    largest_group: int | None = None
    notes: list[str] = field(default_factory=list)
    scored: list[bytes] | None = None
    perceptual: npt.NDArray[np.int64] | None = None

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
    hashes: Hashes = "roles",
) -> pa.Table:
    """Look at each image of a shard.

    Args:
        source: the shard is of.
        shard: its number.
        config: tells limits, and whether perceptual hashes are wanted.
        keep: called with (row, RGB image) for each that can be used; without it, what is stored
            about the images spares decoding them.
        stored: the shard's images, where they were read already.
        hashes: which are wanted.

    Returns:
        A table of `SCHEMA`.

    Raises:
        OSError: the shard, or a file of it, cannot be read now.
    """
    n = source.shards[shard].rows
    columns: dict[str, list[object]] = {name: [None] * n for name in SCHEMA.names[4:]}
    labels: Sequence[int | None] = [None] * n
    try:
        labels = source.labels(shard)
        known = source.known(shard) if keep is None and hashes != "content" else None
        views = Views(config) if hashes == "content" else None
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
                        if raw.cause == "unread":
                            name = source.sample_ids(shard)[row]
                            raise OSError(f"{name}: {raw.reason}; make it readable, or remove it")
                        raise BadImage(raw.reason, passing=raw.cause == "absent")
                    image = decode(raw, max_megapixels=config.max_megapixels)
                except BadImage as error:
                    columns["fault"][row], columns["passing"][row] = str(error), error.passing
                    continue
                columns["content"][row] = content_hash(np.asarray(image))
                columns["width"][row], columns["height"][row] = image.size
                if config.near_duplicates is not None or hashes == "perceptual":
                    columns["perceptual"][row] = perceptual_hash(image)
                if views is not None:
                    columns["scored"][row] = image_content(views.plain(image).numpy())
                if keep is not None:
                    keep(row, image)
    except DamagedError as error:
        columns["fault"] = [str(error)] * n
    inside = shard < external_from(source)
    for row, label in enumerate(labels):
        if columns["fault"][row] is None and inside:
            columns["fault"][row] = label_fault(label, source.class_names)
    labels = [
        label if label is not None and abs(label) < MOST_CLASSES else None for label in labels
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


def examine_chunk(
    source: Source, shards: Sequence[int], config: Data, hashes: Hashes = "roles"
) -> pa.Table:
    """Several shards' tables as one."""
    return pa.concat_tables([examine(source, shard, config, hashes=hashes) for shard in shards])


def index_here(
    source: Source,
    config: Data,
    *,
    readers: int,
    progress: Progress = lambda done, total: None,
    keep: Callable[[int, int, Image.Image], None] | None = None,
    hashes: Hashes = "roles",
) -> Index:
    """The first pass by threads of this process; Pillow and hashing let them run side by side.

    Args:
        source: to be examined.
        config: tells limits and roles.
        readers: threads.
        progress: called with (images done, images in all).
        keep: called with (shard, row, RGB image) for each image that can be used.
        hashes: which are wanted.

    Raises:
        UserError: nothing in it can be used.
        RunError: storage does not answer.
    """
    total, done, tables = count(source), 0, []

    def look(shard: int) -> pa.Table:
        def keep_row(row: int, image: Image.Image) -> None:
            assert keep is not None
            keep(shard, row, image)

        return examine(source, shard, config, keep=keep and keep_row, hashes=hashes)

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
    group = deciding_content(content, table["perceptual"].to_numpy(), config.near_duplicates)
    inside = {key for key, own in zip(group, external, strict=True) if not own}
    overlap = np.array([own and key in inside for key, own in zip(group, external, strict=True)])
    if overlap.any():
        keep = np.flatnonzero(~overlap)
        table, external = table.take(keep), external[keep]
        content, group = [content[i] for i in keep], [group[i] for i in keep]
    if external.all():
        reason = f"; {quarantine[0][0]}: {quarantine[0][1]}" if quarantine else ""
        raise UserError(f"data: no image can be used ({len(quarantine)} quarantined{reason})")
    names = table["sample_id"].to_pylist()
    largest, notes = largest_group(group, names, config.near_duplicates)
    label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    shard = table["shard"].to_numpy()
    test = np.array([s.test for s in source.shards], np.bool_)[shard]
    manifest = build_manifest(
        names,
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
        class_names=source.class_names
        or classes_from_labels(label, names, limited=config.limit is not None),
        quarantine=quarantine,
        overlap=int(overlap.sum()),
        groups=len(set(group)),
        largest_group=largest,
        notes=notes,
        scored=None if table["scored"].null_count else table["scored"].to_pylist(),
        perceptual=None if table["perceptual"].null_count else table["perceptual"].to_numpy(),
    )
