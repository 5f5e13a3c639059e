"""Parquet files as the Hugging Face hub publishes them, and what is found in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import Pixels, encoded, noise
from PIL import Image

from amint_ray.config.data_schema import Data, Shares
from amint_ray.contracts import UserError
from amint_ray.data.images import decode
from amint_ray.data.index import Index, index_here
from amint_ray.data.index_folder import IndexFolder
from amint_ray.data.memory import load_memory
from amint_ray.data.sources import Fault, Raw, Source, open_source
from amint_ray.storage import locate

NO_TEST = Shares(member=0.4, withheld=0.1, external=0.3, calibration=0.2, test=0.0)
"""Roles among which `test` comes from the publisher alone."""


def photo(seed: int) -> Pixels:
    """(96, 128, 3) noise with the spectrum of photographs, 1/f."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(128)[None]) + 1 / 128
    spectrum = np.fft.fft2(generator.normal(size=(3, 96, 128))) / frequency
    shared, own = np.fft.ifft2(spectrum).real, np.fft.ifft2(spectrum.mean(0)).real
    values = 0.3 * shared + own
    values = (values - values.min()) / (values.max() - values.min())
    return np.round(values * 255).astype(np.uint8).transpose(1, 2, 0)


def write_hub(
    path: Path,
    images: Sequence[Pixels | bytes | None] | npt.NDArray[np.uint8],
    labels: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
    group_rows: int | None = None,
    **options: Any,
) -> Path:
    """A Parquet file in the hub's layout; images are encoded as PNG, bytes are written as given."""
    cells = [
        {"bytes": encoded(i, "PNG") if isinstance(i, np.ndarray) else i, "path": None}
        for i in images
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            image_column: pa.array(cells, type=kind),
            label_column: pa.array([0] * len(cells) if labels is None else labels),
        }
    )
    if class_names is not None:
        feature = {"_type": "ClassLabel", "names": list(class_names)}
        info = {"info": {"features": {image_column: {"_type": "Image"}, label_column: feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows, **options)
    return path


def plant_pool(root: Path) -> Path:
    """Files of 336 images: copies across files, official test images, a bad image, a bad label."""
    pictures = noise(300, 6, 7, 3)
    for i in range(5):
        own = [*pictures[i * 50 : (i + 1) * 50]]
        own[7] = encoded(pictures[(i * 50 + 61) % 250], "BMP")  # a copy from the next file
        if i == 3:
            own[20] = b"damaged"
        labels = [-5 if (i, j) == (4, 3) else j % 3 for j in range(50)]
        write_hub(root / f"train-{i}.parquet", own, labels, group_rows=11)
    held = [*pictures[250:], *pictures[10:230:22], encoded(pictures[251], "BMP")]
    write_hub(root / "test-0.parquet", held[:30], group_rows=8)
    write_hub(root / "test-1.parquet", [*held[30:], *pictures[:25]], group_rows=30)
    return root


def cut_short(path: Path) -> None:
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(path: Path, group: int, column: str) -> None:
    """Overwrite one column of a row group with zeros; the rest stays as it is."""
    found = pq.ParquetFile(path).metadata.row_group(group)
    chunks = [found.column(i) for i in range(found.num_columns)]
    content = bytearray(path.read_bytes())
    for chunk in chunks:
        if chunk.path_in_schema.split(".")[0] == column:
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            content[start : start + chunk.total_compressed_size] = bytes(
                chunk.total_compressed_size
            )
    path.write_bytes(bytes(content))


def hub(path: Path, **keys: Any) -> Data:
    return Data(source="parquet", path=str(path), **{"image_size": 8, **keys})


def opened(path: Path, **keys: Any) -> Source:
    return open_source(hub(path, **keys))


def indexed(path: Path, **keys: Any) -> Index:
    config = hub(path, **keys)
    return index_here(open_source(config), config, readers=2)


def loaded(path: Path, **keys: Any) -> tuple[npt.NDArray[np.uint8], Index]:
    config = hub(path, **keys)
    return load_memory(open_source(config), config, readers=2)


def every_id(source: Source) -> list[str]:
    return [name for shard in range(len(source.shards)) for name in source.sample_ids(shard)]


def every_label(source: Source) -> list[int | None]:
    return [label for shard in range(len(source.shards)) for label in source.labels(shard)]


def every_raw(source: Source) -> list[Raw]:
    return [
        raw
        for number, shard in enumerate(source.shards)
        for raw in source.read(number, range(shard.rows))
    ]


def as_pixels(raw: Raw) -> Pixels:
    assert isinstance(raw, bytes | Image.Image), raw
    return np.asarray(decode(raw, max_megapixels=178))


def reasons(index: Index) -> dict[str, str]:
    """Why each quarantined image is."""
    found = dict(index.quarantine)
    assert len(found) == len(index.quarantine)
    for reason in found.values():
        assert reason and len(reason.splitlines()) == 1
    return found


def roles(index: Index) -> dict[str, str]:
    """Role by sample id."""
    manifest = index.manifest
    return dict(zip(manifest.sample_id.tolist(), manifest.role.tolist(), strict=True))


def role_by_content(index: Index) -> dict[str, str]:
    """Role by content, which is one for all with the same."""
    manifest = index.manifest
    pairs = set(zip(manifest.content.tolist(), manifest.role.tolist(), strict=True))
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def same(one: Index, other: Index) -> None:
    """Nothing of two indexes differs, not even an order."""
    for name in (field.name for field in fields(one.manifest)):
        assert getattr(one.manifest, name).tolist() == getattr(other.manifest, name).tolist(), name
    assert one.manifest.fingerprint == other.manifest.fingerprint
    for name in ("shard", "row", "width", "height"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    for name in ("class_names", "quarantine", "overlap", "groups"):
        assert getattr(one, name) == getattr(other, name), name


def refusal(path: Path, **keys: Any) -> str:
    """The one line that opening a source ends with."""
    with pytest.raises(UserError) as caught:
        opened(path, **keys)
    text = str(caught.value)
    assert text.startswith("data: ")
    assert len(text.splitlines()) == 1, text
    return text


def faulty(raw: Raw) -> bool:
    return isinstance(raw, Fault)


def index_folder(root: Path, source: Source, config: Data) -> IndexFolder:
    """An index that is kept below a local folder."""
    return IndexFolder(locate(str(root), "test"), source, config)
