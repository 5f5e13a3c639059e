"""Folders of image files: what each layout means, what is left out, what is refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from folder_trees import devkit, listed, opened, plant, refusal, synthetic

from amint_ray.contracts import UserError
from amint_ray.data.folder import open_folder
from amint_ray.data.images import decode

# --- layouts --------------------------------------------------------------------------------------


def test_class_folders_at_any_depth_and_of_every_suffix(tmp_path: Path) -> None:
    names = ["cat/1.JPG", "cat/2.jpeg", "cat/a/b/3.png", "cat/4.gif", "cat/5.bmp", "dog/1.jpg"]
    names += ["dog/6.webp", "dog/7.tif", "dog/8.TIFF", "dog/9.ppm", "dog/späce #%?.pgm"]
    plant(tmp_path, names)
    ignored = [".hidden/1.jpg", "cat/.2.jpg", "cat/._1.JPG", "cat/.x/9.png", "dog/read.me", "a.txt"]
    plant(tmp_path, ignored)
    source = opened(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert listed(source) == {name: (int(name[0] == "d"), False) for name in names}
    assert source.notes == []
    assert source.unreadable == []


def test_bytes_are_the_files_own(tmp_path: Path) -> None:
    plant(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    source = opened(tmp_path)
    (shard,) = source.shards
    names = source.sample_ids(0)
    for rows in ([3], [7, 0, 2], range(10)):
        for row, raw in zip(rows, source.read(0, rows), strict=True):
            assert raw == (tmp_path / names[row]).read_bytes()
            assert isinstance(raw, bytes)
            image = decode(raw, max_megapixels=1)
            assert (np.asarray(image) == synthetic(names[row])).all()
    assert shard.size == sum(f.stat().st_size for f in tmp_path.rglob("*.png"))
    assert source.known(0) is None


WORDS_OF_TEST = ["val", "valid", "validation", "dev", "test", "testing", "Test", "eval"]
WORDS_OF_TEST += ["evaluation"]


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("test", WORDS_OF_TEST)
def test_splits(train: str, test: str, tmp_path: Path) -> None:
    plant(tmp_path, [f"{train}/{c}/x/{i}.jpg" for c in ("ant", "bee", "cow") for i in range(3)])
    plant(tmp_path, [f"{test}/bee/1.jpg", f"{test}/cow/2.jpg"])
    source = opened(tmp_path)
    assert source.class_names == ["ant", "bee", "cow"]
    found = listed(source)
    assert found[f"{train}/cow/x/2.jpg"] == (2, False)
    assert found[f"{test}/bee/1.jpg"] == (1, True)
    assert found[f"{test}/cow/2.jpg"] == (2, True)
    assert len(found) == 11


def test_val_and_test_are_both_official_and_train_alone_is_no_class(tmp_path: Path) -> None:
    plant(tmp_path, ["train/a/1.jpg", "train/b/1.jpg"])
    assert {test for _, test in listed(opened(tmp_path)).values()} == {False}
    assert opened(tmp_path).class_names == ["a", "b"]
    plant(tmp_path, ["top.jpg"])
    assert opened(tmp_path).notes == ["1 image beside train, left out"]
    (tmp_path / "top.jpg").unlink()
    plant(tmp_path, ["val/a/1.jpg", "test/b/2.jpg"])
    found = listed(opened(tmp_path))
    assert found["val/a/1.jpg"] == (0, True)
    assert found["test/b/2.jpg"] == (1, True)


def test_a_class_called_train(tmp_path: Path) -> None:
    plant(tmp_path, ["train/1.jpg", "bus/1.jpg", "car/x/1.jpg"])
    source = opened(tmp_path)
    assert source.class_names == ["bus", "car", "train"]
    assert listed(source)["train/1.jpg"] == (2, False)


def test_what_is_left_out_is_noted(tmp_path: Path) -> None:
    plant(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/stray.jpg", "val/a/2.jpg"])
    plant(tmp_path, ["extra/a/1.jpg", "extra/2.jpg", "top.jpg", "test/1.jpg", "test/2.jpg"])
    (tmp_path / "train" / "none").mkdir()
    (tmp_path / "extra" / "none").mkdir()
    source = opened(tmp_path)
    assert set(listed(source)) == {"train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg"}
    assert source.notes == [
        "train: 1 image outside class folders, left out",
        "test: 2 images without labels, left out",
        "1 image beside train, left out",
        "extra: 2 images beside train, left out",
        "train/none: no images there",
    ]


def test_empty_class_folders_are_no_classes(tmp_path: Path) -> None:
    plant(tmp_path, ["b/1.jpg", "c/1.jpg", "stray.png"])
    for name in "adefghi":
        (tmp_path / name).mkdir()
    source = opened(tmp_path)
    assert source.class_names == ["b", "c"]
    assert source.notes == [
        "1 image outside class folders, left out",
        "a, d, e, f, g and 2 more: no images there",
    ]


def test_links_are_followed(tmp_path: Path) -> None:
    plant(tmp_path / "elsewhere", ["1.jpg", "2.jpg"])
    plant(tmp_path / "data", ["a/1.jpg"])
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "data" / "a" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert set(listed(opened(tmp_path / "data"))) == {
        *("a/1.jpg", "a/linked.jpg", "b/1.jpg", "b/2.jpg")
    }


# --- Tiny ImageNet and ImageNet -------------------------------------------------------------------

WNIDS = ["n01443537", "n02012849", "n03126707"]
WORDS = "n01443537\tgoldfish, Carassius auratus\nn02012849\tcrane\nn03126707\tcrane\nn1\tx\n"
NAMES = ["goldfish, Carassius auratus", "crane (n02012849)", "crane (n03126707)"]


def tiny(root: Path) -> None:
    plant(root, [f"train/{w}/images/{w}_{i}.JPEG" for w in reversed(WNIDS) for i in range(3)])
    plant(root, [f"val/images/val_{i}.JPEG" for i in range(5)])
    plant(root, [f"test/images/test_{i}.JPEG" for i in range(4)])
    for wnid in WNIDS:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("box")
    rows = [f"val_{i}.JPEG\t{WNIDS[(i + 1) % 3]}\t0\t0\t62\t62" for i in range(4)]
    rows += [f"val_77.JPEG\t{WNIDS[0]}\t0\t0\t62\t62"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows))
    (root / "words.txt").write_text(WORDS)


def test_tiny_imagenet(tmp_path: Path) -> None:
    tiny(tmp_path)
    source = opened(tmp_path)
    assert source.class_names == NAMES
    found = listed(source)
    for label, wnid in enumerate(WNIDS):
        assert found[f"train/{wnid}/images/{wnid}_2.JPEG"] == (label, False)
    for i in range(4):
        assert found[f"val/images/val_{i}.JPEG"] == ((i + 1) % 3, True)
    assert len(found) == 9 + 4
    assert sorted(source.notes) == [
        "test: 4 images without labels, left out",
        "val: 1 image that val_annotations.txt does not name, left out",
        "val: val_annotations.txt names 1 image without a file (val_77.JPEG)",
    ]
    (tmp_path / "words.txt").unlink()
    assert opened(tmp_path).class_names == WNIDS
    with (tmp_path / "val" / "val_annotations.txt").open("a") as file:
        file.write("\nval_4.JPEG\tn09999999\t0\t0\t1\t1")
    assert "val has a class 'n09999999' that train has not" in refusal(tmp_path)


def raw_imagenet(root: Path) -> list[str]:
    plant(root, [f"train/{w}/{w}_{i}.JPEG" for w in WNIDS for i in range(2)])
    plant(root, [f"test/ILSVRC2012_test_{i:08d}.JPEG" for i in range(1, 4)])
    names = [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)]
    plant(root, names)
    return names


@pytest.mark.parametrize("up", [0, 1, 2, 3])
def test_imagenet_of_kaggle(up: int, tmp_path: Path) -> None:
    root = tmp_path / "a" / "Data" / "CLS-LOC"
    names = raw_imagenet(root)
    table = ["ImageId,PredictionString"]
    table += [
        f"{Path(name).stem},{WNIDS[i % 3]} 1 2 3 4 {WNIDS[i % 3]} 5 6 7 8"
        for i, name in enumerate(names[:5])
    ]
    table += [f"ILSVRC2012_val_00050000,{WNIDS[0]} 1 2 3 4"]
    beside = [root, *root.parents][up]
    (beside / "LOC_val_solution.csv").write_text("\n".join(reversed(table)))
    (beside / "LOC_synset_mapping.txt").write_text(WORDS.replace("\t", " "))
    source = opened(root)
    assert source.class_names == NAMES
    found = listed(source)
    assert [found[name] for name in names[:5]] == [(i % 3, True) for i in range(5)]
    assert len(found) == 6 + 5
    assert sorted(source.notes) == [
        "test: 3 images without labels, left out",
        "val: 1 image that LOC_val_solution.csv does not name, left out",
        "val: LOC_val_solution.csv names 1 image without a file (ILSVRC2012_val_00050000)",
    ]


def test_kaggles_table_further_up_is_not_looked_for(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b" / "c" / "d"
    names = raw_imagenet(root)
    (tmp_path / "LOC_val_solution.csv").write_text(f"{Path(names[0]).stem},{WNIDS[0]} 1 2 3 4")
    assert "val: 6 images without labels, left out" in opened(root).notes
    (root / "ILSVRC2012_devkit_t12").touch()  # the archive's name without its suffix
    assert "val: 6 images without labels, left out" in opened(root).notes


def test_imagenet_with_the_development_kit(tmp_path: Path) -> None:
    names = raw_imagenet(tmp_path)
    # The kit numbers classes in an order of its own, and lists families of classes behind them.
    numbers = {2: WNIDS[0], 3: WNIDS[1], 1: WNIDS[2]}
    devkit(tmp_path, numbers, truth=[3, 1, 2, 2, 3, 1])
    found = listed(opened(tmp_path))
    assert [found[name] for name in names] == [(i, True) for i in (1, 2, 0, 0, 1, 2)]
    (tmp_path / names[2]).unlink()
    assert listed(opened(tmp_path))[names[3]] == (0, True), "counted by place, not by name"
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"junk")
    assert "ILSVRC2012_devkit_t12/data cannot be read" in refusal(tmp_path)


def test_imagenet_in_class_folders_needs_no_table(tmp_path: Path) -> None:
    plant(tmp_path, [f"{s}/{w}/{i}.JPEG" for s in ("train", "val") for w in WNIDS for i in (1, 2)])
    found = listed(opened(tmp_path))
    assert found[f"val/{WNIDS[1]}/2.JPEG"] == (1, True)
    assert len(found) == 12


# --- a source for E -------------------------------------------------------------------------------


def test_without_need_of_classes_everything_is_used(tmp_path: Path) -> None:
    plant(tmp_path / "flat", ["1.jpg", "2.jpg"])
    source = opened(tmp_path / "flat", classes_needed=False)
    assert source.class_names is None
    assert listed(source) == {"1.jpg": (None, False), "2.jpg": (None, False)}
    plant(tmp_path / "one", ["cat/1.jpg", "2.jpg"])
    source = opened(tmp_path / "one", classes_needed=False)
    assert source.class_names == ["cat"]
    assert listed(source) == {"cat/1.jpg": (0, False), "2.jpg": (None, False)}
    assert source.notes == []
    plant(tmp_path / "tests", ["test/1.jpg", "val/cat/2.jpg"])
    source = opened(tmp_path / "tests", classes_needed=False)
    assert source.class_names is None
    assert {label for label, _ in listed(source).values()} == {None}
    plant(tmp_path / "new", ["train/a/1.jpg", "train/b/1.jpg", "val/zebra/1.jpg"])
    source = opened(tmp_path / "new", classes_needed=False)
    assert source.class_names == ["a", "b", "zebra"]
    assert listed(source)["val/zebra/1.jpg"] == (2, True)
    raw_imagenet(tmp_path / "raw")
    source = opened(tmp_path / "raw", classes_needed=False)
    assert source.class_names == WNIDS
    assert Counter(label is None for label, _ in listed(source).values()) == {False: 6, True: 9}


# --- what cannot be read --------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    plant(tmp_path, ["file.jpg"])
    assert "is a file, not a folder" in refusal(tmp_path / "file.jpg")
    (tmp_path / "empty").mkdir()
    assert "holds no image files (jpg, jpeg" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "x.parquet").touch()
    assert "source=parquet" in refusal(tmp_path / "empty")
    assert "holds no image files" in refusal(tmp_path / "empty", classes_needed=False)
    plant(tmp_path / "one", ["cat/1.jpg", "cat/2.jpg"])
    assert "one class only, 'cat'; expected are class folders" in refusal(tmp_path / "one")
    plant(tmp_path / "flat", ["1.jpg"])
    assert "no class folders; expected are class folders" in refusal(tmp_path / "flat")
    plant(tmp_path / "flat2", ["train/1.jpg", "test/1.jpg"])
    assert "no class folders" in refusal(tmp_path / "flat2")
    plant(tmp_path / "tests", ["val/a/1.jpg", "test/b/1.jpg"])
    assert "holds test and val, but no folder train" in refusal(tmp_path / "tests")
    plant(tmp_path / "new", ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/zebra/1.jpg"])
    assert "val has a class 'zebra' that train has not" in refusal(tmp_path / "new")


def test_section_of_the_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_folder(
            str(tmp_path / "x"), limit=None, seconds=1, where="data.external", classes_needed=False
        )
    assert str(caught.value).startswith(f"data.external: data.external.path={tmp_path}/x: there")


def test_names_that_are_not_utf8_are_left_out(tmp_path: Path) -> None:
    plant(tmp_path, ["a/1.jpg", "b/1.jpg"])
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/caf\xe9.jpg")).touch()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    source = opened(tmp_path)
    assert set(listed(source)) == {"a/1.jpg", "b/1.jpg"}
    assert source.notes == ["1 file not named in UTF-8, left out"]
