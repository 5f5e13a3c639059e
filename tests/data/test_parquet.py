"""Parquet sources: which files, rows, columns and labels are read, and what is said of bad ones."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_files import (
    as_pixels,
    damage,
    every_id,
    every_label,
    every_raw,
    indexed,
    loaded,
    opened,
    reasons,
    refusal,
    write_hub,
)
from image_files import encoded, noise
from PIL import Image

from amint_ray.contracts import UserError
from amint_ray.data import parquet
from amint_ray.data.sources import Fault, count

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NAMES = ["ant", "bee", "cat"]


# --- which files and rows -------------------------------------------------------------------------


def test_official_split_limit_and_names(tmp_path: Path) -> None:
    pictures = noise(11, 8, 8, 3)
    write_hub(tmp_path / "train-0.parquet", pictures[:2], [0, 1])
    write_hub(tmp_path / "train-1.parquet", pictures[2:7], [2, 3, 0, 1, 2], group_rows=2)
    write_hub(tmp_path / "validation-0.parquet", pictures[7:], [3, 2, 1, 0])
    (tmp_path / "notes.txt").write_text("hello")
    whole = opened(tmp_path)
    assert every_id(whole) == [
        *(f"train-0.parquet#{i}" for i in range(2)),
        *(f"train-1.parquet#{i}" for i in range(5)),
        *(f"validation-0.parquet#{i}" for i in range(4)),
    ]
    assert every_label(whole) == [0, 1, 2, 3, 0, 1, 2, 3, 2, 1, 0]
    assert [(s.rows, s.test) for s in whole.shards] == [
        *((2, False), (2, False), (2, False), (1, False), (4, True))
    ]
    assert all((as_pixels(raw) == p).all() for raw, p in zip(every_raw(whole), pictures, strict=1))
    limited = opened(tmp_path, limit=3)
    kept = [0, 1, 2, 7, 8, 9]
    assert every_id(limited) == [every_id(whole)[i] for i in kept]
    assert every_label(limited) == [every_label(whole)[i] for i in kept]
    assert every_raw(limited) == [every_raw(whole)[i] for i in kept]
    assert count(opened(tmp_path, limit=100)) == 11
    single = opened(tmp_path / "train-1.parquet")
    assert every_id(single) == [f"train-1.parquet#{i}" for i in range(5)]
    assert every_raw(single) == every_raw(whole)[2:7]


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("test.parquet", True),
        ("test-00000-of-00001.parquet", True),
        ("TEST_a.parquet", True),
        ("val.parquet", True),
        ("valid-1.parquet", True),
        ("validation/0000.parquet", True),
        ("data/test/part.parquet", True),
        ("testing-0.parquet", True),
        ("dev-00000-of-00001.parquet", True),
        ("eval/0000.parquet", True),
        ("evaluation.parquet", True),
        ("devices.parquet", False),
        ("evaluator.parquet", False),
        ("training/0.parquet", False),
        ("train-00000-of-00001.parquet", False),
        ("tested.parquet", False),
        ("values.parquet", False),
        ("latest.parquet", False),
        ("train/contest-test.parquet", False),
    ],
)
def test_the_official_test_split_has_its_name(name: str, test: bool, tmp_path: Path) -> None:
    write_hub(tmp_path / "hub" / name, noise(2, 8, 8, 3))
    source = opened(tmp_path / "hub")
    assert [shard.test for shard in source.shards] == [test]
    assert every_id(source) == [f"{name}#0", f"{name}#1"]
    shares = {"member": 1, "withheld": 0, "external": 0, "calibration": 0, "test": 0}
    given = indexed(tmp_path / "hub", shares=shares).manifest.role.tolist()
    assert set(given) == {"test" if test else "member"}


def test_folders_above_the_given_one_do_not_make_a_test_split(tmp_path: Path) -> None:
    write_hub(tmp_path / "test" / "train.parquet", noise(2, 8, 8, 3))
    assert not opened(tmp_path / "test").shards[0].test


def test_rows_are_read_in_any_order_and_by_themselves(tmp_path: Path) -> None:
    pictures = noise(9, 8, 8, 3)
    write_hub(tmp_path / "t.parquet", pictures, group_rows=5)
    source = pickle.loads(pickle.dumps(opened(tmp_path)))
    assert every_raw(source) == [encoded(p, "PNG") for p in pictures]
    source = pickle.loads(pickle.dumps(source))  # with files open
    assert source.read(1, [3, 0, 3]) == [encoded(pictures[i], "PNG") for i in (8, 5, 8)]
    assert source.read(0, []) == []
    assert source.known(0) is None


def test_a_row_group_of_more_bytes_than_one_array_holds_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 2 GiB pyarrow refuses to read the hub's structs as a whole."""

    def refused(*_: object, **__: object) -> None:
        raise pa.lib.ArrowNotImplementedError("Nested data conversions not implemented")

    pictures = [*(encoded(p, "PNG") for p in noise(9, 8, 8, 3)), None]
    write_hub(tmp_path / "t.parquet", pictures)
    source = opened(tmp_path)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", refused)
    monkeypatch.setattr(parquet, "_ROWS_OF_A_BATCH", 4)
    found = source.read(0, [8, 1, 9, 4, 1])
    assert found[:2] + found[3:] == [pictures[i] for i in (8, 1, 4, 1)]
    assert isinstance(found[2], Fault)


