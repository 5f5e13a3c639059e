"""`amint data` and `amint prepare` on the command line: what they say, and of what they refuse."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from launch.commands import Command
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from amint_ray.cli import main
from amint_ray.config.load import load_config
from amint_ray.contracts import Role, RunError
from amint_ray.data.preparing import mark_finished, plan_fingerprint, plan_outputs, write_output
from amint_ray.data.sources import open_source
from amint_ray.launch import prepare_data
from amint_ray.storage import locate

if TYPE_CHECKING:
    from infra.local.object_store import ObjectStore


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


def test_data_draws_over_its_own_sheets_alone(
    birds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "folder", f"data.path={birds}"]
    sheet = birds.parent / "contact_sheet.png"
    elsewhere = PngInfo()
    elsewhere.add_text("Software", "a drawing program")
    Image.new("RGB", (9, 9)).save(sheet, pnginfo=elsewhere)
    painted = sheet.read_bytes()
    for theirs in (painted, painted[:40], b"a note", b""):
        sheet.write_bytes(theirs)
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        assert out == "" and len(err.splitlines()) == 1  # before anything is opened
        assert "--sheet=contact_sheet.png: is there" in err and "--sheet=FILE" in err
        assert sheet.read_bytes() == theirs
    sheet.unlink()
    assert main(arguments) == 0
    drawn = sheet.read_bytes()
    write_images(birds / "wren", 2, seed=5)
    assert main(arguments) == 0
    assert sheet.read_bytes() != drawn


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
        (
            ["prepare", "folder", "one/out", "data.path=one"],
            ["lies in the source", "data.path=one"],
        ),
        (["prepare", "folder", "./one/a/..", "data.path=one"], ["is the source", "apart from it"]),
        (["prepare", "folder", ".", "data.path=one"], ["holds the source", "apart from it"]),
        (["prepare", "folder", "link/out", "data.path=one"], ["lies in the source"]),
        (["prepare", "parquet", "hub/x/y", "data.path=hub"], ["lies in the source"]),
        (["prepare", "parquet", "hub", "data.path=hub"], ["is the source"]),
        (["prepare", "parquet", "hub", "data.path=hub/a.parquet"], ["holds the source"]),
        (["prepare", "parquet", "hub.out", "data.path=hub"], ["no column 'label'"]),
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
    (tmp_path / "link").symlink_to(tmp_path / "one")
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
    assert not any((tmp_path / folder / "out").exists() for folder in (".", "one"))


def test_an_s3_destination_must_be_apart_from_the_source(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    object_store.make_bucket("apart")
    for destination, said in (
        ("s3://apart/a/b/out", "lies in the source, data.path=s3://apart/a/b"),
        ("s3://apart/a/b/", "is the source"),
        ("s3://apart", "holds the source"),
        ("s3://apart/a/bc", "holds no *.parquet file|there is no such file or folder"),
    ):
        assert main(["prepare", "parquet", destination, "data.path=s3://apart/a/b"]) == 2
        told = capfd.readouterr().err.splitlines()[-1]
        assert any(part in told for part in said.split("|")), told


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
    assert [path.name for path in birds.parent.glob("out/.*")] == [".prepare.lock"]


# --- a destination that is not finished -----------------------------------------------------------


def write_directly(
    source: str,
    overrides: list[str],
    *,
    destination: str = "out",
    file_mib: float = 256,
    leave_out: int = 0,
) -> list[str]:
    """What `amint prepare SOURCE DEST` would write, without Ray; gives all names of its plan."""
    data = load_config(None, [f"data.source={source}", *overrides]).data
    found, location = open_source(data), locate(destination, "DEST")
    outputs = plan_outputs(found, file_mib)
    fingerprint = plan_fingerprint(found, data, outputs)
    for output in outputs[leave_out:]:
        write_output(found, data, output, location, fingerprint)
    mark_finished(location, {})
    return [output.name for output in outputs]


def told(capfd: pytest.CaptureFixture[str]) -> str:
    """The last line of what was said; nothing else was printed."""
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_what_is_not_finished_is_not_said_to_be_while_prepare_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (name,) = write_directly("digits", [], leave_out=1)
    draft = tmp_path / f"out/.{name}.{'0' * 32}.tmp"
    draft.touch()

    def fail(*_: Any, **__: Any) -> Any:
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".prepare.lock"]
        draft.touch()  # as a task does that is killed
        raise RunError("no Ray today")

    monkeypatch.setattr(prepare_data, "connect", fail)
    assert main(["prepare", "digits", "out"]) == 1
    assert told(capfd) == "amint: no Ray today"
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".prepare.lock"]


def test_a_second_prepare_to_one_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (name,) = write_directly("digits", [], leave_out=1)
    draft = tmp_path / f"out/.{name}.{'0' * 32}.tmp"
    draft.touch()
    with FileLock(tmp_path / "out/.prepare.lock"):
        assert main(["prepare", "digits", "out"]) == 2
    assert "another call is writing to out; wait" in told(capfd)
    assert draft.exists() and (tmp_path / "out/prepared.json").exists()


def test_a_refusal_leaves_nothing_that_looks_finished(
    birds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_directly("folder", [f"data.path={birds}"])
    arguments = ["prepare", "folder", "out", f"data.path={birds}", "--json"]
    assert main(arguments) == 2
    assert "2 of 73 cannot be used, more than data.max_bad_fraction = 0.001" in told(capfd)
    assert not (birds.parent / "out/prepared.json").exists()
    for command in (["train", "digits", "data.source=parquet"], ["data", "parquet"]):
        assert main([*command, "data.path=out"]) == 2
        assert "`amint prepare`" in told(capfd)
    assert main([*arguments, "data.max_bad_fraction=0.05"]) == 0
    document = json.loads(capfd.readouterr().out)
    stored = json.loads((birds.parent / "out/prepared.json").read_text())
    assert stored == {key: value for key, value in document.items() if key != "seconds"}
    assert main(["data", "parquet", "data.path=out", "--sheet="]) == 0


def test_an_unreadable_file_weighs_as_much_as_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    write_images(tmp_path / "images", 100)
    cells = [{"bytes": p.read_bytes(), "path": None} for p in (tmp_path / "images").iterdir()]
    table = pa.table({"image": cells, "label": [0] * 100})
    for name in ("a", "b"):
        pq.write_table(table, tmp_path / f"hub/{name}.parquet")
    whole = (tmp_path / "hub/b.parquet").read_bytes()
    (tmp_path / "hub/b.parquet").write_bytes(whole[:-20])
    write_directly("parquet", ["data.path=hub"])
    for allowed in (0.001, 0.4):
        limit = f"data.max_bad_fraction={allowed}"
        run = ["train", "digits", "data.source=parquet", "data.path=hub"]
        for command in (["prepare", "parquet", "out", "data.path=hub"], run):
            assert main([*command, limit]) == 2
            text = told(capfd)
            assert "0 of 100" in text and "1 whole file" in text and "b.parquet" in text
            assert f"data.max_bad_fraction = {allowed:g} allows" in text
    arguments = ["prepare", "parquet", "out", "data.path=hub", "data.max_bad_fraction=0.6"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["count"] == 100
    assert [row["sample_id"] for row in document["quarantined"]] == ["b.parquet"]
    assert main(["data", "parquet", "data.path=out", "--sheet="]) == 0


@pytest.mark.ray
@pytest.mark.slow
def test_prepare_that_is_interrupted_midway_is_told_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    cells = []
    for shade in range(0, 240, 10):  # small files that take long to decode
        path = tmp_path / f"{shade}.png"
        Image.new("RGB", (2000, 2000), (shade, 255 - shade, 40)).save(path)
        cells.append({"bytes": path.read_bytes(), "path": None})
    table = pa.table({"image": cells * 4, "label": [i % 3 for i in range(96)]})
    pq.write_table(table, tmp_path / "hub/train.parquet", row_group_size=6)

    arguments = ["prepare", "parquet", "out", "data.path=hub", "--file-mib=1e-6", "--json"]

    def files() -> list[Path]:
        return sorted(tmp_path.glob("out/*.parquet"))

    first = Command(tmp_path, arguments)
    first.wait_until(lambda: len(files()) >= 3)
    first.interrupt(signal.SIGINT)
    assert first.wait() == 130, first.stderr
    assert first.leftovers() == []
    some = {path.name: path.stat().st_mtime_ns for path in files()}
    assert 3 <= len(some) < 16
    assert [path.name for path in tmp_path.glob("out/.*")] == [".prepare.lock"]
    assert not (tmp_path / "out/prepared.json").exists()
    for command in (["train", "digits", "data.source=parquet"], ["data", "parquet"]):
        assert main([*command, "data.path=out"]) == 2
        text = told(capfd)
        assert f"{len(some)} of the 16 files train-…-of-00016.parquet are there" in text
        assert "finish `amint prepare`" in text
    document = Command(tmp_path, arguments).document()
    assert document["resumed"] == len(some) and document["files"] == 16
    assert document["count"] == 96 and document["quarantined"] == []
    assert {n: t for n, t in ((p.name, p.stat().st_mtime_ns) for p in files()) if n in some} == some
    write_directly("parquet", ["data.path=hub"], destination="whole", file_mib=1e-6)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("whole/*.parquet")}
    assert {path.name: path.read_bytes() for path in files()} == whole
    assert main(["data", "parquet", "data.path=out", "--sheet="]) == 0
