"""Roles: a function of content and seed alone, in the shares asked for; and the manifest."""

from __future__ import annotations

import hashlib
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from amint_ray.config.data_schema import Shares
from amint_ray.contracts import Role
from amint_ray.data.roles import Manifest, build_manifest, content_hash, role_of

N = 20_000
CONTENTS = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(N)]
SHARES = Shares()
UNEVEN = Shares(member=0.7, withheld=0.0, external=0.2, calibration=0.1, test=0.0)


def roles(shares: Shares, seed: int) -> np.ndarray:
    return np.array([role_of(content, shares, seed).value for content in CONTENTS])


def manifest_of(contents: list[str], *, seed: int = 0, shares: Shares = SHARES) -> Manifest:
    n = len(contents)
    return build_manifest(
        [f"s{i}" for i in range(n)],
        contents,
        np.arange(n) % 10,
        np.zeros(n, dtype=bool),
        shares=shares,
        seed=seed,
    )


@pytest.mark.parametrize("shares", [SHARES, UNEVEN])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_shares_are_kept_within_binomial_error(shares: Shares, seed: int) -> None:
    given = roles(shares, seed)
    for role in Role:
        share = getattr(shares, role.value)
        error = 4 * math.sqrt(N * share * (1 - share))
        assert abs((given == role.value).sum() - N * share) <= error


def rows_of(manifest: Manifest, rows: npt.NDArray[np.int64]) -> Manifest:
    names = [column.name for column in fields(manifest)]
    return Manifest(**{name: getattr(manifest, name)[rows] for name in names})


def test_another_seed_gives_an_independent_split() -> None:
    agree = (roles(SHARES, 0) == roles(SHARES, 1)).mean()
    by_chance = sum(share**2 for share in SHARES.model_dump().values())
    assert abs(agree - by_chance) < 4 * math.sqrt(by_chance * (1 - by_chance) / N)


def test_role_depends_on_content_alone() -> None:
    contents = CONTENTS[:500]
    first = manifest_of(contents)
    order = np.random.default_rng(0).permutation(500)
    second = build_manifest(
        [f"another/{i}" for i in range(500)],
        [contents[i] for i in order],
        np.full(500, 3),
        np.zeros(500, dtype=bool),
        shares=SHARES,
        seed=0,
    )
    assert (second.role == first.role[order]).all()
    assert len(set(first.role.tolist())) == 5


def test_official_test_wins_over_the_hash_for_every_copy() -> None:
    contents = [*CONTENTS[:50], CONTENTS[7], CONTENTS[7]]
    official = np.zeros(52, dtype=bool)
    official[51] = True
    manifest = build_manifest(
        [str(i) for i in range(52)], contents, np.zeros(52), official, shares=UNEVEN, seed=0
    )
    is_test = np.flatnonzero(manifest.role == "test")
    assert is_test.tolist() == [7, 50, 51]  # UNEVEN gives nobody else this role
    assert manifest.duplicates == 2
    assert manifest.counts["test"] == 3
    assert sum(manifest.counts.values()) == 52


def test_content_hash_sees_every_pixel_and_the_shape() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    plain = content_hash(image)
    assert content_hash(image.copy()) == plain
    assert content_hash(np.repeat(image, 2, axis=0)[::2]) == plain  # another memory layout
    assert content_hash(image.reshape(6, 4, 3)) != plain
    for position in [(0, 0, 0), (3, 5, 2), (2, 1, 1)]:
        other = image.copy()
        other[position] ^= 1
        assert content_hash(other) != plain


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    manifest = manifest_of(CONTENTS[:300])
    path = tmp_path / "manifest.parquet"
    manifest.write(path)
    again = Manifest.read(path)
    for field in fields(Manifest):
        ours, theirs = getattr(manifest, field.name), getattr(again, field.name)
        assert ours.dtype.kind == theirs.dtype.kind
        assert (ours == theirs).all()
    assert again.fingerprint == manifest.fingerprint


def test_fingerprint_ignores_the_order_of_rows() -> None:
    manifest = manifest_of(CONTENTS[:300])
    order = np.random.default_rng(1).permutation(300)
    shuffled = Manifest(
        **{field.name: getattr(manifest, field.name)[order] for field in fields(manifest)}
    )
    assert shuffled.fingerprint == manifest.fingerprint


def test_fingerprint_sees_every_single_change() -> None:
    manifest = manifest_of(CONTENTS[:40])
    seen = {manifest.fingerprint}
    changes = {"sample_id": "s40", "content": CONTENTS[40], "label": 99, "role": "withheld"}
    for row in (0, 17, 39):
        for name, value in changes.items():
            column = getattr(manifest, name).copy()
            if name == "role" and column[row] == value:
                value = "member"
            column[row] = value
            seen.add(replace(manifest, **{name: column}).fingerprint)
    one, other = (np.flatnonzero(manifest.role == role)[0] for role in ("member", "external"))
    swapped = manifest.role.copy()
    swapped[[one, other]] = swapped[[other, one]]
    seen.add(replace(manifest, role=swapped).fingerprint)
    # One row less, one row twice, one row three times.
    for rows in (np.arange(39), np.r_[np.arange(40), 0], np.r_[np.arange(40), 0, 0]):
        part = Manifest(
            **{field.name: getattr(manifest, field.name)[rows] for field in fields(manifest)}
        )
        seen.add(part.fingerprint)
    assert len(seen) == 1 + 3 * 4 + 1 + 3


@pytest.mark.parametrize("column", ["sample_id", "content", "label", "role"])
def test_altered_manifest_is_refused(column: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    manifest_of(CONTENTS[:30]).write(path)
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[3] = 1 + values[3] if column == "label" else "x"
    position = table.schema.get_field_index(column)
    pq.write_table(table.set_column(position, column, [values]), path)
    assert pq.read_schema(path).metadata == table.schema.metadata
    with pytest.raises(ValueError, match="altered"):
        Manifest.read(path)


def test_manifest_without_fingerprint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    manifest_of(CONTENTS[:30]).write(path)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    with pytest.raises(ValueError, match="altered"):
        Manifest.read(path)