def test_identity_changes_with_the_files_and_what_is_taken_of_them(tmp_path: Path) -> None:
    pictures = noise(4, 8, 8, 3)
    write_hub(tmp_path / "t.parquet", pictures, [0, 1, 2, 3])
    first = opened(tmp_path).identity
    assert opened(tmp_path).identity == first
    seen = {first, opened(tmp_path, limit=2).identity}
    write_hub(tmp_path / "u.parquet", pictures)
    seen.add(opened(tmp_path).identity)
    (tmp_path / "u.parquet").rename(tmp_path / "v.parquet")
    seen.add(opened(tmp_path).identity)
    (tmp_path / "v.parquet").unlink()
    assert opened(tmp_path).identity == first
    status = (tmp_path / "t.parquet").stat()
    damage(tmp_path / "t.parquet", 0, "label")  # of the same size, written later
    os.utime(tmp_path / "t.parquet", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert (tmp_path / "t.parquet").stat().st_size == status.st_size
    seen.add(opened(tmp_path).identity)
    assert len(seen) == 5


def test_a_test_file_whose_labels_are_kept_back_is_left_out(tmp_path: Path) -> None:
    write_hub(tmp_path / "train.parquet", noise(4, 8, 8, 3), [0, 1, 2, 0])
    for statistics in (True, False):
        write_hub(
            tmp_path / "test.parquet", noise(2, 8, 8, 3), [-1, -1], write_statistics=statistics
        )
        source = opened(tmp_path)
        assert every_id(source) == [f"train.parquet#{i}" for i in range(4)]
        assert source.notes == ["test.parquet: a test split without labels, left out"]
    write_hub(tmp_path / "test.parquet", noise(2, 8, 8, 3), pa.nulls(2, pa.int64()))
    assert count(opened(tmp_path)) == 4
    write_hub(tmp_path / "test.parquet", noise(2, 8, 8, 3), [-1, 1])
    assert opened(tmp_path).notes == []
    assert list(reasons(indexed(tmp_path))) == ["test.parquet#0"]


# --- columns and classes --------------------------------------------------------------------------


def test_class_names_come_from_the_hubs_metadata(tmp_path: Path) -> None:
    pictures = noise(2, 8, 8, 3)
    write_hub(tmp_path / "a" / "t.parquet", pictures, [0, 1], class_names=NAMES)
    assert indexed(tmp_path / "a").class_names == opened(tmp_path / "a").class_names == NAMES
    write_hub(
        tmp_path / "b" / "t.parquet", pictures, [0, 1], class_names=NAMES, label_column="fine"
    )
    assert opened(tmp_path / "b", label_column="fine").class_names == NAMES
    write_hub(tmp_path / "c" / "t.parquet", pictures, [0, 3])
    assert opened(tmp_path / "c").class_names is None
    assert indexed(tmp_path / "c").class_names == ["0", "1", "2", "3"]


def test_files_that_name_different_classes_are_refused(tmp_path: Path) -> None:
    pictures = noise(2, 8, 8, 3)
    write_hub(tmp_path / "a.parquet", pictures, [0, 1], class_names=NAMES)
    write_hub(tmp_path / "b.parquet", pictures, [0, 1])
    write_hub(tmp_path / "c.parquet", pictures, [0, 1], class_names=NAMES)
    assert opened(tmp_path).class_names == NAMES
    for other in (["bee", "ant", "cat"], NAMES[:2]):
        write_hub(tmp_path / "c.parquet", pictures, [0, 1], class_names=other)
        text = refusal(tmp_path)
        assert "a.parquet and c.parquet name different classes" in text
        assert f"({len(NAMES)} and {len(other)})" in text


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([*range(10), 54_321], "11 different labels (0, 1, 2, …, 8, 9, 54321)"),
        ([7, 700], "2 different labels (7, 700)"),
    ],
)
def test_a_stray_label_makes_no_classes(labels: list[int], shown: str, tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", noise(len(labels), 8, 8, 3), labels)
    with pytest.raises(UserError) as caught:
        indexed(tmp_path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert f"{shown} would make {labels[-1] + 1:,} classes" in text
    assert f"{labels[-1]} is that of t.parquet#{len(labels) - 1}" in text
    assert "data.label_column=NAME" in text and "renumber" in text
    # Of a few images of a large set, most classes have none.
    assert len(indexed(tmp_path, limit=100).class_names) == labels[-1] + 1


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 11], list(range(0, 60, 2))])
def test_a_few_classes_without_images_are_none(labels: list[int], tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", noise(len(labels), 8, 8, 3), labels)
    assert len(indexed(tmp_path).class_names) == labels[-1] + 1


@pytest.mark.parametrize("text", ["{not json", "[]", '{"info": null}', '{"info": {"features": 1}}'])
def test_strange_hub_metadata_is_no_reason_to_fail(text: str, tmp_path: Path) -> None:
    path = write_hub(tmp_path / "t.parquet", noise(2, 8, 8, 3), [0, 1])
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": text}), path)
    assert indexed(path).class_names == ["0", "1"]


def test_columns_are_found_and_chosen(tmp_path: Path) -> None:
    pictures, others = noise(2, 8, 8, 3), noise(2, 8, 8, 3, seed=1)
    path = write_hub(tmp_path / "t.parquet", pictures, [1, 0], image_column="img")
    table = pq.read_table(path).append_column("tags", [[["x"], ["y"]]])
    table = table.append_column("size", [[{"w": 8}, {"w": 8}]])
    mask = pa.array([encoded(p, "BMP") for p in others])
    pq.write_table(table.append_column("mask", mask).append_column("fine", [[4, 5]]), path)
    source = opened(path)
    assert [as_pixels(raw).tolist() for raw in every_raw(source)] == pictures.tolist()
    assert every_label(source) == [1, 0]
    assert every_raw(opened(path, image_column="img")) == every_raw(source)
    source = opened(path, image_column="mask", label_column="fine")
    assert [as_pixels(raw).tolist() for raw in every_raw(source)] == others.tolist()
    assert every_label(source) == [4, 5]
    pq.write_table(table.append_column("again", table["img"]), path)
    text = refusal(path)
    assert "data.image_column" in text
    assert "img, label, tags, size, again" in text
    assert "'tags' holds" in refusal(path, image_column="tags")


def test_column_names_may_hold_dots(tmp_path: Path) -> None:
    path = write_hub(
        tmp_path / "t.parquet",
        noise(3, 8, 8, 3),
        [2, 1, 0],
        image_column="a.img",
        label_column="b.label",
    )
    source = opened(path, label_column="b.label")
    assert every_label(source) == [2, 1, 0]
    assert [as_pixels(raw).tolist() for raw in every_raw(source)] == noise(3, 8, 8, 3).tolist()


@pytest.mark.parametrize("key", ["image_column", "label_column"])
def test_wrong_column_lists_those_there(key: str, tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", noise(1, 8, 8, 3), image_column="img", label_column="fine")
    text = refusal(tmp_path, **{"label_column": "fine", key: "typo"})
    assert "t.parquet" in text and "'typo'" in text
    assert f"data.{key}" in text
    assert "img, fine" in text


def test_no_image_column_lists_those_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photo": [1, 2], "label": [0, 1]}), tmp_path / "t.parquet")
    text = refusal(tmp_path)
    assert "t.parquet holds no images: no column is of the form {bytes, path}" in text
    assert "columns: photo, label" in text and "image_column" not in text
    table = pa.table({"photo": [b"x"], "label": [0]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert "has 0 columns of the form {bytes, path}; name one with data.image_column" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("name", ["train.parquet", "test.parquet"])
@pytest.mark.parametrize(
    "labels",
    [[0.0, 1.5], ["a", "b"], [True, False], [{"fine": 0}, {"fine": 1}], [[0], [1, 2]]],
)
def test_label_column_that_holds_no_indices_is_refused(
    labels: list[Any], name: str, tmp_path: Path
) -> None:
    cells = [{"bytes": b"", "path": None}] * 2
    pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / name)
    text = refusal(tmp_path)
    assert f"{name}: column 'label' must hold class indices, it holds " in text
    assert "data.label_column=NAME, columns: image, label" in text


@pytest.mark.parametrize("key", ["image", "label"])
def test_two_columns_of_one_name_are_refused(key: str, tmp_path: Path) -> None:
    table = pq.read_table(write_hub(tmp_path / "t.parquet", noise(2, 8, 8, 3), [0, 1]))
    pq.write_table(table.append_column(key, [[3, 4]]), tmp_path / "t.parquet")
    text = refusal(tmp_path, image_column="image")
    assert f"t.parquet has several columns '{key}'" in text
    assert "give each a name of its own; columns: image, label, " in text
    assert key in refusal(tmp_path)


# --- real data, where it is -----------------------------------------------------------------------


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"


@pytest.mark.parametrize(
    ("folder", "size", "channels", "names"),
    [("mnist", 28, 1, "0 1 2 3 4 5 6 7 8 9"), ("cifar10", 32, 3, CIFAR10)],
)
def test_real_hub_files(folder: str, size: int, channels: int, names: str) -> None:
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    images, index = loaded(root, limit=200, image_size=size, channels=channels)
    assert images.shape == (400, channels, size, size)
    assert index.class_names == names.split()
    assert set(index.manifest.label.tolist()) == set(range(10))
    assert index.quarantine == []
    file = "train-00000-of-00002.parquet"
    ids = index.manifest.sample_id.tolist()
    for i, row in enumerate(next(pq.ParquetFile(root / file).iter_batches(10)).to_pylist()):
        at = ids.index(f"{file}#{i}")
        cell = row["img"] if "img" in row else row["image"]
        pixels = np.asarray(Image.open(io.BytesIO(cell["bytes"])))
        assert (images[at].transpose(1, 2, 0) == pixels.reshape(size, size, -1)).all()
        assert index.manifest.label[at] == row["label"]
    counts = index.manifest.counts
    assert counts["test"] >= 200
    assert min(counts.values()) > 0
