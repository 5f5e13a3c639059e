"""The first pass: roles and quarantine are the same whoever reads which part when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_files import (
    NO_TEST,
    hub,
    indexed,
    opened,
    plant_pool,
    reasons,
    role_by_content,
    roles,
    same,
    write_hub,
)
from image_files import encoded, exif, noise

from amint_ray.contracts import Role, UserError
from amint_ray.data.index import examine, index_here, settle
from amint_ray.data.quarantine import check_quarantine, write_quarantine
from amint_ray.data.roles import content_hash, role_of
from amint_ray.data.sources import count, open_source


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_pool(tmp_path_factory.mktemp("hub"))


# --- roles at scale -------------------------------------------------------------------------------


def test_readers_leave_no_trace(pool_folder: Path) -> None:
    config = hub(pool_folder)
    one, *others = (index_here(open_source(config), config, readers=n) for n in (1, 2, 4))
    for other in others:
        same(one, other)
    assert len(one.quarantine) == 2
    assert count(open_source(config)) == len(one.manifest.role) + len(one.quarantine)


def test_tables_may_come_in_any_order(pool_folder: Path) -> None:
    config = hub(pool_folder, near_duplicates=0)
    source = open_source(config)
    tables = [examine(source, shard, config) for shard in range(len(source.shards))]
    one = settle(source, tables, config)
    np.random.default_rng(0).shuffle(tables)  # type: ignore[arg-type]
    same(one, settle(source, tables, config))
    same(one, index_here(source, config, readers=3))


def test_roles_are_the_hash_of_the_pixels_or_the_publishers_word(pool_folder: Path) -> None:
    index = indexed(pool_folder, shares=NO_TEST)
    source = opened(pool_folder)
    manifest = index.manifest
    official = {
        content
        for content, shard in zip(manifest.content.tolist(), index.shard.tolist(), strict=True)
        if source.shards[shard].test
    }
    given = role_by_content(index)  # one role for each content
    for content, role in given.items():
        expected = "test" if content in official else role_of(content, NO_TEST, 0).value
        assert role == expected
    # NO_TEST gives the role to nobody else, so these are copies of official test images.
    moved = {n for n, r in roles(index).items() if r == "test" and n.startswith("train")}
    assert len(moved) > 25
    assert {name.split("#")[0] for name in moved} == {f"train-{i}.parquet" for i in range(5)}
    assert manifest.duplicates == len(manifest.content) - index.groups > 30


def test_the_split_seed_moves_copies_together(tmp_path: Path) -> None:
    train, held = noise(120, 10, 12, 3), noise(20, 10, 12, 3, seed=1)
    # Copies in another file, with another label, and encoded differently.
    copies = [encoded(train[3], "BMP"), encoded(train[7], "PNG", compress_level=1), train[7]]
    write_hub(tmp_path / "train-00000.parquet", train[:60], [0] * 60)
    write_hub(tmp_path / "train-00001.parquet", [*copies, *train[60:], train[9]], [1] * 64)
    tested = [*held, encoded(train[5], "BMP"), train[9]]
    write_hub(tmp_path / "test-00000.parquet", tested, [2] * 22)
    first, second, test = "train-00000.parquet#", "train-00001.parquet#", "test-00000.parquet#"
    planted = {f"{first}5", f"{first}9", f"{second}63"}
    seen = set()
    source = opened(tmp_path)
    tables = [examine(source, shard, hub(tmp_path)) for shard in range(len(source.shards))]
    for seed in range(20):
        index = settle(source, tables, hub(tmp_path, split_seed=seed, shares=NO_TEST))
        role = roles(index)
        assert role[f"{first}3"] == role[f"{second}0"]
        assert role[f"{first}7"] == role[f"{second}1"] == role[f"{second}2"]
        of_test = {name for name in role if role[name] == "test"}
        assert of_test == planted | {f"{test}{i}" for i in range(22)}
        assert index.manifest.duplicates == 6
        seen.add((role[f"{first}3"], role[f"{first}7"]))
    assert len(seen) > 5  # the copies do change their role, together


def test_content_is_of_the_published_pixels(tmp_path: Path) -> None:
    originals = noise(30, 9, 15, 3)
    write_hub(tmp_path / "train.parquet", originals)
    small, gray = indexed(tmp_path, image_size=4), indexed(tmp_path, image_size=12, channels=1)
    same(small, gray)
    assert small.manifest.content.tolist() == [content_hash(pixels) for pixels in originals]
    assert set(small.width.tolist()) == {15} and set(small.height.tolist()) == {9}


def test_rotation_and_gray_storage_do_not_hide_a_duplicate(tmp_path: Path) -> None:
    turned, gray = noise(6, 9, 3), noise(8, 8, seed=2)
    upright = np.rot90(turned, k=-1)  # orientation 6: turn it clockwise to show it
    first = encoded(turned, "PNG", exif=exif(6))
    rows = [first, upright, turned, gray, np.repeat(gray[..., None], 3, 2)]
    write_hub(tmp_path / "train.parquet", rows)
    index = indexed(tmp_path)
    content = index.manifest.content.tolist()
    assert content[0] == content[1] and content[3] == content[4]
    assert len(set(content)) == index.groups == 3
    assert list(zip(index.width, index.height, strict=True))[:3] == [(6, 9), (6, 9), (9, 6)]


def test_rows_are_what_workers_need_of_the_manifest(pool_folder: Path) -> None:
    index = indexed(pool_folder)
    rows = index.rows()
    assert (rows.role.dtype, rows.label.dtype) == (np.uint8, np.int32)
    assert [list(Role)[code].value for code in rows.role] == index.manifest.role.tolist()
    assert rows.label.tolist() == index.manifest.label.tolist()
    assert rows.shard.tolist() == index.shard.tolist()
    assert rows.row.tolist() == index.row.tolist()
    for asked in ([Role.MEMBER], [Role.TEST, Role.WITHHELD], list(Role)):
        expected = [i for i, role in enumerate(index.manifest.role.tolist()) if role in asked]
        assert rows.having(asked).tolist() == expected


# --- quarantine -----------------------------------------------------------------------------------


def test_too_much_quarantined_stops_the_run(tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", [*noise(9, 8, 8, 3), b"text"])
    index = indexed(tmp_path)
    check_quarantine(opened(tmp_path), index, hub(tmp_path, max_bad_fraction=0.1))
    with pytest.raises(UserError) as caught:
        check_quarantine(opened(tmp_path), index, hub(tmp_path, max_bad_fraction=0.099))
    text = str(caught.value)
    assert text.startswith("data: 1 of 10 images cannot be used")
    assert "data.max_bad_fraction = 0.099" in text and "t.parquet#9: is not an image" in text


@pytest.mark.parametrize(
    "distance",
    [
        *(None, 0),
        4,
    ],
)
def test_a_source_of_bad_images_alone_is_a_users_mistake(
    distance: int | None, tmp_path: Path
) -> None:
    write_hub(tmp_path / "t.parquet", [b"text", b""])
    with pytest.raises(
        UserError, match=r"no image can be used \(2 quarantined; t.parquet#0: is not"
    ):
        indexed(tmp_path, near_duplicates=distance)


def test_too_large_an_image_is_quarantined(tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", [noise(10, 100, 3), noise(10, 101, 3)])
    assert "is too large: 101×10" in reasons(indexed(tmp_path, max_megapixels=1e-3))["t.parquet#1"]


def test_quarantine_is_stored_as_it_was_found(pool_folder: Path, tmp_path: Path) -> None:
    index = indexed(pool_folder)
    for pairs in (index.quarantine, []):
        write_quarantine(pairs, tmp_path / "quarantine.parquet")
        table = pq.read_table(tmp_path / "quarantine.parquet")
        assert [tuple(row.values()) for row in table.to_pylist()] == pairs
        assert table.schema.names == ["sample_id", "reason"]


def test_progress_and_keep_see_every_usable_image(pool_folder: Path) -> None:
    config, told, kept = hub(pool_folder), [], []
    index = index_here(
        open_source(config),
        config,
        readers=3,
        progress=lambda done, total: told.append((done, total)),
        keep=lambda shard, row, image: kept.append((shard, row, image.size)),
    )
    total = count(open_source(config))
    assert [all_of_it for _, all_of_it in told] == [total] * len(told)
    assert told[-1][0] == total and [d for d, _ in told] == sorted({d for d, _ in told})
    usable = set(zip(index.shard.tolist(), index.row.tolist(), strict=True))
    assert usable <= {(shard, row) for shard, row, _ in kept}
    assert {size for _, _, size in kept} == {(7, 6)}
