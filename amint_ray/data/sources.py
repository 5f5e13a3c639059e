"""Where images come from: each source ends as the same in-memory `ImageSet`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from amint_ray.config.schema import Data
from amint_ray.contracts import UserError, first_line
from amint_ray.data.roles import Manifest, build_manifest, content_hash

# A larger label is a mistake (an identifier, a hash), not one of that many classes.
_MOST_CLASSES = 1_000_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageSet:
    """Decoded images in memory.

    Attributes:
        images: (n, channels, size, size) uint8.
        label: (n,) class indices.
        sample_id: n names, unique.
        content: n content hashes of the images before resizing.
        official_test: (n,) whether the publisher calls the sample a test sample.
        class_names: one name a class.
    """

    images: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int64]
    sample_id: list[str]
    content: list[str]
    official_test: npt.NDArray[np.bool_]
    class_names: list[str]

    def manifest(self, config: Data) -> Manifest:
        """Who gets which role, by the configuration's shares and split seed."""
        return build_manifest(
            self.sample_id,
            self.content,
            self.label,
            self.official_test,
            shares=config.shares,
            seed=config.split_seed,
        )


@dataclass(frozen=True)
class _Sample:
    sample_id: str
    image: Image.Image
    label: int
    official_test: bool


def load_source(config: Data, progress: Progress = lambda done, total: None) -> ImageSet:
    """Read and decode a whole source.

    Args:
        config: which source, and the size and channels to bring images to.
        progress: called with (images decoded, images in all) now and then.

    Raises:
        UserError: the source is not there, does not hold what it should, or needs more memory
            than `data.memory_gib`.
    """
    opened = _open_digits(config) if config.source == "digits" else _open_parquet(config)
    shape = (opened.count, config.channels, config.image_size, config.image_size)
    needed = int(np.prod(shape, dtype=np.int64)) / 2**30
    if needed > config.memory_gib:
        raise UserError(
            f"data: {opened.count} images of {config.image_size}×{config.image_size} need "
            f"{needed:.1f} GiB in memory, data.memory_gib allows {config.memory_gib:g}; raise it, "
            "take a part with data.limit=N, or a smaller data.image_size"
        )
    images = np.empty(shape, dtype=np.uint8)
    label = np.empty(opened.count, dtype=np.int64)
    official_test = np.empty(opened.count, dtype=np.bool_)
    sample_id, content = [], []
    for i, sample in enumerate(opened.samples):
        rgb = sample.image.convert("RGB")
        content.append(content_hash(np.asarray(rgb)))
        images[i] = _fit(rgb, size=config.image_size, channels=config.channels)
        label[i], official_test[i] = sample.label, sample.official_test
        sample_id.append(sample.sample_id)
        if i % 1000 == 999:
            progress(i + 1, opened.count)
    names = opened.class_names or [str(c) for c in range(int(label.max()) + 1)]
    outside = np.flatnonzero((label < 0) | (label >= len(names)))
    if len(outside):
        raise UserError(
            f"data: label {label[outside[0]]} of {sample_id[outside[0]]} is not one of the "
            f"{len(names)} classes 0 to {len(names) - 1} ({len(outside)} such labels)"
        )
    return ImageSet(images, label, sample_id, content, official_test, names)


@dataclass(frozen=True)
class _Opened:
    """A source found and counted, its samples not yet decoded."""

    count: int
    samples: Iterator[_Sample]
    class_names: list[str] | None


def _open_digits(config: Data) -> _Opened:
    from sklearn.datasets import load_digits  # a second of import that other sources are spared

    digits = load_digits()
    count = min(len(digits.target), config.limit or len(digits.target))
    # The published grey values are counts from 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)

    def samples() -> Iterator[_Sample]:
        for i in range(count):
            yield _Sample(f"digits/{i}", Image.fromarray(pixels[i]), int(digits.target[i]), False)

    return _Opened(count, samples(), [str(name) for name in digits.target_names])


def _open_parquet(config: Data) -> _Opened:
    assert config.path is not None
    try:
        root = Path(config.path).expanduser()
        if not root.exists():
            raise UserError(f"data: data.path={config.path}: there is no such file or folder")
        files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        raise UserError(f"data: data.path={config.path}: {first_line(error)}") from error
    if not files:
        raise UserError(f"data: data.path={config.path}: holds no *.parquet file")
    opened = [_open_file(file, config) for file in files]
    taken: dict[bool, int] = {False: 0, True: 0}
    plan: list[tuple[pq.ParquetFile, Path, str, bool, int]] = []
    for file, (parquet, image_column) in zip(files, opened, strict=True):
        test = _is_test_split(file.relative_to(root) if root.is_dir() else Path(file.name))
        rows = _check_labels(parquet, file, config.label_column, test=test)
        if config.limit is not None:
            rows = min(rows, config.limit - taken[test])
        taken[test] += rows
        plan.append((parquet, file, image_column, test, rows))
    total = sum(taken.values())
    if total == 0:
        raise UserError(f"data: data.path={config.path}: the Parquet files hold no rows")

    def samples() -> Iterator[_Sample]:
        for parquet, file, image_column, test, rows in plan:
            name = str(file.relative_to(root)) if root.is_dir() else file.name
            try:
                yield from _read_file(parquet, name, image_column, config.label_column, test, rows)
            except (OSError, ValueError) as error:
                raise UserError(f"data: {file}: cannot be read: {first_line(error)}") from error

    return _Opened(total, samples(), _class_names(opened[0][0], config.label_column))


