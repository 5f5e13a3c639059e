"""An index in parts on disk: shared among processes, interrupted, gone on with, used again."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow.parquet as pq
import pytest
from folder_trees import plant
from hub_files import (
    NO_TEST,
    hub,
    index_folder,
    opened,
    photo,
    plant_pool,
    reasons,
    same,
    write_hub,
)
from image_files import encoded, noise
from pyarrow.fs import LocalFileSystem

from amint_ray.config.data_schema import Data
from amint_ray.contracts import RunError
from amint_ray.data import index as module
from amint_ray.data.index import (
    Index,
    chunks,
    index_here,
)
from amint_ray.data.sources import Source, count, open_source
from amint_ray.storage import Location


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of a few hundred images is cut like one of millions."""
    monkeypatch.setattr(module, "_CHUNK_ROWS", 20)


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_pool(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[int, ProcessPoolExecutor]]:
    """Pools of 1, 2 and 4 processes that share nothing with this one."""
    context = multiprocessing.get_context("forkserver")
    pools = {n: ProcessPoolExecutor(n, mp_context=context) for n in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.shutdown()


def by_processes(
    pool: ProcessPoolExecutor, root: Path, config: Data, order: list[int] | None = None
) -> Index:
    """The index by way of a folder, its parts written by a pool in this order."""
    source = open_source(config)
    folder = index_folder(root, source, config)
    for done in [pool.submit(folder.write, c, source, config) for c in order or folder.missing()]:
        done.result()
    assert folder.missing() == []
    return folder.read(source, config)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("near_duplicates", [None, 2])
def test_processes_and_the_order_of_parts_leave_no_trace(
    near_duplicates: int | None,
    pool_folder: Path,
    processes: dict[int, ProcessPoolExecutor],
    tmp_path: Path,
) -> None:
    config = hub(pool_folder, near_duplicates=near_duplicates)
    source = open_source(config)
    here = index_here(source, config, readers=2)
    parts = range(len(chunks(source)))
    assert len(parts) >= 12
    for workers, pool in processes.items():
        order = np.random.default_rng(workers).permutation(parts).tolist()
        same(here, by_processes(pool, tmp_path / str(workers), config, order))


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_pass_goes_on(pool_folder: Path, tmp_path: Path) -> None:
    config = hub(pool_folder)
    source = open_source(config)
    folder = index_folder(tmp_path, source, config)
    everything = list(range(len(chunks(source))))
    assert folder.missing() == everything
    for chunk in (4, 0, 7):
        folder.write(chunk, source, config)
    left = Path(folder.location.path) / ".part-000001.parquet.4711.tmp"
    left.write_bytes(b"PAR1 what a killed process left behind")
    source = open_source(config)
    again = pickle.loads(pickle.dumps(index_folder(tmp_path, source, config)))
    rest = [c for c in everything if c not in (4, 0, 7)]
    assert again.missing() == rest
    assert sum(again.rows(c) for c in everything) == count(source)
    stamps = {path: path.stat().st_mtime_ns for path in Path(folder.location.path).glob("part-*")}
    assert len(stamps) == 3
    for chunk in rest:
        again.write(chunk, source, config)
    assert again.missing() == []
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    same(again.read(source, config), index_here(source, config, readers=2))


@pytest.mark.usefixtures("small_chunks")
def test_a_part_is_there_whole_or_not_at_all(
    pool_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub(pool_folder)
    source = open_source(config)
    folder = index_folder(tmp_path, source, config)

    def full_disk(table: object, file: IO[bytes], **options: object) -> None:
        file.write(b"PAR1")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full_disk)
        with pytest.raises(OSError, match="no space"):
            folder.write(2, source, config)
    assert 2 in folder.missing()
    folder.write(2, source, config)
    assert 2 not in folder.missing()


def test_parts_belong_to_the_files_and_the_settings_that_made_them(tmp_path: Path) -> None:
    pictures = noise(6, 8, 8, 3)
    write_hub(tmp_path / "hub" / "t.parquet", pictures)

    def path(**keys: object) -> str:
        config = hub(tmp_path / "hub", **keys)
        return index_folder(tmp_path, open_source(config), config).location.path

    first = path()
    assert path() == first
    # What only decides roles, or what is made of the pixels, uses the same parts.
    assert path(split_seed=3, shares=NO_TEST, image_size=16, augment="crop_flip") == first
    with_hashes = path(near_duplicates=4)
    assert path(near_duplicates=0) == with_hashes
    seen = {first, with_hashes, path(max_megapixels=1), path(limit=5)}
    write_hub(tmp_path / "hub" / "t.parquet", pictures[::-1])
    seen.add(path())
    assert len(seen) == 5


@pytest.mark.usefixtures("small_chunks")
def test_parts_serve_every_seed_and_distance(tmp_path: Path) -> None:
    for quality in (60, 95):
        cells = [encoded(photo(i), "JPEG", quality=quality) for i in range(30)]
        write_hub(tmp_path / f"{quality}.parquet", cells, group_rows=10)
    config = hub(tmp_path, near_duplicates=0)
    source = open_source(config)
    folder = index_folder(tmp_path / "indexes", source, config)
    for chunk in folder.missing():
        folder.write(chunk, source, config)
    groups = []
    for keys in ({"near_duplicates": 6}, {"near_duplicates": 0, "split_seed": 5}):
        other = hub(tmp_path, **keys)
        again = index_folder(tmp_path / "indexes", source, other)
        assert again.missing() == []
        same(again.read(source, other), index_here(source, other, readers=2))
        groups.append(again.read(source, other).groups)
    assert groups[0] == 30 < groups[1]


SILENT = "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28\nTimeout"


@pytest.mark.usefixtures("small_chunks")
def test_storage_that_does_not_answer_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_hub(tmp_path / f"{i}.parquet", noise(25, 8, 8, 3, seed=i), group_rows=25)
    config = hub(tmp_path)
    source = open_source(config)
    whole = index_here(open_source(config), config, readers=1)
    folder = index_folder(tmp_path / "indexes", source, config)

    def silent(*_: object, **__: object) -> None:
        raise OSError(SILENT)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read_row_group", silent)
        for chunk in folder.missing():
            with pytest.raises(
                OSError, match=rf"^{chunk}\.parquet: cannot be read: AWS Error [^\n]*$"
            ):
                folder.write(chunk, source, config)
        with pytest.raises(RunError, match=r"^data: cannot be read now: 0\.parquet: [^\n]*$"):
            index_here(source, config, readers=2)
    assert folder.missing() == [0, 1, 2]
    for chunk in folder.missing():
        folder.write(chunk, source, config)
    assert folder.missing() == []
    same(folder.read(source, config), whole)


def test_a_file_that_vanishes_under_the_first_pass_stops_it(tmp_path: Path) -> None:
    for i in range(3):
        write_hub(tmp_path / f"{i}.parquet", noise(25, 8, 8, 3, seed=i), group_rows=10)
    source = opened(tmp_path)
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(RunError, match=r"cannot be read now: 1\.parquet: is gone") as told:
        index_here(source, hub(tmp_path), readers=2)
    assert len(str(told.value).splitlines()) == 1


def test_a_file_that_comes_back_is_read_again(tmp_path: Path) -> None:
    """A folder on a network may be away for a moment, and its files are the same afterwards."""
    path = write_hub(tmp_path / "hub" / "t.parquet", noise(25, 8, 8, 3))
    config = hub(path)
    source = open_source(config)
    folder = index_folder(tmp_path, source, config)
    path.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="is gone"):
        folder.write(0, source, config)
    assert folder.missing() == [0]
    (tmp_path / "away").rename(path)
    folder.write(0, source, config)
    assert folder.read(source, config).quarantine == []


