"""What the folders of a collection of image files mean: splits, classes, published layouts."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from amint_ray.contracts import first_line, numbered
from amint_ray.data.sources import TEST_WORDS, TRAIN_WORDS, VALIDATION_WORDS

_ANNOTATIONS = "val_annotations.txt"
_SOLUTION = "LOC_val_solution.csv"
_PARENTS_SEARCHED = 3  # Kaggle's images are in ILSVRC/Data/CLS-LOC, its tables beside ILSVRC
_SYNSETS = "LOC_synset_mapping.txt"
_DEVKIT = "ILSVRC2012_devkit_t12/data"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_WNID = re.compile(r"n\d{8}")
_EXPECTED = (
    "expected are class folders (cat/1.jpg, dog/2.jpg), or the same in the folders train and val "
    "or test (train/cat/1.jpg, val/cat/2.jpg)"
)
_SHOWN = 5

Side = Callable[[str, int], bytes | None]
"""Reads what lies beside the images: a path below the folder's n-th parent; None: not there."""


class LayoutError(Exception):
    """Folders that cannot be understood; its text says why, in one line."""


@dataclass
class Layout:
    """How the images of a folder are to be used; the lists have a row an image that is used.

    Attributes:
        path: relative paths.
        label: class indices; −1 where there is none.
        test: whether they belong to the publisher's test split.
        class_names: one a class; None: there are no classes.
        notes: what was left out and why.
    """

    path: list[str] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    test: list[bool] = field(default_factory=list)
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Split:
    """Images with the class each is of; None where that is unknown, and what to say of those."""

    name: str
    test: bool
    classes: Mapping[str, str | None]
    unknown: str = "outside class folders"
    notes: list[str] = field(default_factory=list)


def arrange(
    images: Collection[str], folders: Iterable[str], side: Side, *, classes_needed: bool
) -> Layout:
    """Find out which layout a folder has.

    Args:
        images: relative paths of all images, with `/`.
        folders: relative paths of all folders.
        side: reads what lies beside the images.
        classes_needed: leave out what has no label, and insist on two classes. Otherwise images
            without labels are used, too.

    Raises:
        LayoutError: it has none of those that are known.
    """
    tops: dict[str, list[str]] = {}
    for path in images:
        tops.setdefault(path.partition("/")[0] if "/" in path else "", []).append(path)
    train = next((top for top in sorted(tops) if top.lower() in TRAIN_WORDS), None)
    tests = [top for top in sorted(tops) if top.lower() in TEST_WORDS]
    others = [top for top in sorted(tops) if top != train and top not in tests]
    # {train, bus, car} are three classes; {train, val} are two splits, and so is train alone.
    if train is not None and (tests or not any(others)):
        splits = [_Split(train, False, _by_folder(tops[train], 1))]
        known = {name for name in splits[0].classes.values() if name is not None}
        for top in tests:
            split = _test_split(top, tops[top], known, side)
            if classes_needed and (new := set(split.classes.values()) - known - {None}):
                raise LayoutError(f"{top} has a class {min(map(str, new))!r} that {train} has not")
            splits.append(split)
        splits += [_Split(top, False, dict.fromkeys(tops[top]), "beside train") for top in others]
        used, depth = {train, *tests}, 1
    elif tests and not any(others):
        if classes_needed:
            raise LayoutError(f"holds {' and '.join(tests)}, but no folder train with images")
        splits, used, depth = [_Split("", False, dict.fromkeys(images))], set(), 1
    else:
        splits, used, depth = [_Split("", False, _by_folder(images, 0))], {""}, 0
    classes = sorted({name for split in splits for name in split.classes.values() if name})
    if classes_needed and not classes:
        raise LayoutError(f"holds images, but no class folders; {_EXPECTED}")
    if classes_needed and len(classes) == 1:
        raise LayoutError(f"holds one class only, {classes[0]!r}; {_EXPECTED}")
    layout = Layout(class_names=_class_names(classes, side) if classes else None)
    _fill(layout, splits, classes, keep_all=not classes_needed)
    inhabited = {_upto(path, depth) for path in images}
    empty = [
        folder
        for folder in sorted(folders)
        if folder.count("/") == depth
        and (depth == 0 or folder.partition("/")[0] in used)
        and folder not in inhabited
    ]
    if empty:
        layout.notes.append(f"{_some(empty)}: no images there")
    return layout