def _is_test_split(file: Path) -> bool:
    """`test-00000-of-00001.parquet`, `validation/0.parquet`: the publisher's word for the split."""
    split = re.compile(r"(test|val|valid|validation)(?![a-z])", re.IGNORECASE)
    return any(split.match(part) for part in file.parts)


def _open_file(file: Path, config: Data) -> tuple[pq.ParquetFile, str]:
    try:
        parquet = pq.ParquetFile(file)
    except Exception as error:  # pyarrow raises OSError, ArrowInvalid and more for a broken file
        raise UserError(f"data: {file} is not a Parquet file: {first_line(error)}") from error
    columns = parquet.schema_arrow.names
    if config.label_column not in columns:
        raise UserError(
            f"data: {file} has no column {config.label_column!r} (data.label_column); "
            f"it has: {', '.join(columns)}"
        )
    image_column = config.image_column
    if image_column is None:
        found = [
            field.name
            for field in parquet.schema_arrow
            if {"bytes"} <= {field.type.field(i).name for i in range(field.type.num_fields)}
        ]
        if len(found) != 1:
            raise UserError(
                f"data: {file} has {len(found)} columns of the form {{bytes, path}}; "
                f"name one with data.image_column=NAME; columns: {', '.join(columns)}"
            )
        image_column = found[0]
    elif image_column not in columns:
        raise UserError(
            f"data: {file} has no column {image_column!r} (data.image_column); "
            f"it has: {', '.join(columns)}"
        )
    return parquet, image_column


def _check_labels(parquet: pq.ParquetFile, file: Path, label_column: str, *, test: bool) -> int:
    """How many rows of a file can be used, found out before any image is decoded.

    That is all of them, or none of a test file that its publisher keeps the labels of (all −1).
    """
    try:
        labels = parquet.read(columns=[label_column]).column(label_column)
    except (OSError, ValueError) as error:
        raise UserError(f"data: {file}: cannot be read: {first_line(error)}") from error
    if not pa.types.is_integer(labels.type) or labels.null_count:
        what = f"{labels.null_count} missing" if labels.null_count else str(labels.type)
        raise UserError(
            f"data: {file}: column {label_column!r} must hold class indices, it holds {what}"
        )
    if len(labels) == 0 or (test and pc.max(labels).as_py() == -1):
        return 0
    if (lowest := pc.min(labels).as_py()) < 0:
        raise UserError(f"data: {file}: label {lowest} is not a class index (0 and up)")
    if (highest := pc.max(labels).as_py()) >= _MOST_CLASSES:
        raise UserError(f"data: {file}: label {highest} is not a class index (below a million)")
    return len(labels)


def _read_file(
    parquet: pq.ParquetFile, name: str, image_column: str, label_column: str, test: bool, rows: int
) -> Iterator[_Sample]:
    row = 0
    for batch in parquet.iter_batches(batch_size=512, columns=[image_column, label_column]):
        for image, label in zip(
            batch.column(image_column).to_pylist(),
            batch.column(label_column).to_pylist(),
            strict=True,
        ):
            if row == rows:
                return
            sample_id = f"{name}#{row}"
            yield _Sample(sample_id, _decode(image, sample_id), label, test)
            row += 1


def _decode(image: object, sample_id: str) -> Image.Image:
    encoded = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(encoded, bytes):
        raise UserError(f"data: {sample_id}: the image column holds no bytes")
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        reason = re.sub(r" <_io\.BytesIO.*", "", first_line(error))
        raise UserError(f"data: {sample_id}: cannot be decoded: {reason}") from error


def _class_names(parquet: pq.ParquetFile, label_column: str) -> list[str] | None:
    """The label column's class names, from the hub's schema metadata if there are any."""
    stored = (parquet.schema_arrow.metadata or {}).get(b"huggingface")
    if stored is None:
        return None
    try:
        names = json.loads(stored)["info"]["features"][label_column]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    return [str(name) for name in names] if names else None


def _fit(rgb: Image.Image, *, size: int, channels: int) -> npt.NDArray[np.uint8]:
    """(channels, size, size): the shorter side to `size`, then the centre."""
    image = rgb if channels == 3 else rgb.convert("L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
