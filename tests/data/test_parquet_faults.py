"""Parquet sources: rows that cannot be used are quarantined, files that cannot be opened count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_files import (
    cut_short,
    damage,
    every_raw,
    faulty,
    hub,
    indexed,
    loaded,
    opened,
    reasons,
    refusal,
    write_hub,
)
from image_files import encoded, noise

from amint_ray.contracts import RunError, UserError
from amint_ray.data.index import examine, index_here
from amint_ray.data.quarantine import check_quarantine
from amint_ray.data.roles import content_hash
from amint_ray.data.sources import DamagedError

NAMES = ["ant", "bee", "cat"]


def stop(path: Path, **keys: Any) -> str | None:
    """What a run with this source ends with; None: it goes on."""
    config = hub(path, **keys)
    try:
        check_quarantine(opened(path, **keys), indexed(path, **keys), config)
    except UserError as error:
        return str(error)
    return None


# --- rows that cannot be used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "class_names", "reason"),
    [
        (None, NAMES, "has no label"),
        (None, None, "has no label"),
        (-1, NAMES, "label -1 is negative; labels are counted from 0"),
        (3, NAMES, "label 3 is not one of the 3 classes 0 to 2"),
        (-1, None, "label -1 is negative; labels are counted from 0"),
        (1_000_000, None, "label 1000000 is not one of"),
        (2**63, None, "label 9223372036854775808 is not one of"),
    ],
)
def test_label_that_is_no_class_is_quarantined(
    label: int | None, class_names: list[str] | None, reason: str, tmp_path: Path
) -> None:
    pictures = noise(4, 8, 8, 3)
    kind = pa.uint64() if label == 2**63 else pa.int64()
    labels = pa.array([0, label, 2, 1], kind)
    write_hub(tmp_path / "t.parquet", pictures, labels, class_names=class_names)
    index = indexed(tmp_path)
    assert list(reasons(index)) == ["t.parquet#1"]
    assert reasons(index)["t.parquet#1"].startswith(reason)
    assert index.manifest.sample_id.tolist() == [f"t.parquet#{i}" for i in (0, 2, 3)]
    assert index.manifest.label.tolist() == [0, 2, 1]
    assert len(index.class_names) == 3
    assert index.manifest.content.tolist() == [content_hash(pictures[i]) for i in (0, 2, 3)]


WHOLE = encoded(noise(8, 8, 3), "PNG")
BAD_CHUNK = WHOLE[:33] + (5).to_bytes(4, "big") + WHOLE[37:]  # the pixels' chunk, its length wrong


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (b"", "is empty"),
        (b"no image", "is not an image"),
        (WHOLE[:60], "cannot be decoded"),
        (None, "the image column is empty"),
        (BAD_CHUNK, "cannot be decoded"),
    ],
    ids=["empty", "text", "truncated", "null", "bad-chunk"],
)
def test_undecodable_image_is_quarantined(cell: bytes | None, reason: str, tmp_path: Path) -> None:
    write_hub(tmp_path / "train-7.parquet", [*noise(2, 8, 8, 3), cell, WHOLE])
    for index in (indexed(tmp_path), loaded(tmp_path)[1]):
        assert list(reasons(index)) == ["train-7.parquet#2"]
        assert reasons(index)["train-7.parquet#2"].startswith(reason)
        assert index.row.tolist() == [0, 1, 3]
    text = stop(tmp_path)
    assert text is not None and len(text.splitlines()) == 1
    assert "1 of 4 images" in text and "train-7.parquet#2" in text and reason in text
    assert "data.max_bad_fraction = 0.001" in text
    assert stop(tmp_path, max_bad_fraction=0.24) is not None
    assert stop(tmp_path, max_bad_fraction=0.25) is None


def test_null_struct_is_an_empty_cell(tmp_path: Path) -> None:
    path = write_hub(tmp_path / "t.parquet", noise(3, 8, 8, 3))
    table = pq.read_table(path)
    cells = [None if i == 1 else cell for i, cell in enumerate(table["image"].to_pylist())]
    pq.write_table(table.set_column(0, "image", pa.array(cells, table["image"].type)), path)
    assert [faulty(raw) for raw in every_raw(opened(path))] == [False, True, False]


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_damaged_row_group_costs_its_rows_and_no_others(column: str, tmp_path: Path) -> None:
    pictures = noise(20, 8, 8, 3)
    path = write_hub(tmp_path / "t.parquet", pictures, np.arange(20) % 3, group_rows=5)
    before = indexed(path)
    damage(path, 2, column)
    index = indexed(path)
    kept = [i for i in range(20) if i not in range(10, 15)]
    assert list(reasons(index)) == [f"t.parquet#{i}" for i in range(10, 15)]
    assert all(r.startswith("t.parquet: cannot be read") for r in reasons(index).values())
    assert index.manifest.content.tolist() == [content_hash(pictures[i]) for i in kept]
    assert index.manifest.label.tolist() == before.manifest.label[kept].tolist()
    assert index.manifest.role.tolist() == before.manifest.role[kept].tolist()
    images, _ = loaded(path)
    assert (images.transpose(0, 2, 3, 1) == pictures[kept]).all()


@pytest.mark.parametrize("leaf", ["image.bytes", "label"])
def test_whatever_byte_of_a_row_group_is_wrong_the_pass_goes_on(leaf: str, tmp_path: Path) -> None:
    path = write_hub(tmp_path / "t.parquet", noise(9, 1, 1, 3), np.arange(9) % 3, group_rows=3)
    group = pq.ParquetFile(path).metadata.row_group(1)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    start = columns[leaf].dictionary_page_offset or columns[leaf].data_page_offset
    whole, config = path.read_bytes(), hub(path)
    for at in range(start, start + columns[leaf].total_compressed_size):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        table = examine(opened(path), 1, config)
        assert len(table) == 3


@pytest.mark.parametrize(
    "error", [pa.lib.ArrowTypeError("x"), pa.lib.ArrowKeyError("x"), pa.lib.ArrowException("x")]
)
def test_whatever_pyarrow_raises_is_damage(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = write_hub(tmp_path / "t.parquet", noise(4, 8, 8, 3))
    source = opened(path)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(DamagedError, match=r"^t\.parquet: cannot be read: "):
        source.read(0, [0])


@pytest.mark.parametrize("error", [pa.lib.ArrowMemoryError("malloc failed"), MemoryError()])
def test_want_of_memory_is_no_damage(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = write_hub(tmp_path / "t.parquet", noise(4, 8, 8, 3))
    source = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read_row_group", fail)
        with pytest.raises(RunError, match=r"cannot be read now: t\.parquet: cannot be read: "):
            index_here(source, hub(path), readers=1)
    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(RunError, match=r"t\.parquet: cannot be read: [^\n]*$"):
        opened(path)


def test_a_damaged_footer_ends_in_no_traceback(tmp_path: Path) -> None:
    """Nor does it take the process with it, as pyarrow's statistics do."""
    write_hub(tmp_path / "train.parquet", noise(4, 1, 1, 3))
    path = write_hub(tmp_path / "test.parquet", noise(4, 1, 1, 3, seed=1), group_rows=2)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for at in range(len(whole) - 7 - footer, len(whole), 6):  # every one takes too long
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 21]) + whole[at + 1 :])
        try:
            assert len(indexed(tmp_path).manifest.role) >= 4
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused < 20


