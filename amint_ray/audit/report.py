"""An audit's document as files: `report.html` for a person, `audit.json` and `images.parquet`.

The HTML is one file that fetches nothing and runs nothing: pictures are inlined, and a content
security policy forbids scripts even where escaping should fail. Its words lie in `templates/`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import shlex
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined

from amint_ray.audit import wording
from amint_ray.storage import locate, write_atomically

REPORT, DOCUMENT, IMAGES = "report.html", "audit.json", "images.parquet"
THUMBNAILS = 12
"""Pictures of the most likely members, and as many of the least likely."""
TABLE_ROWS = 100
"""Images in the report's table; the other files have all."""
PROBLEM_ROWS = 20
FEWEST_IN_A_HISTOGRAM = 10
_SMALL = 96
"""Pixels at which a thumbnail is shown; a smaller picture is enlarged without smoothing."""
_PNG = b"\x89PNG\r\n\x1a\n"

Document = Mapping[str, Any]
Image = Mapping[str, Any]


@dataclass(frozen=True)
class Histogram:
    """p-values of one evidence, in bins of equal width from 0 to 1.

    Attributes:
        counts: (bins,) images in each.
        expected: images in each, on average, if none had been trained on.
    """

    counts: list[int]
    expected: float


def write_report(
    document: Document,
    folder: Path,
    thumbnails: Mapping[str, bytes],
    *,
    rows: Iterable[pa.RecordBatch] | None = None,
) -> Path:
    """Write an audit's files; those of an earlier one are replaced.

    Args:
        document: the audit's. Where its `images` are not all, they hold the most and the least
            likely members.
        folder: where to; it is made if need be.
        thumbnails: PNG files by image name; those that `extremes` picks are shown.
        rows: every image, a row each, for `images.parquet`; at least one batch. They are taken
            one after the other and not kept.

    Returns:
        The path of the HTML file.

    Raises:
        OSError: a file cannot be written.
        ValueError: a thumbnail is no PNG file, or `rows` is empty.
    """
    to = locate(str(folder.absolute()), "folder")
    digests = {DOCUMENT: _write(to, DOCUMENT, as_json(document).encode())}
    if rows is not None:
        with write_atomically(to, IMAGES) as file:
            _write_rows(rows, file)
        with (folder / IMAGES).open("rb") as written:
            digests[IMAGES] = hashlib.file_digest(written, "sha256").hexdigest()
    page = render(document, thumbnails, digests=digests)
    _write(to, REPORT, page.encode())
    return folder / REPORT


def render(
    document: Document, thumbnails: Mapping[str, bytes], *, digests: Mapping[str, str]
) -> str:
    """The HTML page of an audit.

    Args:
        document: see `write_report`.
        thumbnails: see `write_report`.
        digests: SHA-256, in hexadecimal, of the files that lie beside the page, by their names.

    Raises:
        ValueError: a thumbnail is no PNG file.
    """
    audit = _finite(document)
    images: Sequence[Image] = audit["images"]
    judged = _judged(images)
    most, least = extremes(images)
    problems = [image for image in images if image["problem"] is not None]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            audit=audit,
            key=audit["evidence"].get("key"),
            confidence=audit.get("confidence", 0.95),
            judged=judged[:TABLE_ROWS],
            problems=problems[:PROBLEM_ROWS],
            problem_count=max(len(problems), _without_answer(audit)),
            galleries=[(_MOST, most), (_LEAST, least)],
            pictures={
                image["image"]: _picture(thumbnails[image["image"]])
                for image in (*most, *least)
                if image["image"] in thumbnails
            },
            # Of the utmost images alone it would show what is not there.
            histograms=_histograms(judged) if len(images) == audit["suspects"]["images"] else {},
            fewest=FEWEST_IN_A_HISTOGRAM,
            rest=IMAGES if IMAGES in digests else DOCUMENT,
            command=_command(audit),
            digests=digests,
        )
    )


def extremes(images: Sequence[Image]) -> tuple[list[Image], list[Image]]:
    """The most and the least likely members among images, the utmost of each first.

    At most `THUMBNAILS` of each, no image in both; copies and what could not be read are left out.

    Args:
        images: of a document.
    """
    unique = [image for image in _judged(images) if image["duplicate_of"] is None]
    most = unique[: min(THUMBNAILS, math.ceil(len(unique) / 2))]
    rest = unique[len(most) :]
    return most, rest[: -THUMBNAILS - 1 : -1]


def as_json(document: Document) -> str:
    """The document as JSON; numbers that are not finite, which JSON does not have, are null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


_MOST, _LEAST = "Most likely members", "Least likely members"


def _finite(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {key: _finite(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_finite(value) for value in part]
    return None if isinstance(part, float) and not math.isfinite(part) else part


def _write(to: Any, name: str, content: bytes) -> str:
    """Write a file; gives its SHA-256."""
    with write_atomically(to, name) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def _write_rows(rows: Iterable[pa.RecordBatch], file: Any) -> None:
    batches = iter(rows)
    first = next(batches, None)
    if first is None:
        raise ValueError("rows: no batch, so that the columns are not known")
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _judged(images: Sequence[Image]) -> list[Image]:
    """Images that have a p-value, the most likely members first; scores decide between ties."""

    def order(image: Image) -> tuple[float, ...]:
        scores = (image.get("key_matches"), image["head_score"], image["outputs_score"])
        return (image["p_value"], *(math.inf if score is None else -score for score in scores))

    return sorted((image for image in images if image["p_value"] is not None), key=order)


def _histograms(judged: Sequence[Image]) -> dict[str, Histogram]:
    """By evidence, where enough images have a p-value; copies are left out."""
    found = {}
    for name in ("key", "head", "outputs"):
        values = [
            image[f"p_{name}"]
            for image in judged
            if image["duplicate_of"] is None and image.get(f"p_{name}") is not None
        ]
        if len(values) < FEWEST_IN_A_HISTOGRAM:
            continue
        bins = 20 if len(values) >= 100 else 10
        counts = [0] * bins
        for value in values:
            # p-values are in (0, 1]: a bin has its upper end, for which 0.7 · 10 must be 7.
            counts[max(0, math.ceil(round(value * bins, 9)) - 1)] += 1
        found[name] = Histogram(counts, len(values) / bins)
    return found


def _picture(png: bytes) -> dict[str, Any]:
    """A PNG file as a data URI, and whether it is to be enlarged pixel by pixel."""
    if not png.startswith(_PNG) or len(png) < 24:
        raise ValueError("a thumbnail is no PNG file")
    width, height = struct.unpack(">II", png[16:24])
    encoded = base64.b64encode(png).decode("ascii")
    return {"uri": f"data:image/png;base64,{encoded}", "small": max(width, height) < _SMALL}


def _without_answer(audit: Document) -> int:
    """Images that could not be read, or of which the model said nothing finite."""
    suspects = audit["suspects"]
    return int(suspects["unreadable"] + suspects.get("not_finite", 0))


def _command(document: Document) -> str:
    """What repeats the audit in a shell."""
    words = ["amint", "audit", document["model"]["uri"], document["suspects"]["source"]]
    words += [f"--{name}={document[name]:.12g}" for name in ("prior", "fdr")]
    if "key" in document["evidence"]:
        words.append("--key-file=KEY_FILE")  # where the key lies is nobody else's business
    words += [f"audit.{name}={value}" for name, value in document["settings"].items()]
    return shlex.join(words)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("amint_ray.audit", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=wording.shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(wording.FILTERS)
    environment.globals.update(wording.GLOBALS)
    return environment