def test_too_many_open_files_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hub(write_hub(tmp_path / "t.parquet", noise(4, 8, 8, 3)))
    source = open_source(config)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(RunError, match="Too many open files"):
        index_here(source, config, readers=1)


# --- image files that cannot be read --------------------------------------------------------------


def pictures(root: Path) -> tuple[Data, Source]:
    plant(root, [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    config = Data(source="folder", path=str(root), image_size=8)
    return config, open_source(config)


class Guarded:
    """The local file system, but for files of one name."""

    def __init__(self, name: str, error: OSError) -> None:
        self.name, self.error = name, error

    def open_input_file(self, path: str) -> object:
        if path.endswith(self.name):
            raise self.error
        return LocalFileSystem().open_input_file(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_file_that_this_machine_cannot_read_is_no_finding(number: int, tmp_path: Path) -> None:
    """Mending that changes neither the file's size nor its time, by which findings are kept."""
    config, source = pictures(tmp_path / "set")
    folder = index_folder(tmp_path, source, config)
    place = source._location  # type: ignore[attr-defined]
    guarded = Guarded("b/3.png", OSError(number, "no"))
    source._location = Location(place.uri, guarded, place.path)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=rf"b/3\.png: cannot be read: {os.strerror(number)}"):
        folder.write(0, source, config)
    with pytest.raises(RunError, match=r"^data: cannot be read now: .*b/3\.png: [^\n]*$"):
        index_here(source, config, readers=2)
    assert folder.missing() == [0]
    source._location = place  # type: ignore[attr-defined]
    folder.write(0, source, config)
    assert folder.missing() == []
    assert folder.read(source, config).quarantine == []


def test_a_file_that_vanished_is_left_out_and_looked_for_again(tmp_path: Path) -> None:
    config, source = pictures(tmp_path / "set")
    (tmp_path / "set/a/1.png").write_bytes(b"no picture")
    source = open_source(config)
    folder = index_folder(tmp_path, source, config)
    (tmp_path / "set/b/3.png").rename(tmp_path / "away")
    folder.write(0, source, config)
    index = folder.read(source, config)
    assert set(reasons(index)) == {"a/1.png", "b/3.png"}
    assert reasons(index)["b/3.png"] == "cannot be read: No such file or directory"
    same(index, index_here(source, config, readers=2))
    (tmp_path / "away").rename(tmp_path / "set/b/3.png")
    again = open_source(config)
    assert again.identity == source.identity
    folder = index_folder(tmp_path, again, config)
    assert folder.missing() == [0]
    folder.write(0, again, config)
    assert folder.missing() == []  # what was read and is no image is remembered
    assert set(reasons(folder.read(again, config))) == {"a/1.png"}


def test_want_of_memory_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, source = pictures(tmp_path / "set")
    folder = index_folder(tmp_path, source, config)

    def full(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", full)
        folder.write(0, source, config)
    assert folder.missing() == [0]
    folder.write(0, source, config)
    assert folder.missing() == []
    assert folder.read(source, config).quarantine == []


# --- parts that got damaged -----------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """One bit amid the content hashes, which could be any."""
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(4)
    content[(column.dictionary_page_offset + column.data_page_offset) // 2] ^= 1
    path.write_bytes(bytes(content))


def shorten(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("spoil", "seen_at_once"), [(cut, True), (shorten, True), (Path.unlink, True), (flip, False)]
)
def test_a_damaged_part_is_made_anew(
    spoil: Callable[[Path], None], seen_at_once: bool, pool_folder: Path, tmp_path: Path
) -> None:
    config = hub(pool_folder)
    source = open_source(config)
    folder = index_folder(tmp_path, source, config)
    for chunk in folder.missing():
        folder.write(chunk, source, config)
    spoil(Path(folder.location.path) / "part-000002.parquet")
    assert folder.missing() == ([2] if seen_at_once else [])
    # Also where nobody looked for it.
    same(folder.read(source, config), index_here(source, config, readers=2))
    for chunk in folder.missing():
        folder.write(chunk, source, config)
    same(folder.read(source, config), index_here(source, config, readers=2))


def test_chunks_hold_every_shard_once_and_a_few_thousand_images(tmp_path: Path) -> None:
    path = write_hub(tmp_path / "t.parquet", [b""] * 9000, group_rows=100)
    source = opened(path)
    groups = chunks(source)
    assert [shard for group in groups for shard in group] == list(range(90))
    sizes = [sum(source.shards[shard].rows for shard in group) for group in groups]
    assert all(1000 <= size <= 4000 for size in sizes[:-1]) and len(sizes) > 2
