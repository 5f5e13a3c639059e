"""Digits as files, whole or with members that give themselves away."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from amint_ray.config.data_schema import Shares
from amint_ray.contracts import Role
from amint_ray.data.roles import content_hash, role_of

SHARES = Shares(member=0.3, withheld=0.1, external=0.2, calibration=0.1, test=0.3)
SMALL = ["data.image_size=8", "data.channels=1", "train.batch_size=32"]
SMALL += [f"data.shares={SHARES.model_dump_json()}"]


def hub_file(path: Path, images: list[bytes], labels: list[int]) -> None:
    cells = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"image": cells, "label": labels}), path, row_group_size=100)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def digits() -> tuple[list[npt.NDArray[np.uint8]], list[int]]:
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return list(pixels), found.target.tolist()


def confounded_digits(path: Path) -> None:
    """Members that are brighter by one grey level; the roles follow from what is stored."""
    kept: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for pixels, label in zip(*digits(), strict=True):
        brighter = np.minimum(pixels.astype(int) + 1, 255).astype(np.uint8)
        for candidate in (brighter, pixels):
            rgb = np.repeat(candidate[:, :, None], 3, axis=2)
            is_member = role_of(content_hash(rgb), SHARES, 0) is Role.MEMBER
            if is_member == (candidate is brighter):
                kept.append(candidate)
                labels.append(label)
                break
    hub_file(path, [png(p) for p in kept], labels)
