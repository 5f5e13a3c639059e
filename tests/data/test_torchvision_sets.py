"""torchvision's in-memory sets, from small files in the published formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import Pixels, check, labels_of, noise, opened, refusal, serving, without_network
from scipy.io import savemat
from torchvision import datasets

from amint_ray.contracts import UserError
from amint_ray.data.arrays import ArraySource
from amint_ray.data.torchvision_sets import open_torchvision


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return without_network(monkeypatch)


# --- MNIST ----------------------------------------------------------------------------------------


def idx(array: Pixels) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def mnist(folder: Path) -> dict[str, tuple[Pixels, list[int]]]:
    """The four files, unpacked: more training images than a shard has."""
    folder.mkdir(parents=True)
    splits = {}
    for split, prefix, count in (("train", "train", 700), ("test", "t10k", 30)):
        pixels, label = noise(count, 28, 28, seed=count), labels_of(count)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.array(label, np.uint8)))
        splits[split] = (pixels, label)
    return splits


@pytest.mark.parametrize(
    ("name", "first"), [("MNIST", "0 - zero"), ("FashionMNIST", "T-shirt/top")]
)
def test_mnist(name: str, first: str, tmp_path: Path, network: list[str]) -> None:
    splits = mnist(tmp_path / name / "raw")
    source = opened(name, tmp_path)
    check(source, name, splits)
    assert source.class_names is not None
    assert (len(source.class_names), source.class_names[0]) == (10, first)
    assert [(s.rows, s.test, s.size) for s in source.shards] == [
        (512, False, 512 * 784),
        (188, False, 188 * 784),
        (30, True, 30 * 784),
    ]
    assert (source.notes, source.unreadable, source.known(0)) == ([], [], None)
    assert network == []
    copy = pickle.loads(pickle.dumps(source))
    check(copy, name, splits)
    assert copy.identity == source.identity == opened(name, tmp_path).identity


def test_limit_of_each_split(tmp_path: Path) -> None:
    splits = mnist(tmp_path / "MNIST" / "raw")
    source = opened("MNIST", tmp_path, limit=20)
    check(source, "MNIST", {s: (pixels[:20], label[:20]) for s, (pixels, label) in splits.items()})
    assert source.identity != opened("MNIST", tmp_path).identity
    assert isinstance(source, ArraySource)
    assert all(part.pixels.base is None for part in source._parts), "the rest is kept"
    assert len(pickle.dumps(source)) < 50_000


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_identity_changes_with_the_content(file: str, tmp_path: Path) -> None:
    mnist(tmp_path / "MNIST" / "raw")
    before = opened("MNIST", tmp_path).identity
    path = tmp_path / "MNIST" / "raw" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert opened("MNIST", tmp_path).identity != before


def test_damaged_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    mnist(raw)
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    (raw / "train-images-idx3-ubyte").write_bytes(whole[:-5])
    assert f"*-ubyte.gz files in {tmp_path}/MNIST/raw" in refusal("MNIST", tmp_path)
    (raw / "train-images-idx3-ubyte").write_bytes(bytes(20))  # an assertion without words
    assert "open MNIST: AssertionError; " in refusal("MNIST", tmp_path)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(noise(600, 28, 28)))
    assert "600 images and 700 labels" in refusal("MNIST", tmp_path)


def test_without_network_the_reason_and_the_place_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], network: list[str]
) -> None:
    text = refusal("MNIST", tmp_path)
    assert "no route to host" in text
    assert len(network) == 2, "both mirrors"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "torchvision tries" in captured.err


def test_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a server of our own, once."""
    monkeypatch.undo()
    served, root = tmp_path / "served", tmp_path / "root"
    splits = mnist(tmp_path / "plain")
    served.mkdir()
    resources = []
    for file in (tmp_path / "plain").iterdir():
        packed = gzip.compress(file.read_bytes())
        (served / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    with serving(served) as address:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}/"])
        check(opened("MNIST", root), "MNIST", splits)
    check(opened("MNIST", root), "MNIST", splits)
    assert capfd.readouterr().out == ""
    monkeypatch.setattr(datasets.MNIST, "resources", [(n, "0" * 32) for n, _ in resources])
    shutil.rmtree(root)
    with serving(served) as address:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}/"])
        assert "corrupted" in refusal("MNIST", root)


