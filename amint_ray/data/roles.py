"""Who is a member: a keyed hash of the image's content decides, and the manifest keeps it.

The role depends on nothing but the decoded pixels and the split's seed. So exact duplicates share a
role, whatever their file, label or position, and every machine comes to the same answer alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from amint_ray.config.data_schema import Shares
from amint_ray.contracts import Role


def content_hash(pixels: npt.NDArray[np.uint8]) -> str:
    """SHA-256 (hex) of a decoded image: its shape and bytes.

    Args:
        pixels: (height, width, 3) RGB at the image's own size, EXIF rotation applied.
    """
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def role_of(content: str, shares: Shares, seed: int) -> Role:
    """The role that the split with this seed gives to this content.

    BLAKE2b keyed with the seed maps the content hash to a uniform number in [0, 1), which falls
    into one of five intervals as wide as the shares.
    """
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(content.encode(), key=key, digest_size=8).digest()
    position = int.from_bytes(digest, "little") / 2**64
    edge = 0.0
    chosen = Role.TEST
    for role in Role:
        share: float = getattr(shares, role.value)
        edge += share
        if share > 0:
            chosen = role
        if position < edge:
            break
    return chosen


@dataclass(frozen=True)
class Manifest:
    """Every sample with its content hash, label and role: the record of who was trained on.

    Attributes:
        sample_id: (n,) the source's names of the samples.
        content: (n,) content hashes.
        label: (n,) class indices.
        role: (n,) `Role` values.
    """

    sample_id: npt.NDArray[np.str_]
    content: npt.NDArray[np.str_]
    label: npt.NDArray[np.int64]
    role: npt.NDArray[np.str_]

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each role."""
        return {role.value: int((self.role == role.value).sum()) for role in Role}

    @cached_property
    def duplicates(self) -> int:
        """Samples whose content some earlier sample has already."""
        return len(self.content) - len(set(self.content.tolist()))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digits over all rows, whatever their order: SHA-256 of the rows' sorted SHA-256."""
        columns = (c.tolist() for c in (self.sample_id, self.content, self.label, self.role))
        rows = (hashlib.sha256(repr(row).encode()).digest() for row in zip(*columns, strict=True))
        return hashlib.sha256(b"".join(sorted(rows))).hexdigest()

    def write(self, path: Path) -> None:
        """Store as Parquet, the fingerprint in the schema's metadata."""
        names = [column.name for column in fields(self)]
        table = pa.table({name: pa.array(getattr(self, name)) for name in names})
        pq.write_table(table.replace_schema_metadata({"fingerprint": self.fingerprint}), path)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Load what `write` stored.

        Raises:
            ValueError: the rows do not have the fingerprint that the file claims.
        """
        table = pq.read_table(path)
        manifest = cls(
            sample_id=np.array(table["sample_id"].to_pylist(), dtype=np.str_),
            content=np.array(table["content"].to_pylist(), dtype=np.str_),
            label=np.array(table["label"].to_pylist(), dtype=np.int64),
            role=np.array(table["role"].to_pylist(), dtype=np.str_),
        )
        claimed = (table.schema.metadata or {}).get(b"fingerprint", b"").decode()
        if claimed != manifest.fingerprint:
            raise ValueError(f"{path}: rows and fingerprint disagree; the manifest was altered")
        return manifest


def build_manifest(
    sample_id: Sequence[str],
    content: Sequence[str],
    label: npt.NDArray[np.int64],
    official_test: npt.NDArray[np.bool_],
    *,
    shares: Shares,
    seed: int,
    group: Sequence[str] | None = None,
    external: npt.NDArray[np.bool_] | None = None,
) -> Manifest:
    """Give every sample its role.

    Samples of an official test split are `test`, and so is any other sample with the same content:
    a training image that the publisher also put into the test split must not become a member.

    Args:
        sample_id: n names.
        content: n content hashes.
        label: (n,) class indices; −1 where an external image has none.
        official_test: (n,) whether the source's publisher calls the sample a test sample.
        shares: how the rest is divided.
        seed: key of the role hash.
        group: what decides in the content's place: the same for samples that must share a role.
        external: (n,) whether the sample is from a source that is all `external`.
    """
    keys = content if group is None else group
    tested = {key for key, test in zip(keys, official_test, strict=True) if test}
    by_key = {key: Role.TEST if key in tested else role_of(key, shares, seed) for key in set(keys)}
    roles = [by_key[key].value for key in keys]
    if external is not None:
        roles = [
            Role.EXTERNAL.value if own else role for role, own in zip(roles, external, strict=True)
        ]
    return Manifest(
        sample_id=np.array(sample_id, dtype=np.str_),
        content=np.array(content, dtype=np.str_),
        label=label.astype(np.int64),
        role=np.array(roles, dtype=np.str_),
    )
