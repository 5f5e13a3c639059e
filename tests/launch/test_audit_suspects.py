"""What is taken for suspects, and what is left out of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launch.silent import Silent
from PIL import Image

from amint_ray.config.audit import AuditSettings
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.data.strangers import read_strangers
from amint_ray.launch.audit_suspects import Found, find_suspects


def image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)


def parquet(file: Path, labels: list[int]) -> None:
    stored = {"image": pa.array([b"x"] * len(labels), pa.binary()), "label": labels}
    pq.write_table(pa.table(stored), file)


def find(folder: Path | str, watcher: Silent | None = None, **settings: str) -> Found:
    asked = AuditSettings(**settings)  # type: ignore[arg-type]
    return find_suspects(str(folder), asked, ["0", "1"], watcher or Silent())


def test_files_that_are_no_images_are_counted_and_told(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "1/c.png"):
        image(tmp_path / name)
    for name in ("a.heic", "b.heic", "1/c.heic", "notes.txt", "README", ".a.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    watcher = Silent()
    found = find(tmp_path, watcher)
    assert sum(shard.rows for shard in found.source.shards) == 3
    assert found.left_out == {
        ".heic files": 3,
        ".txt files": 1,
        "files without a suffix": 1,
        "hidden files": 2,
    }
    assert [n for n in watcher.notices if "no images" in n] == [
        "suspects: not looked at, as they are no images: 3 .heic files, 2 hidden files, "
        "1 .txt file, 1 file without a suffix"
    ]


def test_images_beside_parquet_are_not_passed_over(tmp_path: Path) -> None:
    for number in range(3):
        image(tmp_path / f"{number}.png")
    (tmp_path / "deep").mkdir()
    parquet(tmp_path / "deep" / "one.parquet", [0, 1])
    with pytest.raises(UserError, match=r"holds images \(3\) and Parquet files \(1\); name one"):
        find(tmp_path)
    with pytest.raises(UserError, match=r"^--ood=.*: holds images \(3\) and Parquet files \(1\)"):
        read_strangers(str(tmp_path), load_config("digits").data, most=9, where="--ood")
    (tmp_path / "deep" / "one.parquet").rename(tmp_path / "deep" / "_one.parquet")
    assert find(tmp_path).left_out == {"hidden files": 1}


def test_odd_names_and_links_to_folders_are_counted(tmp_path: Path) -> None:
    suspects = tmp_path / "suspects"
    image(suspects / "1" / "a.png")
    image(tmp_path / "elsewhere" / "b.png")
    (suspects / "link").symlink_to(tmp_path / "elsewhere")
    expected = {"links to folders": 1}
    with contextlib.suppress(OSError):  # some file systems want UTF-8
        odd = Path(os.fsdecode(os.fsencode(suspects) + b"/caf\xe9"))
        image(odd / "c.png")
        image(odd.with_name(odd.name + ".png"))
        expected |= {"files not named in UTF-8": 1, "folders not named in UTF-8": 1}
    watcher = Silent()
    found = find(suspects, watcher)
    assert [found.source.sample_ids(i) for i in range(len(found.source.shards))] == [["1/a.png"]]
    assert found.left_out == expected
    assert "suspects: not looked into: 1 link to a folder" in watcher.notices

    (tables := tmp_path / "tables").mkdir()
    for folder in (tables, tmp_path / "elsewhere"):
        parquet(folder / "0.parquet", [0])
    (tables / "link").symlink_to(tmp_path / "elsewhere")
    found = find(tables, image_column="image")
    assert found.source.sample_ids(0) == ["0.parquet#0"]
    assert (len(found.source.shards), found.left_out) == (1, {"links to folders": 1})


def test_parquet_below_folders_is_found_whatever_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    parquet(tmp_path / "part" / "0.parquet", [0] * 5)
    strangers = load_config("digits", ["data.image_column=image"]).data
    with pytest.raises(UserError, match="none of the 5 files is an image"):
        read_strangers(str(tmp_path), strangers, most=9, where="--ood")


def test_a_test_split_without_labels_is_suspected_like_any_other(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", [0, 1, 1])
    parquet(tmp_path / "test-0.parquet", [-1, -1])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    watcher = Silent()
    found = find(tmp_path, watcher, image_column="image", label_column="label")
    labels = {
        name: label
        for shard in range(len(found.source.shards))
        for name, label in zip(
            found.source.sample_ids(shard), found.labels(shard).tolist(), strict=True
        )
    }
    assert labels == {
        "train-0.parquet#0": 0,
        "train-0.parquet#1": 1,
        "train-0.parquet#2": 1,
        "test-0.parquet#0": -1,
        "test-0.parquet#1": -1,
    }
    assert found.left_out == {"Parquet files that cannot be read": 1}
    assert any("torn.parquet is not a Parquet file" in notice for notice in watcher.notices)


def test_suspects_in_a_bucket(
    object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    object_store.make_bucket("suspected")
    client = boto3.session.Session().client("s3")
    image(tmp_path / "a.png")
    parquet(tmp_path / "a.parquet", [1, 0])
    for key, file in (
        ("images/1/a.png", "a.png"),
        ("images/b.heic", "a.png"),
        ("images/.c.png", "a.png"),
        ("tables/0.parquet", "a.parquet"),
        ("both/a.png", "a.png"),
        ("both/x/0.parquet", "a.parquet"),
    ):
        client.put_object(Bucket="suspected", Key=key, Body=(tmp_path / file).read_bytes())
    found = find("s3://suspected/images")
    assert [found.source.sample_ids(0), found.labels(0).tolist()] == [["1/a.png"], [1]]
    assert found.left_out == {".heic files": 1, "hidden files": 1}
    assert find("s3://suspected/images/1/a.png").source.sample_ids(0) == ["a.png"]
    tables = ("s3://suspected/tables", "s3://suspected/tables/0.parquet")
    for uri in tables:
        source = find(uri, image_column="image").source
        assert source.sample_ids(0) == ["0.parquet#0", "0.parquet#1"]
    with pytest.raises(UserError, match=r"holds images \(1\) and Parquet files \(1\)"):
        find("s3://suspected/both")
    with pytest.raises(UserError, match="there is no such file or folder"):
        find("s3://suspected/nowhere")
    config = load_config("digits", ["data.image_column=image"]).data
    with pytest.raises(UserError, match="none of the 2 files is an image"):
        read_strangers(tables[0], config, most=9, where="--ood")
