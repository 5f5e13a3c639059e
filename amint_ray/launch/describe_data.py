"""What `amint data` says of a source: what is there, and what would become of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from amint_ray.config.schema import Config
from amint_ray.contracts import Role, UserError, Watcher, first_line, numbered
from amint_ray.data.contact_sheet import (
    COLUMNS,
    ROWS,
    contact_sheet,
    may_be_replaced,
    save_sheet,
)
from amint_ray.data.images import BadImage, decode
from amint_ray.data.index import Index, index_here
from amint_ray.data.memory import choose_mode, memory_needed
from amint_ray.data.sources import Fault, Source, count, open_source
from amint_ray.launch.cluster import local_cores

_CONTENT_SHOWN = 16


def describe_data(config: Config, sheet: Path | None, watcher: Watcher) -> dict[str, Any]:
    """Look at every image once.

    Args:
        config: tells the source and how roles are given.
        sheet: PNG file to write; None: none is drawn.
        watcher: is told how far it is.

    Returns:
        `count`, `classes` (names), `roles` (images of each), `duplicates`, `quarantined` (each with
        `sample_id` and `reason`), `unique`, `near_duplicates`, `largest_group` (images of the
        largest group of those), `labels` (images of each class), `sizes`, `official_test`, `mode`,
        `decoded_bytes`, `fingerprint`, `contact_sheet`.

    Raises:
        UserError: there is no such source, nothing in it can be used, or the picture cannot be
            written.
    """
    if sheet is not None and not sheet.absolute().parent.is_dir():
        raise UserError(f"--sheet={sheet}: there is no folder {sheet.absolute().parent}")
    if sheet is not None and not may_be_replaced(sheet):
        raise UserError(
            f"--sheet={sheet}: is there, and is no contact sheet of `amint data`; name another "
            "file with --sheet=FILE, or draw none with --sheet="
        )
    watcher.phase(f"opening {config.data.source}")
    source = open_source(config.data)
    for note in source.notes:
        watcher.notice(f"data: {note}")
    mode = choose_mode(source, config.data)  # what does not fit is told before all is decoded
    total = count(source)
    watcher.phase(f"looking at {numbered(total, 'images')}")
    index = index_here(
        source,
        config.data,
        readers=local_cores(),
        progress=lambda done, total: watcher.event({"phase": "read", "done": done, "total": total}),
    )
    for note in index.notes:
        watcher.notice(f"data: {note}")
    document = _document(config, source, index, mode)
    if sheet is not None:
        watcher.phase("drawing the contact sheet")
        _draw(config, source, index, sheet)
        document["contact_sheet"] = str(sheet)
    return document


def _document(config: Config, source: Source, index: Index, mode: str) -> dict[str, Any]:
    manifest = index.manifest
    labels = Counter(manifest.label[manifest.label >= 0].tolist())
    unique = len(manifest.content) - manifest.duplicates
    return {
        "source": config.data.source,
        "path": config.data.path,
        "count": count(source),
        "classes": index.class_names,
        "labels": {name: labels[i] for i, name in enumerate(index.class_names)},
        "sizes": {"width": _spread(index.width), "height": _spread(index.height)},
        "official_test": int(np.array([s.test for s in source.shards])[index.shard].sum()),
        "roles": manifest.counts,
        "unique": unique,
        "duplicates": manifest.duplicates,
        "near_duplicates": (None if config.data.near_duplicates is None else unique - index.groups),
        "largest_group": index.largest_group,
        "external_overlap": index.overlap,
        "quarantined": [{"sample_id": i, "reason": reason} for i, reason in index.quarantine],
        "mode": mode,
        "decoded_bytes": memory_needed(source, config.data),
        "fingerprint": manifest.fingerprint,
        "contact_sheet": None,
    }


def _spread(pixels: np.ndarray[Any, np.dtype[np.int32]]) -> dict[str, int]:
    return {
        "min": int(pixels.min()),
        "median": int(np.median(pixels)),
        "max": int(pixels.max()),
    }


def _draw(config: Config, source: Source, index: Index, sheet: Path) -> None:
    """A fixed random choice of classes and images."""
    generator = np.random.default_rng(0)
    label = index.manifest.label
    classes = np.unique(label)
    if len(classes) > ROWS:
        classes = np.sort(generator.permutation(classes)[:ROWS])
    rows: dict[str, list[tuple[Role, Any]]] = {}
    for number in classes.tolist():
        name = f"{number}: {index.class_names[number]}" if number >= 0 else "without a label"
        rows[name] = []
        for position in generator.permutation(np.flatnonzero(label == number))[:COLUMNS].tolist():
            shard, row = int(index.shard[position]), int(index.row[position])
            try:
                (raw,) = source.read(shard, [row])
                if not isinstance(raw, Fault):
                    image = decode(raw, max_megapixels=config.data.max_megapixels)
                    rows[name].append((Role(index.manifest.role[position]), image))
            except (OSError, BadImage):
                continue  # was there a moment ago; the sheet does without
    try:
        save_sheet(contact_sheet(rows), sheet)
    except OSError as error:
        raise UserError(f"--sheet={sheet}: cannot be written: {first_line(error)}") from error
