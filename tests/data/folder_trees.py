"""Trees of small image files."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy.io import savemat

from amint_ray.contracts import UserError
from amint_ray.data.folder import FileSource, open_folder


def synthetic(name: str) -> npt.NDArray[np.uint8]:
    """(4, 5, 3) noise, another for each name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)


def plant(root: Path, names: Iterable[str]) -> None:
    """Write PNG files, whatever their suffix."""
    for name in names:
        buffer = io.BytesIO()
        Image.fromarray(synthetic(name)).save(buffer, "PNG")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(buffer.getvalue())


def opened(root: Path, **keys: Any) -> FileSource:
    defaults = {"limit": None, "seconds": 1, "where": "data", "classes_needed": True}
    return open_folder(str(root), **{**defaults, **keys})


def refusal(root: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, **keys)
    text = str(caught.value)
    assert text.startswith(f"data: data.path={root}: ")
    assert len(text.splitlines()) == 1
    return text


def listed(source: Any) -> dict[str, tuple[int | None, bool]]:
    """(label, whether it is a test image) of each sample."""
    found: dict[str, tuple[int | None, bool]] = {}
    for number, shard in enumerate(source.shards):
        names, labels = source.sample_ids(number), source.labels(number)
        assert len(names) == len(labels) == shard.rows
        found.update(zip(names, ((label, shard.test) for label in labels), strict=True))
    assert len(found) == sum(shard.rows for shard in source.shards)
    return found


def synsets(numbers: Mapping[int, str]) -> npt.NDArray[np.void]:
    """The table of ImageNet's development kit: the classes, then a family of classes."""
    kind = [
        *(("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")),
        *(("num_children", "O"), ("children", "O"), ("wordnet_height", "O")),
        ("num_train_images", "O"),
    ]
    rows = [
        (float(number), wnid, f"word {wnid}, other {wnid}", "gloss", 0.0, np.zeros(0), 0.0, 1300.0)
        for number, wnid in sorted(numbers.items())
    ]
    family = (
        float(len(rows) + 1),
        "n00001740",
        "entity",
        "gloss",
        2.0,
        np.array([1.0, 2.0]),
        3.0,
        0.0,
    )
    return np.array([*rows, family], dtype=kind)


def devkit(root: Path, numbers: Mapping[int, str], *, truth: Sequence[int]) -> None:
    """ImageNet's development kit as far as it tells the classes of the validation images."""
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets(numbers)[:, None]})
    lines = "\n".join(map(str, truth))
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(f"{lines}\n")
