"""What a place holds that somebody named without saying which kind it is: images or Parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pyarrow.fs import FileType

from amint_ray.contracts import UserError, first_line, numbered
from amint_ray.data.folder import SUFFIXES, entries, not_in_utf8
from amint_ray.storage import Location


@dataclass(frozen=True)
class Contents:
    """How many files of which kind are there; nothing is opened.

    Attributes:
        place: a file, a folder, or nothing.
        images: image files.
        parquet: Parquet files.
        others: those that nobody looks at, by what they are: `.heic files`, `hidden files`.
        unnamed: `files not named in UTF-8`, and such folders; whoever lists the images tells.
        links: links to folders that were not followed.
    """

    place: FileType
    images: int
    parquet: int
    others: Mapping[str, int]
    unnamed: Mapping[str, int]
    links: int

    def told(self) -> str:
        """The others in words, the most first."""
        found = sorted(self.others.items(), key=lambda each: (-each[1], each[0]))
        return ", ".join(numbered(number, kind) for kind, number in found)


def look_into(location: Location, said: str, *, follow_links: bool = True) -> Contents:
    """Count the files of a folder, or take one file as the folder's only one.

    Args:
        location: which may hold nothing, or not be there.
        said: what an error begins with.
        follow_links: whether links to folders are.

    Raises:
        UserError: it holds both kinds, of which only one could be meant; or it cannot be read.
    """
    counted: Counter[str] = Counter()
    unnamed: Counter[str] = Counter()
    links: list[str] = []
    try:
        info = location.filesystem.get_file_info(location.path)
        if info.type == FileType.File:
            counted[_kind(info.base_name, alone=True)] += 1
        elif info.type == FileType.Directory:
            start = len(location.path.rstrip("/")) + 1
            for entry in entries(location, None if follow_links else links):
                try:
                    name = entry.path[start:]
                except UnicodeDecodeError:
                    unnamed[not_in_utf8(entry)] += 1
                    continue
                if entry.type != FileType.Directory:
                    counted[_kind(name)] += 1
    except OSError as error:
        raise UserError(f"{said}: cannot be read: {first_line(error)}") from error
    images, parquet = counted.pop(_IMAGES, 0), counted.pop(_PARQUET, 0)
    if images and parquet:
        raise UserError(
            f"{said}: holds images ({images:,}) and Parquet files ({parquet:,}); name one of them, "
            "or put either kind into a folder of its own"
        )
    return Contents(info.type, images, parquet, dict(counted), dict(unnamed), len(links))


_IMAGES, _PARQUET, _HIDDEN = "images", "parquet", "hidden files"


def _kind(name: str, *, alone: bool = False) -> str:
    parts = name.split("/")
    if not alone and any(part.startswith(".") for part in parts):
        return _HIDDEN
    if name.endswith(".parquet"):
        # Writers of Parquet mark by it what is unfinished, and readers pass it over.
        return _HIDDEN if not alone and any(part.startswith("_") for part in parts) else _PARQUET
    if alone or name.lower().endswith(SUFFIXES):
        return _IMAGES
    suffix = PurePosixPath(name).suffix.lower()
    return f"{suffix} files" if suffix else "files without a suffix"
