"""Plain PyTorch data sets, to be measured against: Pillow, the usual transforms, normalised."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision import transforms

_GRAY = (0.5, 0.5, 0.5)


class RowGroups(IterableDataset[tuple[torch.Tensor, int]]):
    """Photographs, each worker's row groups in order, with timm's training transforms."""

    def __init__(self, path: str, size: int) -> None:
        self._groups = [
            (file, group)
            for file in sorted(Path(path).glob("*.parquet"))
            for group in range(pq.ParquetFile(file).metadata.num_row_groups)
        ]
        self._transform = create_transform(
            (3, size, size), is_training=True, interpolation="bicubic", mean=_GRAY, std=_GRAY
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        assert worker is not None
        for file, group in self._groups[worker.id :: worker.num_workers]:
            table = pq.ParquetFile(file).read_row_group(group, columns=["image", "label"])
            images, labels = table["image"].to_pylist(), table["label"].to_pylist()
            for image, label in zip(images, labels, strict=True):
                picture = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
                yield self._transform(picture), label


class Shuffled(Dataset[tuple[torch.Tensor, int]]):
    """Small images, encoded in memory, cropped and flipped."""

    def __init__(self, path: str, size: int) -> None:
        table = pq.read_table(path, columns=["image", "label"])
        self._encoded = [image["bytes"] for image in table["image"].to_pylist()]
        self._labels = table["label"].to_pylist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=size // 8),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(_GRAY, _GRAY),
            ]
        )

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        picture = Image.open(io.BytesIO(self._encoded[i])).convert("RGB")
        return self._transform(picture), self._labels[i]