@pytest.mark.parametrize("labels", [[-1] * 6, [1] * 6])
def test_a_damaged_test_file_without_statistics_can_be_opened(
    labels: list[int], tmp_path: Path
) -> None:
    write_hub(tmp_path / "train.parquet", noise(4, 8, 8, 3))
    path = tmp_path / "test.parquet"
    write_hub(path, noise(6, 8, 8, 3, seed=1), labels, group_rows=3, write_statistics=False)
    damage(path, 0, "label")
    index = indexed(tmp_path)
    assert {f"train.parquet#{i}" for i in range(4)} <= set(index.manifest.sample_id.tolist())


# --- files that cannot be opened ------------------------------------------------------------------


def text_file(path: Path) -> None:
    path.write_text("not parquet at all. " * (path.stat().st_size // 20))


@pytest.mark.parametrize("spoil", [cut_short, text_file])
def test_unreadable_file_counts_by_its_bytes(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    for i in range(4):
        write_hub(tmp_path / f"{i}.parquet", noise(10, 40, 40, 3, seed=i))
    whole = indexed(tmp_path)
    spoil(tmp_path / "1.parquet")
    source, index = opened(tmp_path), indexed(tmp_path)
    (file,) = source.unreadable
    assert (file.name, file.size) == ("1.parquet", (tmp_path / "1.parquet").stat().st_size)
    assert "not a Parquet file, or was cut short" in file.reason
    assert list(reasons(index)) == ["1.parquet"]
    kept = [i for i in range(40) if i not in range(10, 20)]
    assert index.manifest.role.tolist() == whole.manifest.role[kept].tolist()
    # One half of a file beside three whole ones is a seventh, a whole one is a quarter.
    share = 1 / 7 if spoil is cut_short else 1 / 4
    text = stop(tmp_path)
    assert text is not None
    assert "0 of 30 images and 1 whole files cannot be used" in text
    assert "the first: 1.parquet: is not a Parquet file" in text
    assert stop(tmp_path, max_bad_fraction=share - 0.02) is not None
    assert stop(tmp_path, max_bad_fraction=share + 0.02) is None


def test_missing_path_and_empty_folder(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    text = refusal(missing)
    assert f"data.path={missing}" in text and "no such file or folder" in text
    (tmp_path / "readme.txt").write_text("hello")
    text = refusal(tmp_path)
    assert f"data.path={tmp_path}" in text
    assert "*.parquet" in text
    write_hub(tmp_path / "none.parquet", [], np.zeros(0, dtype=np.int64))
    assert "no rows" in refusal(tmp_path)


def test_nothing_but_unreadable_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    text = refusal(tmp_path)
    assert "broken.parquet" in text
    assert "not a Parquet file" in text
