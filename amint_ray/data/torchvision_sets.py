"""torchvision's own data sets: its downloads, its checks, its readers, our sources."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amint_ray.contracts import UserError
from amint_ray.data.arrays import ArraySource, Part
from amint_ray.data.folder import Files, FileSource
from amint_ray.data.sources import Source
from amint_ray.storage import locate, without_secrets

_DEFAULT_ROOT = "~/.cache/amint_ray"
_SILENT_SECONDS = 60.0
_LONGEST_MESSAGE = 400
_GTSRB_CLASSES = 43


@dataclass(frozen=True)
class _Set:
    """What torchvision calls a set's splits, and which files it wants.

    Attributes:
        train: argument that opens the training split.
        test: argument that opens what is the official test split here.
        files: what to put where, if it cannot be downloaded.
        downloads: whether torchvision can download it.
    """

    train: Mapping[str, Any]
    test: Mapping[str, Any]
    files: str
    downloads: bool = True


_FLAG: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"train": True}, {"train": False})
_NAME: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"split": "train"}, {"split": "test"})
_SETS = {
    "MNIST": _Set(*_FLAG, "its four *-ubyte.gz files in {root}/MNIST/raw"),
    "FashionMNIST": _Set(*_FLAG, "its four *-ubyte.gz files in {root}/FashionMNIST/raw"),
    "CIFAR10": _Set(*_FLAG, "cifar-10-python.tar.gz in {root}"),
    "CIFAR100": _Set(*_FLAG, "cifar-100-python.tar.gz in {root}"),
    "SVHN": _Set(*_NAME, "train_32x32.mat and test_32x32.mat in {root}"),
    "GTSRB": _Set(
        *_NAME,
        "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip in "
        "{root}/gtsrb",
    ),
    "ImageNet": _Set(
        {"split": "train"},
        {"split": "val"},
        "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in "
        "{root}",
        downloads=False,
    ),
}


def open_torchvision(name: str, path: str | None, *, limit: int | None, where: str) -> Source:
    """Open one of torchvision's sets; what is not there is downloaded, where torchvision can.

    Small sets are held in memory; the files of GTSRB and ImageNet are listed.

    Args:
        name: torchvision's name of it.
        path: folder in which torchvision keeps its files; None: `~/.cache/amint_ray`.
        limit: images of each split; None: all.
        where: section of the configuration, for errors.

    Raises:
        UserError: it is not there and cannot be downloaded, or its files are damaged.
    """
    given = path or _DEFAULT_ROOT
    if "://" in given:
        raise UserError(
            f"{where}: {where}.path={without_secrets(given)}: torchvision reads "
            f"local folders only; from object storage take {where}.source=folder, or parquet after "
            "`amint prepare`"
        )
    wanted = _SETS[name]
    try:
        root = Path(given).expanduser().absolute()
        with _quietly():
            train = _open_split(name, root, wanted, wanted.train)
            test = _open_split(name, root, wanted, wanted.test)
            if name in ("GTSRB", "ImageNet"):
                return _file_source(name, root, train, test, limit=limit, where=where)
            parts = [_part(f"{name}/train", train, False), _part(f"{name}/test", test, True)]
            names = train.classes if hasattr(train, "classes") else [str(i) for i in range(10)]
            return ArraySource(parts, names, limit=limit)
    except UserError:
        raise
    except Exception as error:  # torchvision raises nearly anything on damaged files
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: {where}.path={given}: torchvision cannot open {name}: "
            f"{said[:_LONGEST_MESSAGE]}; remove what is damaged, and put "
            f"{wanted.files.format(root=given)}"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Nothing on stdout, which belongs to the command's own output; no wait without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENT_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _open_split(name: str, root: Path, wanted: _Set, which: Mapping[str, Any]) -> Any:
    """A torchvision data set, its files checked by it."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    if not wanted.downloads:
        return kind(str(root), **which)
    try:
        return kind(str(root), download=False, **which)
    except RuntimeError:  # not there, or not whole
        return kind(str(root), download=True, **which)


def _part(name: str, split: Any, test: bool) -> Part:
    """An in-memory split's pixels and labels."""
    pixels = np.asarray(split.data)
    label = np.asarray(split.labels if hasattr(split, "labels") else split.targets, np.int64)
    if name.startswith("SVHN"):  # channels come first
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    if len(pixels) != len(label):
        raise ValueError(f"{name} has {len(pixels)} images and {len(label)} labels")
    return Part(name, pixels, label, test)


def _file_source(
    name: str, root: Path, train: Any, test: Any, *, limit: int | None, where: str
) -> FileSource:
    """The files that torchvision lists; sample ids are their paths below the root."""
    if name == "ImageNet":
        # torchvision numbers the classes of each split by the folders that are there.
        if unknown := set(test.wnids) - set(train.wnids):
            raise ValueError(f"val has the class {min(unknown)}, which train has not")
        names = [", ".join(synonyms) for synonyms in train.classes]
        of_test = [train.wnid_to_idx[wnid] for wnid in test.wnids]
        listed, held = train.samples, [(path, of_test[label]) for path, label in test.samples]
    else:
        names = [str(i) for i in range(_GTSRB_CLASSES)]
        listed, held = train._samples, test._samples
    samples = [*listed, *held]
    details = np.array([_details(path) for path, _ in samples], np.int64).reshape(-1, 2)
    files = Files(
        path=[Path(path).relative_to(root).as_posix() for path, _ in samples],
        label=np.array([label for _, label in samples], np.int32),
        test=np.arange(len(samples)) >= len(listed),
        size=details[:, 0],
        version=details[:, 1],
    )
    location = locate(str(root), f"{where}.path", seconds=_SILENT_SECONDS)
    return FileSource(
        location, files, class_names=names, limit=limit, notes=[], seconds=_SILENT_SECONDS
    )


def _details(path: str) -> tuple[int, int]:
    """(bytes, time of change in ns); reading tells who asks for it that a file is gone."""
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