def _fill(
    layout: Layout, splits: Sequence[_Split], classes: Sequence[str], *, keep_all: bool
) -> None:
    """The splits' images, one split after the other."""
    index = {name: i for i, name in enumerate(classes)}
    for split in splits:
        layout.notes += split.notes
        left_out = 0
        for path, name in split.classes.items():
            label = -1 if name is None else index.get(name, -1)
            if label == -1 and not keep_all:
                left_out += 1
                continue
            layout.path.append(path)
            layout.label.append(label)
            layout.test.append(split.test)
        if left_out:
            where = f"{split.name}: " if split.name else ""
            layout.notes.append(f"{where}{numbered(left_out, 'images')} {split.unknown}, left out")


def _upto(path: str, depth: int) -> str:
    """The folder at this depth, the first being 0; the path itself where there is none."""
    return "/".join(path.split("/")[: depth + 1])


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _by_folder(paths: Iterable[str], depth: int) -> dict[str, str | None]:
    """The folder at this depth is the class."""
    parts = ((path, path.split("/")) for path in paths)
    return {path: part[depth] if len(part) > depth + 1 else None for path, part in parts}


def _test_split(top: str, paths: list[str], known: Collection[str], side: Side) -> _Split:
    """A split beside `train`: in class folders, or labelled by a table, or not at all."""
    by_folder = _by_folder(paths, 1)
    annotations = side(f"{top}/{_ANNOTATIONS}", 0)
    if annotations is not None:
        rows = (line.split() for line in _text(annotations).splitlines())
        table = {row[0]: row[1] for row in rows if len(row) > 1}
        return _by_table(
            top, {path: PurePosixPath(path).name for path in paths}, table, _ANNOTATIONS
        )
    if any(name is not None and name != "images" for name in by_folder.values()) or (
        "images" in known
    ):
        return _Split(top, True, by_folder)
    # Flat, or in one folder that is no class.
    if top.lower() in VALIDATION_WORDS:
        stems = {path: PurePosixPath(path).stem for path in paths}
        for up in range(_PARENTS_SEARCHED + 1):
            if (solution := side(_SOLUTION, up)) is not None:
                return _by_table(top, stems, _read_solution(solution), _SOLUTION)
        truth, meta = (side(f"{_DEVKIT}/{name}", 0) for name in (_TRUTH, _META))
        if truth is not None and meta is not None:
            return _by_table(top, stems, _read_devkit(truth, meta), _TRUTH)
    return _Split(top, True, dict.fromkeys(paths), "without labels")


def _by_table(top: str, keys: Mapping[str, str], table: Mapping[str, str], source: str) -> _Split:
    """Labels that a table has by file name.

    Args:
        top: the split's folder.
        keys: each path's name in the table.
        table: classes by name.
        source: the table's file, for notes.
    """
    split = _Split(top, True, {path: table.get(key) for path, key in keys.items()})
    split.unknown = f"that {source} does not name"
    missing = sorted(table.keys() - set(keys.values()))
    if missing:
        split.notes.append(
            f"{top}: {source} names {numbered(len(missing), 'images')} without a file "
            f"({_some(missing)})"
        )
    return split


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _read_solution(content: bytes) -> dict[str, str]:
    """Kaggle's `LOC_val_solution.csv`: the image's name, then the class and its boxes."""
    rows = csv.reader(io.StringIO(_text(content)))
    return {
        row[0]: row[1].split()[0]
        for row in rows
        if len(row) > 1 and row[1].strip() and row[0] != "ImageId"
    }


def _read_devkit(truth: bytes, meta: bytes) -> dict[str, str]:
    """ImageNet's development kit: a class number a line, and which number is which class."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = [int(line) for line in truth.split()]
        return {f"ILSVRC2012_val_{i + 1:08d}": wnid[number] for i, number in enumerate(numbers)}
    except Exception as error:  # loadmat raises nearly anything on a damaged file
        raise LayoutError(f"{_DEVKIT} cannot be read: {first_line(error)}") from error


def _class_names(classes: Sequence[str], side: Side) -> list[str]:
    """The folders' names; of WordNet identifiers the words, where a table of them is there."""
    if not all(_WNID.fullmatch(name) for name in classes):
        return list(classes)
    words: dict[str, str] = {}
    for up, table in ((0, "words.txt"), *((up, _SYNSETS) for up in range(_PARENTS_SEARCHED + 1))):
        content = side(table, up)
        if content is not None:
            rows = (line.split(maxsplit=1) for line in _text(content).splitlines())
            words = {row[0]: row[1].strip() for row in rows if len(row) == 2}
            break
    names = [words.get(name, name) for name in classes]
    count = Counter(names)  # two cranes: the bird and the machine
    return [
        name if count[name] == 1 else f"{name} ({wnid})"
        for name, wnid in zip(names, classes, strict=True)
    ]
