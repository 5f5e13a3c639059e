"""The suspects of an audit: where they are, and which of them have a label that the model knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pyarrow.fs import FileType

from amint_ray.config.audit import AuditSettings
from amint_ray.contracts import RunError, UserError, Watcher, first_line, numbered
from amint_ray.data.contents import look_into
from amint_ray.data.folder import Files, FileSource, open_folder
from amint_ray.data.parquet import open_parquet
from amint_ray.data.sources import Source, count
from amint_ray.storage import Location, locate

_WHERE = "suspects"
_CHUNK_ROWS = 2048
_FEWEST_CHUNKS = 16
"""For as many processes at least, where there are shards enough."""
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Found:
    """The suspects, counted; nothing is decoded yet.

    Attributes:
        source: where they are.
        classes: the model's class index of each of the source's classes, −1: the model has no such
            class; None: the source's labels are not used.
        uri: as the user named them.
        left_out: files that are not looked at, by why.
    """

    source: Source
    classes: npt.NDArray[np.int64] | None
    uri: str
    left_out: Mapping[str, int]

    def labels(self, shard: int) -> npt.NDArray[np.int64]:
        """(rows,) the model's class indices; −1: there is none."""
        rows = self.source.shards[shard].rows
        if self.classes is None:
            return np.full(rows, -1, np.int64)
        known = range(len(self.classes))
        own = [label if label in known else None for label in self.source.labels(shard)]
        return np.array([-1 if k is None else self.classes[k] for k in own], np.int64)

    def chunks(self) -> list[list[int]]:
        """The shards in groups of about so many images as one call looks at.

        They follow from the suspects alone: an audit may go on on another cluster.
        """
        groups: list[list[int]] = []
        most = min(_CHUNK_ROWS, count(self.source) // _FEWEST_CHUNKS)
        rows = most
        for shard, each in enumerate(self.source.shards):
            if not groups or rows + each.rows > most:
                groups.append([])
                rows = 0
            groups[-1].append(shard)
            rows += each.rows
        return groups


def find_suspects(
    uri: str, settings: AuditSettings, class_names: Sequence[str], watcher: Watcher
) -> Found:
    """Open whatever the user calls suspects: a folder of images, one image, or Parquet.

    Args:
        uri: local path or `s3://…`.
        settings: tell columns, and whether labels are used.
        class_names: of the model.
        watcher: is told what is left out, and of labels.

    Raises:
        UserError: there is no such place, no image in it, or a column is not there.
    """
    watcher.phase(f"opening {uri}")
    place = locate(uri, _WHERE, seconds=settings.timeout_seconds)
    contents = look_into(place, f"{_WHERE}: {uri}", follow_links=False)
    if contents.place == FileType.NotFound:
        raise UserError(f"{_WHERE}: {uri}: there is no such file or folder")
    try:
        if contents.parquet:
            source: Source = _open_parquet(uri, settings)
        elif contents.place == FileType.File:
            source = _one_file(place, settings)
        else:
            source = open_folder(
                uri,
                limit=None,
                seconds=settings.timeout_seconds,
                where=_WHERE,
                classes_needed=False,
                follow_links=False,
            )
    except (UserError, RunError) as error:
        # The sources speak of the configuration's keys, which an auditor has not written.
        text = first_line(error).replace(f"{_WHERE}.path={uri}: ", f"{uri}: ")
        for key in ("label_column", "image_column"):
            text = text.replace(f"{_WHERE}.{key}", f"audit.{key}")
        raise type(error)(text) from error
    for note in source.notes:
        watcher.notice(f"{_WHERE}: {note}")
    links = {"links to folders": contents.links} if contents.links else {}
    if links:
        told = numbered(contents.links, "links to folders")
        watcher.notice(f"{_WHERE}: not looked into: {told}")
    if contents.others:
        watcher.notice(f"{_WHERE}: not looked at, as they are no images: {contents.told()}")
    for file in source.unreadable:
        watcher.notice(f"{_WHERE}: {file.name} {file.reason}; its images are not looked at")
    if count(source) == 0:
        raise UserError(f"{_WHERE}: {uri}: holds no images")
    left_out = {**contents.others, **contents.unnamed, **links}
    if source.unreadable:
        left_out["Parquet files that cannot be read"] = len(source.unreadable)
    return Found(source, _classes(source, settings, class_names, watcher), uri, left_out)


def _open_parquet(uri: str, settings: AuditSettings) -> Source:
    return open_parquet(
        uri,
        image_column=settings.image_column,
        label_column=settings.label_column if settings.labels else None,
        limit=None,
        seconds=settings.timeout_seconds,
        where=_WHERE,
        labels_needed=False,
        follow_links=False,
    )


def _one_file(place: Location, settings: AuditSettings) -> Source:
    """A folder of one file."""
    folder, _, name = place.path.rpartition("/")
    info = place.filesystem.get_file_info(place.path)
    uri = place.uri.rstrip("/").rpartition("/")[0] or "."
    return FileSource(
        Location(uri, place.filesystem, folder),
        Files(
            path=[name],
            label=np.array([-1], np.int32),
            test=np.zeros(1, np.bool_),
            size=np.array([info.size]),
            version=np.array([info.mtime_ns or 0]),
        ),
        class_names=None,
        limit=None,
        notes=[],
        seconds=settings.timeout_seconds,
    )


def _classes(
    source: Source, settings: AuditSettings, class_names: Sequence[str], watcher: Watcher
) -> npt.NDArray[np.int64] | None:
    """The model's index of each of the source's classes; None where no label is to be used."""
    if not settings.labels:
        return None
    names = source.class_names
    if names is None:
        # Numbers without names: they are the model's, or nothing is known of them.
        return np.arange(len(class_names)) if settings.label_column is not None else None
    index = {name: i for i, name in enumerate(class_names)}
    found = np.array([index.get(name, -1) for name in names], np.int64)
    missing = [name for name, label in zip(names, found.tolist(), strict=True) if label < 0]
    if len(missing) == len(names):
        watcher.notice(
            f"{_WHERE}: none of their classes ({_some(missing)}) is one of the model's "
            f"({_some(list(class_names))}): they count as images without labels"
        )
        return None
    if missing:
        watcher.notice(
            f"{_WHERE}: the model has no class {_some(missing)}: images in there count as images "
            "without labels"
        )
    return found


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + rest
