"""The suspects of an audit one by one: what the processes left of them, and rows of the report.

What an image is called follows from its place in the source, so of each no more is kept here than
the numbers that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from amint_ray.audit.report import extremes
from amint_ray.audit.suspects import Suspects
from amint_ray.audit.verdict import Judgement
from amint_ray.audit.yardstick import Measured, Yardstick, append
from amint_ray.contracts import UserError
from amint_ray.data.images import BadImage, decode, encode_png
from amint_ray.data.sources import Fault, Raw, count
from amint_ray.evaluation.outputs import Outputs
from amint_ray.launch.attack_parts import read_arrays
from amint_ray.launch.audit_worker import UNTOLD, Arrays, Asked

SHOWN = 2000
"""Images that the report's own document lists at most; images.parquet has them all."""
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "label": pa.int64(),
        "prediction": pa.int64(),
        "class_name": pa.string(),
        "head_score": pa.float64(),
        "outputs_score": pa.float64(),
        "p_head": pa.float64(),
        "p_outputs": pa.float64(),
        "key_matches": pa.int64(),
        "p_key": pa.float64(),
        "p_value": pa.float64(),
        "precision": pa.float64(),
        "decision": pa.string(),
        "duplicate_of": pa.string(),
        "problem": pa.string(),
    }
)
_BATCH = 10_000
"""Rows of images.parquet that are made at a time."""
_THUMBNAIL_SIDE = 160

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Read:
    """What the processes found out.

    Attributes:
        measured: of the images that could be read.
        place: (n,) where each of these is among all images, in the source's order.
        problems: by place, label (−1: none) and reason of each that could not.
    """

    measured: Measured
    place: Places
    problems: Mapping[int, tuple[int, str]]


def read_parts(asked: Asked, parts: Sequence[str], yardstick: Yardstick, *, trained: bool) -> Read:
    """Measure all images, a file after the other; each is read once.

    Args:
        asked: what was looked at.
        parts: names of all files, in the source's order.
        yardstick: what is measured by.
        trained: whether the model's head was.

    Raises:
        UserError: no image could be read.
        RunError: a file is damaged, or storage does not answer.
    """
    measured, places = [], []
    problems: dict[int, tuple[int, str]] = {}
    first = 0
    for name in parts:
        part = read_arrays(asked.place, name)
        usable = part["problem"] == ""
        for row in np.flatnonzero(~usable).tolist():
            problems[first + row] = (int(part["label"][row]), str(part["problem"][row]))
        if usable.any():
            measured.append(yardstick.measure(_suspects(part, usable, asked, trained=trained)))
            places.append(first + np.flatnonzero(usable))
        first += len(usable)
    if not measured:
        raise UserError(
            f"suspects: {asked.found.uri}: none of the {first:,} images can be read; the first: "
            f"{problems[0][1]}"
        )
    return Read(append(measured), np.concatenate(places), problems)


def _suspects(
    part: Arrays, usable: npt.NDArray[np.bool_], asked: Asked, *, trained: bool
) -> Suspects:
    """Those of one file that could be read."""
    told = untold = None
    n = int(usable.sum())
    if asked.evidence != "head":
        told = Outputs(*(part[f"told.{name}"] for name in Outputs.__dataclass_fields__))
        # The other outputs are the same whatever the label.
        untold = replace(told, label_confidence=part[UNTOLD], right=np.zeros_like(told.right))
    return Suspects(
        content=part["content"][usable],
        label=part["label"][usable],
        prediction=part.get("prediction", np.full(n, -1, np.int64)),
        mint_logit=part["mint_logit"] if trained else np.full(n, np.nan),
        taps=part["taps"],
        finite=part["finite"],
        told=told,
        untold=untold,
    )


