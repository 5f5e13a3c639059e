"""`amint data` and `amint prepare` on the command line: what they say, and of what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from amint_ray.cli import main
from amint_ray.contracts import Role


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = random.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two classes with a duplicate and two files that are no images."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "birds/crow", 40, seed=1)
    write_images(tmp_path / "birds/owl", 30, seed=2)
    copy = (tmp_path / "birds/crow/000.png").read_bytes()
    (tmp_path / "birds/owl/copy.png").write_bytes(copy)
    (tmp_path / "birds/owl/notes.jpg").write_text("no picture")
    (tmp_path / "birds/owl/empty.png").write_bytes(b"")
    return tmp_path / "birds"


def test_data_tells_what_is_there(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "folder", f"data.path={birds}", "--json"]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert document["count"] == 73
    assert document["classes"] == ["crow", "owl"]
    assert document["labels"] == {"crow": 40, "owl": 31}
    assert document["duplicates"] == 1
    assert sum(document["roles"].values()) == 71
    assert set(document["roles"]) == {role.value for role in Role}
    assert document["sizes"]["width"] == {"min": 10, "median": 10, "max": 10}
    reasons = {row["sample_id"]: row["reason"] for row in document["quarantined"]}
    assert set(reasons) == {"owl/notes.jpg", "owl/empty.png"}
    assert "not an image" in reasons["owl/notes.jpg"]
    assert "empty" in reasons["owl/empty.png"]
    assert all(line.startswith("amint: ") for line in err.splitlines())
    with Image.open(birds.parent / document["contact_sheet"]) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 500


def test_data_for_a_person_names_reasons(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "folder", f"data.path={birds}", "--sheet="]) == 0
    out, _ = capfd.readouterr()
    assert "exact duplicates        1" in out
    assert "owl/notes.jpg" in out
    assert not (birds.parent / "contact_sheet.png").exists()


def test_data_uses_a_recipes_roles(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["data.source=folder", f"data.path={birds}", "--json", "--sheet="]
    assert main(["data", "cifar10_vit", *arguments]) == 0
    roles = json.loads(capfd.readouterr().out)["roles"]
    assert roles["test"] == 0  # the recipe takes test images from an official split alone


def hub_file(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": None}], **columns}), path)
    return path


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data", "nosuch"], ["'nosuch'", "folder, parquet", "torchvision:MNIST"]),
        (["data", "folder"], ["data.path=FOLDER"]),
        (["data", "folder", "data.path=nowhere"], ["nowhere", "no such folder"]),
        (["data", "folder", "data.path=empty"], ["empty", "no image files"]),
        (["data", "folder", "data.path=one"], ["one class only", "'a'"]),
        (["data", "folder", "data.path=one/a"], ["no class folders"]),
        (["data", "folder", "data.source=digits"], ["leave data.source out"]),
        (["data", "folder", "data.path=s3:///x"], ["s3:///x", "bucket"]),
        (["data", "folder", "data.path=gs://b/x"], ["gs://b/x", "s3://BUCKET/PREFIX"]),
        (["data", "digits", "--sheet=nowhere/sheet.png"], ["--sheet", "no folder"]),
        (["data", "parquet", "data.path=hub"], ["'label'", "it has: image, class"]),
        (
            ["data", "parquet", "data.path=hub", "data.label_column=class"],
            ["must hold class indices"],
        ),
        (
            ["data", "parquet", "data.path=labelled", "data.image_column=picture"],
            ["'picture'", "it has: image, label"],
        ),
        (["prepare", "folder", "out", "data.path=empty"], ["no image files"]),
        (["prepare", "digits", "http://x/y"], ["DEST", "s3://BUCKET/PREFIX"]),
        (["prepare", "digits"], ["DEST"]),
        (["prepare", "digits", "hub"], ["holds a.parquet", "another destination"]),
        (
            ["prepare", "digits", "out", "data.external.source=digits"],
            ["one source at a time"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one/a", 3)
    (tmp_path / "hub").mkdir()
    hub_file(tmp_path / "hub/a.parquet", **{"class": ["crow"]})
    (tmp_path / "labelled").mkdir()
    hub_file(tmp_path / "labelled/a.parquet", label=[0])
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    told = [line for line in err.splitlines() if not line.startswith("amint: opening")]
    assert len(told) == 1, err
    for part in parts:
        assert part in told[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.path=few"], ["no image has the role", "counts"]),
        (["data.path=birds"], ["2 of 73 images", "data.max_bad_fraction", "owl/"]),
        (["data.path=birds", "data.augment_options={hflop: 1}"], ["hflop"]),
        (["data.path=birds", "data.mode=memory", "data.memory_gib=1e-6"], ["memory_gib"]),
    ],
)
def test_training_refuses_before_ray_starts(
    overrides: list[str], parts: list[str], birds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_images(birds.parent / "few" / name, 2, seed=3)
    overrides = ["data.source=folder", *overrides]
    if "hflop" in parts:
        overrides.append("data.augment=timm")
    assert main(["train", "cifar10_vit", *overrides]) == 2
    _, err = capfd.readouterr()
    assert "Ray" not in err
    told = err.splitlines()[-1]
    for part in parts:
        assert part in told


@pytest.mark.ray
def test_prepare_writes_what_data_reads_and_goes_on(
    birds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = ["prepare", "folder", "out", f"data.path={birds}", "--file-mib=0.01", "--json"]
    assert main(refused) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "2 of 73 cannot be used" in err.splitlines()[-1]
    assert "data.max_bad_fraction" in err.splitlines()[-1]
    assert not (birds.parent / "out/prepared.json").exists()
    shutil.rmtree(birds.parent / "out")
    arguments = [*refused, "data.max_bad_fraction=0.05"]
    assert main(arguments) == 0
    first = json.loads(capfd.readouterr().out)
    assert first["count"] == 71
    assert first["resumed"] == 0
    assert {row["sample_id"] for row in first["quarantined"]} == {"owl/notes.jpg", "owl/empty.png"}
    files = sorted(birds.parent.glob("out/*.parquet"))
    assert len(files) == first["files"]
    files[0].unlink()
    assert main(arguments) == 0
    again = json.loads(capfd.readouterr().out)
    assert again["resumed"] == first["files"] - 1
    assert {**again, "resumed": 0, "seconds": 0} == {**first, "seconds": 0}
    assert main(["data", "parquet", "data.path=out", "--json", "--sheet="]) == 0
    read = json.loads(capfd.readouterr().out)
    assert read["count"] == 71
    assert read["classes"] == ["crow", "owl"]
    assert main(["data", "folder", f"data.path={birds}", "--json", "--sheet="]) == 0
    assert read["roles"] == json.loads(capfd.readouterr().out)["roles"]
