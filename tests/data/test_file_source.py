"""Image files as a source: its shards, its identity, files and storage that fail."""

from __future__ import annotations

import errno
import os
import pickle
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from folder_trees import listed, opened, plant, refusal
from odd_objects import ENVIRONMENT, WHOLE, Answer, OddObjects
from pyarrow.fs import LocalFileSystem

from amint_ray.contracts import UserError
from amint_ray.data import folder
from amint_ray.data.folder import Files, FileSource, open_folder
from amint_ray.data.sources import Fault
from amint_ray.storage import Location

# --- shards ---------------------------------------------------------------------------------------


def many(count: int, **keys: Any) -> FileSource:
    """A source of files that are not there, sorted by class: half a of train, half b, then test."""
    names = [f"{c}/{i:05d}.jpg" for c in "ab" for i in range(count // 2)]
    names += [f"test/{i:05d}.jpg" for i in range(300)]
    total = len(names)
    files = Files(
        path=names,
        label=np.repeat([0, 1, 0], [count // 2, count // 2, 300]).astype(np.int32),
        test=np.repeat([False, True], [count, 300]),
        size=np.arange(total),
        version=np.zeros(total, np.int64),
    )
    location = Location("/nowhere", LocalFileSystem(), "/nowhere")
    defaults = {"class_names": ["a", "b"], "limit": None, "notes": [], "seconds": 1}
    return FileSource(location, files, **{**defaults, **keys})


def test_shards_mix_the_classes_in_a_fixed_order() -> None:
    source = many(2000)
    rows = [(shard.rows, shard.test) for shard in source.shards]
    assert rows == [(256, False)] * 7 + [(208, False), (256, True), (44, True)]
    ids = [name for shard in range(10) for name in source.sample_ids(shard)]
    assert len(set(ids)) == 2300
    for shard in range(7):
        labels = source.labels(shard)
        assert labels == ["ab".index(name[0]) for name in source.sample_ids(shard)]
        # Binomial, n = 256 of 2000: a standard deviation is 7.5.
        assert 90 < labels.count(0) < 166
        sizes = [int(name[2:7]) + 1000 * (name[0] == "b") for name in source.sample_ids(shard)]
        assert source.shards[shard].size == sum(sizes)
    ranks = np.array([int(name[2:7]) for name in ids[:2000]])
    assert abs(np.corrcoef(ranks, np.arange(2000))[0, 1]) < 0.1
    # On any machine, with any version of any library.
    by_hash = sorted(ids[:2000], key=lambda name: blake2b(name.encode(), digest_size=8).digest())
    assert ids[:2000] == by_hash
    again = many(2000)
    assert [again.sample_ids(i) for i in range(10)] == [source.sample_ids(i) for i in range(10)]


def test_limit_takes_the_first_of_that_order_in_each_split() -> None:
    whole, part = many(2000), many(2000, limit=260)
    assert [(s.rows, s.test) for s in part.shards] == [
        *((256, False), (4, False), (256, True), (4, True))
    ]
    assert part.sample_ids(0) == whole.sample_ids(0)
    assert part.sample_ids(1) == whole.sample_ids(1)[:4]
    assert part.labels(1) == whole.labels(1)[:4]
    assert part.sample_ids(3) == whole.sample_ids(9)[:4]
    assert part.identity != whole.identity
    assert many(2000, class_names=["b", "a"]).identity != whole.identity


def test_a_million_files_are_held_in_little() -> None:
    source = many(20_000)
    size = len(pickle.dumps(source))
    assert size < 20_300 * 40  # the paths take 11, offsets and labels 8
    copy = pickle.loads(pickle.dumps(source))
    assert copy.sample_ids(5) == source.sample_ids(5)
    assert copy.labels(5) == source.labels(5)
    assert (copy.identity, copy.shards) == (source.identity, source.shards)
    assert len(pickle.dumps(many(20_000, limit=10))) < 5_000


def test_identity_changes_with_the_files(tmp_path: Path) -> None:
    plant(tmp_path, ["a/1.jpg", "b/1.jpg", "b/2.jpg"])
    before = opened(tmp_path).identity
    assert opened(tmp_path).identity == before
    plant(tmp_path, ["notes.txt"])
    assert opened(tmp_path).identity == before
    stat = (tmp_path / "b/2.jpg").stat()
    os.utime(tmp_path / "b/2.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    touched = opened(tmp_path).identity
    assert touched != before
    os.utime(tmp_path / "b/2.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(tmp_path).identity == before
    with (tmp_path / "b/2.jpg").open("ab") as file:
        file.write(b"1")
    os.utime(tmp_path / "b/2.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(tmp_path).identity != before
    (tmp_path / "b/2.jpg").rename(tmp_path / "a/2.jpg")
    assert opened(tmp_path).identity not in (before, touched)


# --- files and storage that fail -----------------------------------------------------------------


def test_a_file_that_is_gone_is_a_fault_of_its_own(tmp_path: Path) -> None:
    plant(tmp_path, ["a/1.jpg", "b/1.jpg", "b/2.jpg", "b/3.jpg"])
    source = opened(tmp_path)
    names = source.sample_ids(0)
    (tmp_path / "b/1.jpg").unlink()
    (tmp_path / "b/2.jpg").unlink()
    (tmp_path / "b/2.jpg").mkdir()
    found = dict(zip(names, source.read(0, range(4)), strict=True))
    assert found["b/1.jpg"] == Fault("cannot be read: No such file or directory", "absent")
    broken = found["b/2.jpg"]
    assert isinstance(broken, Fault) and "is a directory" in broken.reason
    assert broken.cause == "unread"
    assert found["a/1.jpg"] == (tmp_path / "a/1.jpg").read_bytes()
    assert found["b/3.jpg"] == (tmp_path / "b/3.jpg").read_bytes()
    for name in ("a/1.jpg", "b/3.jpg"):
        (tmp_path / name).unlink()
    assert all(isinstance(raw, Fault) for raw in source.read(0, range(4)))


class Failing:
    """Stands for a file system that fails for each file that is named."""

    def __init__(self, errors: dict[str, OSError]) -> None:
        self.errors = errors
        self.asked: Counter[str] = Counter()

    def open_input_file(self, path: str) -> Any:
        self.asked[path] += 1
        if path in self.errors:
            raise self.errors[path]
        return LocalFileSystem().open_input_file(path)


def failing(source: FileSource, row: int, error: OSError) -> None:
    """Have one file of the first shard fail."""
    place = source._location
    errors = {f"{place.path}/{source.sample_ids(0)[row]}": error}
    source._location = Location(place.uri, Failing(errors), place.path)


@pytest.fixture
def four(tmp_path: Path) -> FileSource:
    plant(tmp_path, [f"{c}/{i}.jpg" for c in "ab" for i in range(2)])
    return opened(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP])
def test_what_is_closed_to_us_is_its_own_fault_but_no_finding(
    number: int, four: FileSource
) -> None:
    failing(four, 2, OSError(number, "no"))
    found = four.read(0, range(4))
    assert found[2] == Fault(f"cannot be read: {os.strerror(number)}", "unread")
    assert [isinstance(raw, bytes) for raw in found] == [True, True, False, True]


@pytest.mark.parametrize(
    "number",
    [errno.ENOTCONN, errno.ETIMEDOUT, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE],
)
def test_a_file_system_that_is_away_is_no_fault_of_the_image(number: int, four: FileSource) -> None:
    failing(four, 2, OSError(number, "no"))
    name = four.sample_ids(0)[2]
    with pytest.raises(OSError, match=f"/{name}: cannot be read: {os.strerror(number)}"):
        four.read(0, range(4))


# --- object storage that fails --------------------------------------------------------------------

NAMES = [f"{i:03d}.jpg" for i in range(60)]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("keys")
def test_an_object_that_is_refused_for_good_is_a_fault_of_its_own() -> None:
    odd: dict[str, Answer] = {"003.jpg": 403, "007.jpg": "InvalidObjectState", "011.jpg": 404}
    with OddObjects(odd) as store:
        source = store.source(NAMES, seconds=2)
        names = source.sample_ids(0)
        found = dict(zip(names, source.read(0, range(60)), strict=True))
        alone = source.read(0, [names.index("003.jpg")])
    faults = {name: raw for name, raw in found.items() if isinstance(raw, Fault)}
    assert set(faults) == set(odd)
    assert {fault.cause for fault in faults.values()} == {"absent"}
    assert "ACCESS_DENIED" in faults["003.jpg"].reason
    assert faults["011.jpg"].reason == "cannot be read: No such file or directory"
    assert {raw for name, raw in found.items() if name not in odd} == {WHOLE}
    assert isinstance(alone[0], Fault)


@pytest.mark.usefixtures("keys")
def test_a_bucket_that_refuses_everything_is_no_fault_of_its_images() -> None:
    with OddObjects(dict.fromkeys(NAMES, 403)) as store:
        source = store.source(NAMES, seconds=2)
        with pytest.raises(OSError, match=r"^s3://odd/x: cannot be read: .*ACCESS_DENIED"):
            source.read(0, range(60))


@pytest.mark.usefixtures("keys")
def test_a_server_that_is_overloaded_is_no_fault_of_the_image_and_asked_by_its_client() -> None:
    with OddObjects({"030.jpg": 503}) as store:
        source = store.source(NAMES, seconds=2)
        with pytest.raises(OSError, match=r"^s3://odd/x/030.jpg: cannot be read: .*503"):
            source.read(0, range(60))
        assert store.asked["030.jpg"] == 3


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("silent", [NAMES, ["030.jpg"]])
def test_a_server_that_keeps_silent_is_waited_for_once(silent: list[str]) -> None:
    """And not by each file in turn."""
    with OddObjects(dict.fromkeys(silent, None)) as store:
        source = store.source(NAMES, seconds=0.5)
        started = time.monotonic()
        with pytest.raises(OSError, match=r"^s3://odd/x/\d+\.jpg: (did not arrive|cannot be read)"):
            source.read(0, range(60))
        assert time.monotonic() - started < 30  # one after the other: sixty times two seconds
        asked = [store.asked[name] for name in silent if name in store.asked]
        assert len(asked) <= 16 and max(asked) <= 3


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def get_file_info(self, what: object) -> None:
            raise OSError("AWS Error ACCESS_DENIED: no\nmore")

    def located(uri: str, key: str, *, seconds: float) -> Location:
        assert (key, seconds) == ("data.path", 1)
        return Location(uri, Closed(), "bucket/x")

    monkeypatch.setattr(folder, "locate", located)
    assert refusal(Path("s3:/bucket/x")).endswith(": cannot be read: AWS Error ACCESS_DENIED: no")


class Guarded:
    """The local file system, but for files that may not be opened."""

    def __init__(self, closed: Path) -> None:
        self.closed = str(closed)

    def get_file_info(self, what: Any) -> Any:
        return LocalFileSystem().get_file_info(what)

    def open_input_file(self, path: str) -> Any:
        if path == self.closed:
            raise OSError("AWS Error ACCESS_DENIED")
        return LocalFileSystem().open_input_file(path)


def test_a_table_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for missing, unless it lies outside the folder that was named."""
    root = tmp_path / "root"
    plant(root, ["train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"])

    def closed(path: Path) -> None:
        location = Location(str(root), Guarded(path), str(root))
        monkeypatch.setattr(folder, "locate", lambda *args, **keys: location)

    closed(root / "val" / "val_annotations.txt")
    assert refusal(root).endswith(": cannot be read: AWS Error ACCESS_DENIED")
    closed(root / "LOC_val_solution.csv")
    refusal(root)
    closed(tmp_path / "LOC_val_solution.csv")
    assert opened(root).notes == ["val: 1 image without labels, left out"]


def test_a_folder_in_a_bucket(
    object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server: Kaggle's table is found above the prefix, a key that went is a fault."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    object_store.make_bucket("pictures")
    names = [f"train/{c}/{i}.png" for c in ("ant", "späce #%?") for i in range(2)]
    plant(tmp_path / "ILSVRC/Data/CLS-LOC", [*names, "val/x_1.png", "val/x_2.png", "train/.x.png"])
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx_2,ant 1 2 3 4\n")
    client = boto3.session.Session().client("s3")
    for path in tmp_path.rglob("*.*"):
        key = f"deep/{path.relative_to(tmp_path)}"
        client.put_object(Bucket="pictures", Key=key, Body=path.read_bytes())
    uri = "s3://pictures/deep/ILSVRC/Data/CLS-LOC"
    source = open_folder(uri, limit=None, seconds=5, where="data", classes_needed=True)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.notes == ["val: 1 image that LOC_val_solution.csv does not name, left out"]
    assert listed(copy) == {
        **{name: (int("ant" not in name), False) for name in names},
        "val/x_2.png": (0, True),
    }
    local = {name: (tmp_path / "ILSVRC/Data/CLS-LOC" / name).read_bytes() for name in names}
    ids = copy.sample_ids(0)
    assert copy.read(0, range(4)) == [local[name] for name in ids]
    assert copy.shards[0].size == sum(map(len, local.values()))
    client.delete_object(Bucket="pictures", Key=f"deep/ILSVRC/Data/CLS-LOC/{ids[2]}")
    found = copy.read(0, range(4))
    assert found[2] == Fault("cannot be read: No such file or directory", "absent")
    assert found[3] == local[ids[3]]
    with pytest.raises(UserError, match="there is no such folder"):
        open_folder(f"{uri}/x", limit=None, seconds=5, where="data", classes_needed=True)