class Images:
    """Every suspect with its name and what was found of it."""

    def __init__(
        self, asked: Asked, read: Read, judgement: Judgement, class_names: Sequence[str]
    ) -> None:
        """Put names and findings together when they are asked for.

        Args:
            asked: what was looked at.
            read: what came of it.
            judgement: of the images that could be read.
            class_names: the model's.
        """
        self._asked, self._read, self._found = asked, read, judgement.images
        self._source = asked.found.source
        self._class_names = np.array([*class_names, None], object)
        self._starts = np.cumsum([0, *(shard.rows for shard in self._source.shards)])

    def __len__(self) -> int:
        return count(self._source)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All, in the source's order."""
        for first in range(0, len(self), _BATCH):
            yield self._rows(np.arange(first, min(first + _BATCH, len(self))))

    def every(self) -> list[dict[str, Any]]:
        """All as the document has them."""
        return [image for batch in self.batches() for image in batch.to_pylist()]

    def chosen(self, most: int = SHOWN) -> Places:
        """Which images the report speaks of.

        All, or of more than `most` the most and the least likely members, copies left out, and some
        that cannot be judged.
        """
        if len(self) <= most:
            return np.arange(len(self))
        p = self._found["p_value"]
        # Scores decide between ties, as in the report.
        order = np.lexsort((-self._found["outputs_score"], -self._found["head_score"], p))
        judged = np.isfinite(p[order])
        ordered = order[judged & (self._found["duplicate_of"][order] < 0)]
        half = most // 2 - most // 20
        utmost = self._read.place[[*ordered[:half], *ordered[half:][-half:]]]
        silent = [*self._read.problems, *self._read.place[~np.isfinite(p)].tolist()]
        return np.array([*utmost, *sorted(silent)[: most // 10]], np.int64)

    def at(self, places: Places) -> list[dict[str, Any]]:
        """Some, as the document has them."""
        rows: list[dict[str, Any]] = self._rows(places).to_pylist()
        return rows

    def pictures(self, places: Places, each: int) -> dict[str, bytes]:
        """Small PNG pictures by name of the utmost among some images.

        Args:
            places: of these.
            each: how many of the most likely members, and of the least likely.
        """
        images = self.at(places)
        most, least = extremes(images)
        wanted = {image["image"] for image in (*most[:each], *least[:each])}
        names: dict[int, dict[int, str]] = {}
        shard, row = self._where(places)
        for image, s, r in zip(images, shard.tolist(), row.tolist(), strict=True):
            if image["image"] in wanted:
                names.setdefault(s, {})[r] = image["image"]
        found = {}
        for s, of in names.items():
            try:
                stored = self._source.read(s, list(of))
            except OSError:  # it was there when it was looked at
                continue
            for name, raw in zip(of.values(), stored, strict=True):
                if (picture := self._picture(raw)) is not None:
                    found[name] = picture
        return found

    def _picture(self, raw: Raw) -> bytes | None:
        if isinstance(raw, Fault):
            return None
        try:
            rgb = decode(raw, max_megapixels=self._asked.data.max_megapixels)
        except BadImage:
            return None
        rgb.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        return encode_png(rgb)

    def _where(self, places: Places) -> tuple[Places, Places]:
        """Shards, and rows within these."""
        shard = np.searchsorted(self._starts, places, side="right") - 1
        return shard, places - self._starts[shard]

    def _names(self, places: Places) -> list[str]:
        shard, row = self._where(places)
        names = np.empty(len(places), object)
        for each in np.unique(shard).tolist():
            here = np.flatnonzero(shard == each)
            of = self._source.sample_ids(each)
            names[here] = [of[r] for r in row[here].tolist()]
        found: list[str] = names.tolist()
        return found

    def _rows(self, places: Places) -> pa.RecordBatch:
        """These images; a column that says nothing of one is null there."""
        read, found = self._read, self._found
        at = np.searchsorted(read.place, places).clip(0, len(read.place) - 1)
        there = read.place[at] == places
        torn = np.flatnonzero(~there).tolist()

        def numbers(name: str) -> npt.NDArray[np.float64]:
            return np.where(there, found[name][at].astype(np.float64), np.nan)

        label, prediction, p = (numbers(name) for name in ("label", "prediction", "p_value"))
        problems = np.full(len(places), None, object)
        problems[there & ~np.isfinite(p)] = "no finite answer of the model"
        if self._asked.needs_labels:
            problems[there & ~np.isfinite(p) & (label < 0)] = _UNLABELLED
        for row in torn:
            label[row], problems[row] = read.problems[int(places[row])]
        copy = np.where(there, found["duplicate_of"][at], -1)
        original = np.full(len(places), None, object)
        original[copy >= 0] = self._names(read.place[copy[copy >= 0]])
        shown = np.where(label >= 0, label, prediction)
        known = there & (shown >= 0)
        decision = np.full(len(places), None, object)
        decision[there] = np.where(found["flagged"][at[there]], "member", "undecided")
        names = self._class_names[np.where(known, shown, -1).astype(np.int64)]
        columns: dict[str, pa.Array] = {
            "image": pa.array(self._names(places), pa.string()),
            "label": _indices(label),
            "prediction": _indices(prediction),
            "key_matches": _indices(numbers("key_matches")),
            "class_name": pa.array(names, pa.string()),
            "decision": pa.array(decision, pa.string()),
            "duplicate_of": pa.array(original, pa.string()),
            "problem": pa.array(problems, pa.string()),
        }
        for name in SCHEMA.names:
            if name not in columns:
                values = numbers(name)
                columns[name] = pa.array(values, pa.float64(), mask=~np.isfinite(values))
        return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


_UNLABELLED = "has no label, which the model's head needs"


def _indices(values: npt.NDArray[np.float64]) -> pa.Array:
    """Whole numbers, such as class indices; null where there is none."""
    none = ~(values >= 0)
    return pa.array(np.where(none, 0, values).astype(np.int64), pa.int64(), mask=none)
