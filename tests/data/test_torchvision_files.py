"""torchvision's sets of files: GTSRB, ImageNet."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from folder_trees import devkit, listed, plant
from PIL import Image
from published import noise, opened, refusal, without_network
from torchvision.datasets import imagenet

from amint_ray.data.sources import Source


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return without_network(monkeypatch)


# --- GTSRB ----------------------------------------------------------------------------------------


def test_gtsrb(tmp_path: Path, network: list[str]) -> None:
    base = tmp_path / "gtsrb"
    for number in range(43):
        image = Image.fromarray(noise(15, 16, 3, seed=number))
        (base / f"GTSRB/Training/{number:05d}").mkdir(parents=True)
        image.save(base / f"GTSRB/Training/{number:05d}/00000_{number:05d}.ppm")
    held = base / "GTSRB" / "Final_Test" / "Images"
    held.mkdir(parents=True)
    table = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate((16, 1, 38)):
        Image.fromarray(noise(9, 9, 3, seed=number)).save(held / f"{number:05d}.ppm")
        table.append(f"{number:05d}.ppm;9;9;0;0;8;8;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(table))
    source = opened("GTSRB", tmp_path)
    assert source.class_names == [str(i) for i in range(43)]
    found = listed(source)
    assert len(found) == 46
    for number in range(43):
        name = f"gtsrb/GTSRB/Training/{number:05d}/00000_{number:05d}.ppm"
        assert found[name] == (number, False)
    for number, label in enumerate((16, 1, 38)):
        assert found[f"gtsrb/GTSRB/Final_Test/Images/{number:05d}.ppm"] == (label, True)
    check_files(source, tmp_path)
    assert network == []
    shutil.rmtree(held)
    assert f"GTSRB_Final_Test_GT.zip in {tmp_path}/gtsrb" in refusal("GTSRB", tmp_path)


def check_files(source: Source, root: Path) -> None:
    """Read as they are, and again in another process."""
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for number, shard in enumerate(copy.shards):
            paths = [root / name for name in copy.sample_ids(number)]
            assert copy.read(number, range(shard.rows)) == [path.read_bytes() for path in paths]
            assert shard.size == sum(path.stat().st_size for path in paths)


# --- ImageNet -------------------------------------------------------------------------------------

WNIDS = ["n01443537", "n02012849", "n03126707"]


def test_imagenet(tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{w}/{w}_{i}.JPEG" for w in WNIDS for i in range(2)])
    # Without the first class: torchvision counts the others from 0, which is not what train says.
    plant(tmp_path, [f"val/{w}/ILSVRC2012_val_{i:08d}.JPEG" for w in WNIDS[1:] for i in (1, 2)])
    synonyms = {wnid: (f"{wnid} a", "b c") for wnid in WNIDS}
    torch.save((synonyms, []), tmp_path / "meta.bin")
    source = opened("ImageNet", tmp_path)
    assert source.class_names == [f"{wnid} a, b c" for wnid in WNIDS]
    expected = {f"train/{w}/{w}_{i}.JPEG": (n, False) for n, w in enumerate(WNIDS) for i in (0, 1)}
    for number, wnid in enumerate(WNIDS[1:], 1):
        for i in (1, 2):
            expected[f"val/{wnid}/ILSVRC2012_val_{i:08d}.JPEG"] = (number, True)
    assert listed(source) == expected
    check_files(source, tmp_path)
    limited = opened("ImageNet", tmp_path, limit=3)
    assert [(s.rows, s.test) for s in limited.shards] == [(3, False), (3, True)]
    plant(tmp_path, ["val/n09999999/1.JPEG"])
    torch.save(({**synonyms, "n09999999": ("x",)}, []), tmp_path / "meta.bin")
    assert "val has the class n09999999" in refusal("ImageNet", tmp_path)


def test_imagenet_from_its_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, root = tmp_path / "made", tmp_path / "root"
    root.mkdir()
    devkit(made, {1: WNIDS[1], 2: WNIDS[0]}, truth=[2, 1, 2])
    pack(root / "ILSVRC2012_devkit_t12.tar.gz", made)
    for wnid in WNIDS[:2]:
        plant(made / wnid, [f"{wnid}_{i}.JPEG" for i in range(2)])
        pack(made / "train" / f"{wnid}.tar", made / wnid)
    pack(root / "ILSVRC2012_img_train.tar", made / "train")
    plant(made / "val", [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)])
    pack(root / "ILSVRC2012_img_val.tar", made / "val")
    archives = {
        key: (file, hashlib.md5((root / file).read_bytes()).hexdigest())
        for key, (file, _) in imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", archives)
    found = listed(opened("ImageNet", root))
    assert found[f"val/{WNIDS[0]}/ILSVRC2012_val_00000001.JPEG"] == (0, True)
    assert found[f"val/{WNIDS[1]}/ILSVRC2012_val_00000002.JPEG"] == (1, True)
    assert found[f"val/{WNIDS[0]}/ILSVRC2012_val_00000003.JPEG"] == (0, True)
    assert len(found) == 4 + 3


def pack(archive: Path, folder: Path) -> None:
    """A tar of what a folder holds."""
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        for item in sorted(folder.iterdir()):
            tar.add(item, item.name)


def test_imagenet_is_not_downloaded(tmp_path: Path, network: list[str]) -> None:
    text = refusal("ImageNet", tmp_path)
    assert "ILSVRC2012_devkit_t12.tar.gz is not present" in text
    assert f"ILSVRC2012_img_val.tar in {tmp_path}" in text
    assert network == []
