"""Images for E from elsewhere: all of them external, and none that the pool has, too."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_files import (
    cut_short,
    damage,
    every_id,
    every_label,
    every_raw,
    hub,
    index_folder,
    indexed,
    opened,
    photo,
    reasons,
    refusal,
    roles,
    same,
    write_hub,
)
from image_files import Pixels, encoded, noise

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.data.index import index_here
from amint_ray.data.memory import load_memory, memory_needed
from amint_ray.data.quarantine import check_quarantine
from amint_ray.data.sources import count, open_source

NAMES = ["ant", "bee", "cat"]


def other(path: Path, **keys: Any) -> dict[str, Any]:
    return {"source": "parquet", "path": str(path), **keys}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """30 training images and 10 official test images."""
    pictures = noise(40, 8, 8, 3)
    write_hub(tmp_path / "pool" / "train.parquet", pictures[:30], group_rows=20)
    write_hub(tmp_path / "pool" / "test.parquet", pictures[30:])
    return tmp_path / "pool"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """25 other images in files called otherwise and called a test split."""
    pictures = noise(25, 8, 8, 3, seed=1)
    write_hub(tmp_path / "else" / "test.parquet", pictures[:15], group_rows=10)
    write_hub(tmp_path / "else" / "z.parquet", pictures[15:])
    return tmp_path / "else"


def ids_of(index: Any, *, external: bool) -> dict[str, str]:
    return {n: r for n, r in roles(index).items() if n.startswith("external/") == external}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_all_of_it_is_external_and_the_pools_roles_stay(
    share: float, pool: Path, elsewhere: Path
) -> None:
    shares = {"member": 0.5, "withheld": 0, "calibration": 0.5 - share, "test": 0}
    keys = {"shares": {**shares, "external": share}}
    alone = indexed(pool, **keys)
    both = indexed(pool, external=other(elsewhere), **keys)
    assert ids_of(both, external=False) == roles(alone)
    assert list(roles(alone).values()).count("test") == 10
    added = ids_of(both, external=True)
    expected = {f"external/test.parquet#{i}" for i in range(15)}
    assert set(added) == expected | {f"external/z.parquet#{i}" for i in range(10)}
    assert set(added.values()) == {"external"}
    assert both.overlap == 0
    assert both.manifest.counts["external"] == 25 + alone.manifest.counts["external"]


def test_what_is_read_is_what_was_asked_for(pool: Path, elsewhere: Path) -> None:
    both = opened(pool, external=other(elsewhere))
    main, second = opened(pool), opened(elsewhere)
    for source in (both, pickle.loads(pickle.dumps(both))):
        assert every_id(source) == [*every_id(main), *(f"external/{i}" for i in every_id(second))]
        assert every_raw(source) == every_raw(main) + every_raw(second)
        assert [s.rows for s in source.shards] == [s.rows for s in [*main.shards, *second.shards]]
        first = len(main.shards)
        assert not any(shard.test for shard in source.shards[first:])
        assert source.read(first + 1, [2, 0]) == second.read(1, [2, 0])
    images, index = load_memory(both, hub(pool, external=other(elsewhere)), readers=2)
    pixels = dict(zip(index.manifest.sample_id.tolist(), images, strict=True))
    expected = noise(25, 8, 8, 3, seed=1)
    assert (pixels["external/z.parquet#3"].transpose(1, 2, 0) == expected[18]).all()
    assert count(both) == 65
    config = hub(pool, external=other(elsewhere))
    assert memory_needed(both, config) == 65 * 3 * 8 * 8
    limited = opened(pool, limit=4, external=other(elsewhere, limit=7))
    assert count(limited) == 4 + 4 + 7 + 7


def test_what_the_pool_has_too_is_left_out_and_counted(pool: Path, tmp_path: Path) -> None:
    inside, outside = noise(40, 8, 8, 3), noise(6, 8, 8, 3, seed=5)
    copies = [encoded(inside[3], "BMP"), encoded(inside[35], "PNG", compress_level=1), inside[3]]
    write_hub(tmp_path / "else" / "a.parquet", [outside[0], *copies, *outside, outside[2]])
    config = hub(pool, external=other(tmp_path / "else"))
    index = indexed(pool, external=other(tmp_path / "else"))
    assert index.overlap == 3
    kept = [0, *range(4, 11)]  # copies among themselves stay
    assert ids_of(index, external=True) == {f"external/a.parquet#{i}": "external" for i in kept}
    assert ids_of(index, external=False) == roles(indexed(pool))
    assert index.quarantine == []
    assert index.groups == 40 + 6
    images, again = load_memory(open_source(config), config, readers=2)
    same(index, again)
    at = index.manifest.sample_id.tolist().index("external/a.parquet#5")
    assert (images[at].transpose(1, 2, 0) == outside[1]).all()
    folder = index_folder(tmp_path, open_source(config), config)
    for chunk in folder.missing():
        folder.write(chunk, open_source(config), config)
    same(index, folder.read(open_source(config), config))


def test_a_near_duplicate_of_the_pool_is_left_out_where_they_are_grouped(tmp_path: Path) -> None:
    write_hub(tmp_path / "pool" / "t.parquet", [photo(0), photo(1)])
    again = encoded(photo(0), "JPEG", quality=70)
    write_hub(tmp_path / "else" / "t.parquet", [again, photo(2), photo(3)])
    keys = {"external": other(tmp_path / "else")}
    assert indexed(tmp_path / "pool", **keys).overlap == 0
    grouped = indexed(tmp_path / "pool", near_duplicates=4, **keys)
    assert grouped.overlap == 1
    assert set(ids_of(grouped, external=True)) == {f"external/t.parquet#{i}" for i in (1, 2)}


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "label_column", "kept"),
    [
        (NAMES, NAMES, "label", True),
        (NAMES, NAMES, None, False),
        (NAMES, NAMES[::-1], "label", False),
        (NAMES, NAMES[:2], "label", False),
        (NAMES, None, "label", False),
        (None, None, "label", False),
        (None, NAMES, "label", False),
    ],
)
def test_labels_are_kept_only_where_both_have_the_same_classes(
    mine: list[str] | None,
    theirs: list[str] | None,
    label_column: str | None,
    kept: bool,
    tmp_path: Path,
) -> None:
    write_hub(tmp_path / "pool" / "t.parquet", noise(4, 8, 8, 3), [0, 1, 2, 1], class_names=mine)
    pictures = noise(4, 8, 8, 3, seed=1)
    write_hub(tmp_path / "else" / "t.parquet", pictures, [1, 1, 0, None], class_names=theirs)
    keys = {"external": other(tmp_path / "else", label_column=label_column)}
    source = opened(tmp_path / "pool", **keys)
    added = [1, 1, 0, None] if kept else [None] * 4
    assert every_label(source) == [0, 1, 2, 1, *added]
    index = indexed(tmp_path / "pool", **keys)
    assert index.quarantine == []
    labels = [-1 if label is None else label for label in added]
    assert index.manifest.label.tolist() == [0, 1, 2, 1, *labels]
    assert index.class_names == (mine or ["0", "1", "2"])


@pytest.mark.parametrize("label", [-7, 3, 1 << 40])
def test_a_label_that_is_no_class_does_not_get_through(label: int, tmp_path: Path) -> None:
    write_hub(tmp_path / "pool" / "t.parquet", noise(4, 8, 8, 3), [0, 1, 2, 1], class_names=NAMES)
    pictures = noise(2, 8, 8, 3, seed=1)
    write_hub(tmp_path / "else" / "t.parquet", pictures, [label, 1], class_names=NAMES)
    keys = {"external": other(tmp_path / "else", label_column="label")}
    assert set(indexed(tmp_path / "pool", **keys).manifest.label.tolist()) <= {-1, 0, 1, 2}


# --- of other kinds, and bad ones -----------------------------------------------------------------


def test_digits_beside_a_hub_source(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    published = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    rows: list[Pixels] = [*published[:5], *noise(5, 8, 8, 3)]
    write_hub(tmp_path / "t.parquet", rows)
    index = indexed(tmp_path, external={"source": "digits", "limit": 50}, channels=1)
    assert index.overlap == 5
    added = {f"external/digits/{i}": "external" for i in range(5, 50)}
    assert ids_of(index, external=True) == added


def test_a_folder_needs_no_class_folders(tmp_path: Path) -> None:
    for i, pixels in enumerate(noise(6, 9, 7, 3)):
        path = tmp_path / "photos" / ("deep/er" if i % 2 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels, "PNG"))
    config = Data(
        image_size=8, limit=100, external={"source": "folder", "path": str(tmp_path / "photos")}
    )
    index = index_here(open_source(config), config, readers=2)
    names = {f"external/{i}.png" for i in (0, 2, 4)}
    names |= {f"external/deep/er/{i}.png" for i in (1, 3, 5)}
    assert ids_of(index, external=True) == dict.fromkeys(names, "external")
    own = index.manifest.label[[n in names for n in index.manifest.sample_id.tolist()]]
    assert set(own.tolist()) == {-1}
    assert index.class_names == [str(c) for c in range(10)]


def test_bad_images_and_files_are_quarantined_under_their_own_name(
    pool: Path, elsewhere: Path
) -> None:
    write_hub(elsewhere / "bad.parquet", [b"text", *noise(2, 8, 8, 3, seed=9)])
    damage(elsewhere / "test.parquet", 1, "image")
    index = indexed(pool, external=other(elsewhere))
    lost = {"external/bad.parquet#0"} | {f"external/test.parquet#{i}" for i in range(10, 15)}
    assert set(reasons(index)) == lost
    assert len(ids_of(index, external=True)) == 28 - 6
    cut_short(elsewhere / "z.parquet")
    source = opened(pool, external=other(elsewhere))
    assert [(file.name, file.external) for file in source.unreadable] == [
        ("external/z.parquet", True)
    ]
    index = indexed(pool, external=other(elsewhere))
    assert "external/z.parquet" in reasons(index)
    assert set(reasons(index)) - lost == {"external/z.parquet"}


@pytest.mark.parametrize("bad", ["pool", "else"])
def test_files_of_one_source_do_not_hide_that_the_other_lost_its_own(
    bad: str, tmp_path: Path
) -> None:
    """A tenth of the one, and next to nothing of both together."""
    large = {"pool": "else", "else": "pool"}[bad]
    write_hub(tmp_path / large / "t.parquet", noise(10, 400, 400, 3, seed=1))
    for i in range(10):
        write_hub(tmp_path / bad / f"{i}.parquet", noise(2, 20, 20, 3, seed=2 + i))
    spoilt = tmp_path / bad / "3.parquet"
    spoilt.write_bytes(b"not parquet at all. " * (spoilt.stat().st_size // 20))
    for most, stops in ((0.05, True), (0.2, False)):
        config = hub(
            tmp_path / "pool", external=other(tmp_path / "else"), max_bad_fraction=most, limit=20
        )
        source = open_source(config)
        index = index_here(source, config, readers=2)
        if stops:
            with pytest.raises(UserError, match=r"1 whole files cannot be used, more than"):
                check_quarantine(source, index, config)
        else:
            check_quarantine(source, index, config)


def test_an_external_source_alone_is_no_pool(pool: Path, elsewhere: Path) -> None:
    for path in pool.glob("*.parquet"):
        write_hub(path, [b"text"] * 3)
    with pytest.raises(UserError, match="no image can be used"):
        indexed(pool, external=other(elsewhere))


def test_a_large_second_source_does_not_hide_that_the_pool_is_bad(tmp_path: Path) -> None:
    write_hub(tmp_path / "pool" / "t.parquet", [b"text", *noise(2, 2, 2, 3)])
    write_hub(tmp_path / "else" / "t.parquet", [encoded(noise(2, 2, 3, seed=1), "PNG")] * 1997)
    config = hub(tmp_path / "pool", external=other(tmp_path / "else"))
    source = open_source(config)
    with pytest.raises(UserError, match=r"data\.max_bad_fraction"):
        check_quarantine(source, index_here(source, config, readers=2), config)


def test_notes_of_both_are_told(pool: Path, tmp_path: Path) -> None:
    write_hub(pool / "validation.parquet", noise(2, 8, 8, 3), [-1, -1])
    write_hub(tmp_path / "else" / "a.parquet", noise(2, 8, 8, 3, seed=1), [0, 1])
    write_hub(tmp_path / "else" / "test.parquet", noise(2, 8, 8, 3, seed=2), [-1, -1])
    keys = other(tmp_path / "else", label_column="label")
    assert [n.split(":")[0] for n in opened(pool, external=keys).notes] == [
        *("validation.parquet", "test.parquet")
    ]
    # Nobody asks for labels here: the test split is as good as any.
    assert count(opened(pool, external=other(tmp_path / "else"))) == 44


def test_mistakes_name_the_section(pool: Path, elsewhere: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.external: data\.external\.path=.*no such file"):
        opened(pool, external=other(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^data\.external: .*data\.external\.label_column"):
        opened(pool, external=other(elsewhere, label_column="typo"))
    assert refusal(tmp_path / "nowhere", external=other(elsewhere)).startswith("data: data.path=")


def test_an_index_belongs_to_both_sources(pool: Path, elsewhere: Path) -> None:
    seen = {opened(pool).identity, opened(elsewhere).identity}
    seen.add(opened(pool, external=other(elsewhere)).identity)
    seen.add(opened(elsewhere, external=other(pool)).identity)
    seen.add(opened(pool, external=other(elsewhere, limit=3)).identity)
    (elsewhere / "z.parquet").unlink()
    seen.add(opened(pool, external=other(elsewhere)).identity)
    assert len(seen) == 6