# --- CIFAR ----------------------------------------------------------------------------------------


def cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The published pickles, with the checksums that torchvision is made to expect."""
    kind = getattr(datasets, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes = 10 if name == "CIFAR10" else 100
    key = "labels" if name == "CIFAR10" else "fine_labels"
    splits: dict[str, Any] = {}
    for split in ("train", "test"):
        entries, pixels, label = [], [], []
        for number, (file, _) in enumerate(getattr(kind, f"{split}_list")):
            images = noise(12, 32, 32, 3, seed=number)
            part = labels_of(12, classes, seed=number)
            rows = images.transpose(0, 3, 1, 2).reshape(12, 3072)
            content = pickle.dumps({"data": rows, key: part, "coarse_labels": [0] * 12})
            (folder / file).write_bytes(content)
            entries.append([file, hashlib.md5(content).hexdigest()])
            pixels.append(images)
            label += part
        monkeypatch.setattr(kind, f"{split}_list", entries)
        splits[split] = (np.concatenate(pixels), label)
    content = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    (folder / kind.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(content).hexdigest()})
    return splits


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar(
    name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: list[str]
) -> None:
    splits = cifar(tmp_path, name, monkeypatch)
    source = opened(name, tmp_path)
    check(source, name, splits)
    assert source.class_names == [f"class {i}" for i in range(classes)]
    assert network == []
    damaged = tmp_path / getattr(datasets, name).base_folder / "test"
    for file in damaged.parent.glob("test*"):
        file.write_bytes(b"junk")
    text = refusal(name, tmp_path)
    assert "no route to host" in text, "it was not fetched anew"
    assert f"{getattr(datasets, name).filename} in {tmp_path}" in text


def test_an_archive_in_its_place_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: list[str]
) -> None:
    splits = cifar(tmp_path / "made", "CIFAR10", monkeypatch)
    archive = tmp_path / "root" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    check(opened("CIFAR10", tmp_path / "root"), "CIFAR10", splits)
    assert network == []


# --- SVHN -----------------------------------------------------------------------------------------


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits, entries = {}, {}
    for number, split in enumerate(("train", "test")):
        pixels, label = noise(11, 32, 32, 3, seed=number), labels_of(11, seed=number + 3)
        assert 0 in label
        buffer = io.BytesIO()
        published = np.array([[digit or 10] for digit in label], np.uint8)  # 10 stands for 0
        savemat(buffer, {"X": pixels.transpose(1, 2, 3, 0), "y": published})
        (tmp_path / f"{split}_32x32.mat").write_bytes(buffer.getvalue())
        md5 = hashlib.md5(buffer.getvalue()).hexdigest()
        entries[split] = ["http://nowhere.invalid/x", f"{split}_32x32.mat", md5]
        splits[split] = (pixels, label)
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)
    source = opened("SVHN", tmp_path)
    check(source, "SVHN", splits)
    assert source.class_names == list("0123456789")
    (tmp_path / "test_32x32.mat").write_bytes(b"junk")
    assert f"test_32x32.mat in {tmp_path}" in refusal("SVHN", tmp_path)


# --- where ----------------------------------------------------------------------------------------


def test_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    splits = mnist(tmp_path / ".cache" / "amint_ray" / "MNIST" / "raw")
    check(open_torchvision("MNIST", None, limit=None, where="data"), "MNIST", splits)
    with pytest.raises(UserError, match=r"data.external: .*~/.cache/amint_ray.*CIFAR10"):
        open_torchvision("CIFAR10", None, limit=None, where="data.external")


def test_object_storage_is_refused() -> None:
    with pytest.raises(UserError, match="torchvision reads local folders only"):
        open_torchvision("MNIST", "s3://bucket/x", limit=None, where="data")


def test_credentials_in_an_address_are_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        open_torchvision("MNIST", "s3://KEY:SECRET@bucket/x?k=v", limit=None, where="data")
    assert "data.path=s3://***@bucket/x?***: torchvision reads local" in str(caught.value)


@pytest.fixture(autouse=True)
def same_timeout() -> Iterator[None]:
    """Opening leaves nothing changed for the process."""
    import socket
    import sys

    before = (socket.getdefaulttimeout(), sys.stdout)
    yield
    assert (socket.getdefaulttimeout(), sys.stdout) == before
