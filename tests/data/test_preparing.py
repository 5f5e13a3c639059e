"""Preparing: a source as Parquet files says all that it said before, and spares decoding."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_files import (
    cut_short,
    damage,
    every_id,
    every_label,
    every_raw,
    hub,
    index_folder,
    loaded,
    opened,
    photo,
    reasons,
    refusal,
    role_by_content,
    same,
    write_hub,
)
from image_files import encoded, noise

from amint_ray.config.data_schema import Data
from amint_ray.contracts import RunError, UserError
from amint_ray.data import index as module
from amint_ray.data import preparing
from amint_ray.data.index import Index, index_here
from amint_ray.data.memory import load_memory
from amint_ray.data.preparing import (
    Output,
    Written,
    already_written,
    mark_finished,
    mark_unfinished,
    plan_fingerprint,
    plan_outputs,
    remove_drafts,
    sole_writer,
    write_output,
)
from amint_ray.data.sources import Source, count, open_source
from amint_ray.storage import exists, list_files, locate, write_atomically

if TYPE_CHECKING:
    from infra.local.object_store import ObjectStore

NAMES = ["ant", "bee", "cat"]


def prepare(config: Data, folder: Path, *, file_mib: float = 0.02) -> dict[str, Written]:
    """Write what is missing and tell what was written now."""
    source, location = open_source(config), locate(str(folder), "DEST")
    outputs = plan_outputs(source, file_mib)
    plan = plan_fingerprint(source, config, outputs)
    there = already_written(location, outputs, plan)
    missing = [output for output in outputs if output.name not in there]
    written = {o.name: write_output(source, config, o, location, plan) for o in missing}
    mark_finished(location, {})
    return written


def examined(config: Data) -> tuple[Source, Index]:
    source = open_source(config)
    return source, index_here(source, config, readers=2)


def stored_paths(folder: Path, source: Source) -> list[str]:
    """What the prepared files say of where each image comes from, in the source's order."""
    tables = {p.name: pq.read_table(p)["image"].to_pylist() for p in folder.glob("*.parquet")}
    places = [name.rsplit("#", 1) for name in every_id(source)]
    return [tables[name][int(row)]["path"] for name, row in places]


def check_same(config: Data, folder: Path) -> tuple[Source, Source]:
    """The prepared source is the original in all but the samples' names."""
    keys = config.model_dump(exclude={"source", "path", "image_column", "label_column", "limit"})
    prepared = Data(source="parquet", path=str(folder), **keys)
    (before, old), (after, new) = examined(config), examined(prepared)
    assert (after.class_names, new.class_names) == (before.class_names, old.class_names)
    assert new.quarantine == []
    assert count(after) == len(old.manifest.sample_id)
    assert role_by_content(new) == role_by_content(old)
    named = replace(new.manifest, sample_id=np.array(stored_paths(folder, after)))
    assert named.fingerprint == old.manifest.fingerprint  # contents, labels and roles of each
    assert new.manifest.fingerprint != old.manifest.fingerprint
    sizes = [
        dict(zip(names, zip(i.width.tolist(), i.height.tolist(), strict=True), strict=True))
        for names, i in ((named.sample_id, new), (old.manifest.sample_id, old))
    ]
    assert sizes[0] == sizes[1]
    assert new.groups == old.groups
    return before, after


# --- round trips ----------------------------------------------------------------------------------


def test_digits_come_back(tmp_path: Path) -> None:
    config = Data(image_size=8, channels=1)
    written = prepare(config, tmp_path)
    assert len(written) == 4 and sum(file.rows for file in written.values()) == 1797
    _, after = check_same(config, tmp_path)
    assert every_label(after) == every_label(open_source(config))
    there = Data(source="parquet", path=str(tmp_path), image_size=8, channels=1)
    ours, theirs = (load_memory(open_source(c), c, readers=2)[0] for c in (config, there))
    assert (ours == theirs).all()


def hub_with_faults(root: Path) -> Path:
    """Files of several encodings and sizes with copies, a test split, and three bad rows."""
    pictures = [*noise(30, 12, 9, 3), *noise(10, 8, 8)]
    cells: list[Any] = [encoded(p, "PNG" if i % 3 else "BMP") for i, p in enumerate(pictures)]
    cells += [encoded(photo(i), "JPEG", quality=90) for i in range(4)]
    cells[13], cells[20] = cells[2], b"text"
    labels: list[int | None] = [i % 3 for i in range(44)]
    labels[7], labels[31] = None, 3
    write_hub(root / "train-0.parquet", cells[:22], labels[:22], class_names=NAMES, group_rows=5)
    write_hub(root / "train-1.parquet", cells[22:], labels[22:], class_names=NAMES, group_rows=9)
    held = [encoded(pictures[4], "TIFF"), *noise(8, 8, 8, 3, seed=1)]
    held.append(encoded(photo(0), "JPEG", quality=60))
    write_hub(root / "test.parquet", held, [2] * 10, class_names=NAMES)
    return root


@pytest.mark.parametrize("near_duplicates", [None, 4])
def test_a_hub_source_comes_back_with_its_bytes(
    near_duplicates: int | None, tmp_path: Path
) -> None:
    config = hub(hub_with_faults(tmp_path / "hub"), near_duplicates=near_duplicates)
    written = prepare(config, tmp_path / "out")
    quarantined = dict(pair for file in written.values() for pair in file.quarantine)
    assert quarantined == dict(examined(config)[1].quarantine)
    assert set(quarantined) == {"train-0.parquet#7", "train-0.parquet#20", "train-1.parquet#9"}
    before, after = check_same(config, tmp_path / "out")
    assert len(after.shards) > 3
    assert {shard.test for shard in after.shards} == {True, False}
    stored = dict(zip(every_id(before), every_raw(before), strict=True))
    kept = dict(zip(stored_paths(tmp_path / "out", after), every_raw(after), strict=True))
    assert kept == {name: raw for name, raw in stored.items() if name not in quarantined}


def test_a_folder_comes_back_with_its_bytes(tmp_path: Path) -> None:
    files = {}
    for i, pixels in enumerate(noise(40, 10, 7, 3)):
        name = f"{'val' if i % 4 == 0 else 'train'}/{'dog' if i % 3 else 'cat'}/{i}.png"
        files[name] = encoded(pixels, "BMP" if i % 5 == 0 else "PNG")
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(files[name])
    config = Data(source="folder", path=str(tmp_path / "in"), image_size=8)
    prepare(config, tmp_path / "out")
    _, after = check_same(config, tmp_path / "out")
    assert after.class_names == ["cat", "dog"]
    paths = stored_paths(tmp_path / "out", after)
    assert dict(zip(paths, every_raw(after), strict=True)) == files
    tests = [shard.test for shard in after.shards for _ in range(shard.rows)]
    assert dict(zip(paths, tests, strict=True)) == {n: n.startswith("val") for n in files}


def test_a_prepared_source_can_be_prepared_and_limited(tmp_path: Path) -> None:
    config = hub(hub_with_faults(tmp_path / "hub"))
    prepare(config, tmp_path / "once")
    prepare(hub(tmp_path / "once"), tmp_path / "twice")
    check_same(hub(tmp_path / "once"), tmp_path / "twice")
    _, whole = examined(hub(tmp_path / "once"))
    source, part = examined(hub(tmp_path / "once", limit=6))
    assert count(source) == 12
    assert set(part.manifest.content.tolist()) < set(whole.manifest.content.tolist())


# --- what is stored beside ------------------------------------------------------------------------


@pytest.mark.parametrize("near_duplicates", [None, 4])
def test_prepared_images_are_indexed_without_decoding(
    near_duplicates: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out")
    config = hub(tmp_path / "out", near_duplicates=near_duplicates)
    images, whole = load_memory(open_source(config), config, readers=2)  # decodes all of them
    assert len(images) == len(whole.manifest.role) == 51

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(module, "decode", refuse)
    source = open_source(config)
    same(whole, index_here(source, config, readers=2))
    folder = index_folder(tmp_path, source, config)
    for chunk in folder.missing():
        folder.write(chunk, source, config)
    same(whole, folder.read(source, config))
    original = hub(tmp_path / "hub")
    with pytest.raises(AssertionError, match="decoded"):
        index_here(open_source(original), original, readers=1)


def test_a_stored_size_is_held_against_the_limit(tmp_path: Path) -> None:
    write_hub(tmp_path / "hub" / "t.parquet", [noise(10, 100, 3), noise(10, 101, 3)])
    prepare(hub(tmp_path / "hub"), tmp_path / "out")
    config = hub(tmp_path / "out", max_megapixels=1e-3)
    _, decoded = loaded(tmp_path / "out", max_megapixels=1e-3)
    _, told = examined(config)
    (lost,) = {name for index in (decoded, told) for name in reasons(index)}
    assert lost.endswith("#1") and "101×10" in reasons(told)[lost]
    assert told.manifest.fingerprint == decoded.manifest.fingerprint


def test_the_hubs_own_library_finds_its_metadata(tmp_path: Path) -> None:
    prepare(hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out")
    for path in (tmp_path / "out").glob("*.parquet"):
        schema = pq.read_schema(path)
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert list(features) == schema.names
        assert features["image"] == {"_type": "Image"}
        assert features["label"] == {"names": NAMES, "_type": "ClassLabel"}
        for name in schema.names[2:]:
            value = {"dtype": str(schema.field(name).type), "_type": "Value"}
            assert features[name] == value
    write_hub(tmp_path / "unnamed" / "t.parquet", noise(3, 8, 8, 3), [0, 1, 2])
    prepare(hub(tmp_path / "unnamed"), tmp_path / "other")
    (path,) = (tmp_path / "other").glob("*.parquet")
    assert b"huggingface" not in (pq.read_schema(path).metadata or {})


def test_row_groups_are_small(tmp_path: Path) -> None:
    dots = [encoded(p, "PNG") for p in noise(50, 2, 2, 3)]
    write_hub(tmp_path / "hub" / "train.parquet", [dots[i % 50] for i in range(2500)])
    large = [encoded(p, "BMP") for p in noise(9, 900, 900, 3)]  # 2.3 MiB each
    write_hub(tmp_path / "hub" / "test.parquet", large)
    prepare(hub(tmp_path / "hub"), tmp_path / "out", file_mib=256)
    source = opened(tmp_path / "out")
    assert count(source) == 2509
    assert all(shard.rows <= 1000 and shard.size <= 10 * 2**20 for shard in source.shards)
    assert len(source.shards) <= 3 + 5


# --- which files ----------------------------------------------------------------------------------


def test_files_are_as_large_as_asked_and_hold_every_shard_once(tmp_path: Path) -> None:
    for name, rows in (("train-0", 70), ("test-0", 20), ("train-1", 50)):
        cells = [encoded(p, "BMP") for p in noise(rows, 40, 40, 3)]  # 4.8 kB each
        write_hub(tmp_path / f"{name}.parquet", cells, group_rows=5)
    source = opened(tmp_path)
    for file_mib, files in ((0.05, 12 + 2), (0.2, 3 + 1), (1000, 1 + 1), (1e-6, 28)):
        outputs = plan_outputs(source, file_mib)
        assert plan_outputs(opened(tmp_path), file_mib) == outputs
        assert len(outputs) == files
        assert sorted(s for o in outputs for s in o.shards) == list(range(len(source.shards)))
        for split, test in (("train", False), ("test", True)):
            own = [o for o in outputs if {source.shards[s].test for s in o.shards} == {test}]
            names = [f"{split}-{i:05d}-of-{len(own):05d}.parquet" for i in range(len(own))]
            assert [o.name for o in own] == names
            sizes = [sum(source.shards[s].size for s in o.shards) / 2**20 for o in own]
            assert all(size <= max(file_mib, 0.03) for size in sizes)
            assert [s for o in own for s in o.shards] == sorted(s for o in own for s in o.shards)


def test_a_second_call_writes_nothing_and_a_removed_file_alone(tmp_path: Path) -> None:
    config, out = hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out"
    first = prepare(config, out)
    assert len(first) >= 3
    before = {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("*.parquet")
    }
    assert prepare(config, out) == {}
    for name in first:
        (out / name).unlink()
        assert prepare(config, out) == {name: first[name]}
        assert (out / name).read_bytes() == before[name][1]
        others = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet") if p.name != name}
        assert others == {n: stamp for n, (stamp, _) in before.items() if n != name}
        before[name] = ((out / name).stat().st_mtime_ns, before[name][1])


def test_quarantine_is_remembered(tmp_path: Path) -> None:
    config, out = hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out"
    first = prepare(config, out)
    assert sum(len(file.quarantine) for file in first.values()) == 3
    source = open_source(config)
    outputs = plan_outputs(source, 0.02)
    plan = plan_fingerprint(source, config, outputs)
    assert already_written(locate(str(out), "DEST"), outputs, plan) == first


@pytest.mark.parametrize("what", ["read", "labels"])
def test_nothing_is_there_before_it_is_whole(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub(write_hub(tmp_path / "hub" / "t.parquet", noise(12, 8, 8, 3), group_rows=4))
    source, location = open_source(config), locate(str(tmp_path / "out"), "DEST")
    (output,) = plan_outputs(source, 1)

    def silent(shard: int, *rows: Any) -> Any:
        if shard == 2:
            raise OSError("storage is silent")
        return getattr(opened(tmp_path / "hub"), what)(shard, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(source, what, silent)
        with pytest.raises(OSError, match="silent"):
            write_output(source, config, output, location, "plan")
    assert list((tmp_path / "out").glob("*.parquet")) == []
    assert already_written(location, [output], "plan") == {}
    written = write_output(source, config, output, location, "plan")
    assert written == Written(12, [])
    assert already_written(location, [output], "plan") == {output.name: written}


def test_a_damaged_row_group_is_left_out_as_it_is_in_a_run(tmp_path: Path) -> None:
    path = write_hub(tmp_path / "hub" / "t.parquet", noise(12, 8, 8, 3), group_rows=4)
    damage(path, 2, "image")
    (written,) = prepare(hub(path), tmp_path / "out").values()
    assert [name for name, _ in written.quarantine] == [f"t.parquet#{i}" for i in range(8, 12)]
    check_same(hub(path), tmp_path / "out")


def test_a_file_of_bad_images_alone_is_empty(tmp_path: Path) -> None:
    write_hub(tmp_path / "hub" / "train.parquet", noise(3, 8, 8, 3))
    write_hub(tmp_path / "hub" / "test.parquet", [b"text", b""])
    config = hub(tmp_path / "hub")
    written = prepare(config, tmp_path / "out")
    assert {name[:4]: (w.rows, len(w.quarantine)) for name, w in written.items()} == {
        "trai": (3, 0),
        "test": (0, 2),
    }
    check_same(config, tmp_path / "out")
    assert prepare(config, tmp_path / "out") == {}


# --- what is not all there ------------------------------------------------------------------------


def plant_set(root: Path, name: str, numbers: Sequence[int], amount: int) -> None:
    """Files of a set, of two images each; `name` has a place for the number and the amount."""
    for number in numbers:
        path = root / name.format(f"{number:05d}-of-{amount:05d}")
        write_hub(path, noise(2, 8, 8, 3, seed=number))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train-{}.parquet", "train-…-of-00005.parquet"),
        ("data/train-{}.parquet", "data/train-…-of-00005.parquet"),
        ("train-{}-b42a775f407cee45.parquet", "train-…-of-00005.parquet"),
        ("my-own-{}.parquet", "my-own-…-of-00005.parquet"),
    ],
)
def test_a_set_of_which_files_are_missing_is_refused(name: str, said: str, tmp_path: Path) -> None:
    plant_set(tmp_path, name, [0, 1, 3], 5)
    plant_set(tmp_path, "test-{}.parquet", [0, 1], 2)
    write_hub(tmp_path / "more.parquet", noise(2, 8, 8, 3, seed=9))
    text = refusal(tmp_path)
    assert f"3 of the 5 files {said} are there" in text
    assert "of the 2 files" not in text
    assert "finish `amint prepare`, or the download" in text and "data.limit" in text
    limited = opened(tmp_path, limit=3)
    assert [f"3 of the 5 files {said} are there" in note for note in limited.notes] == [True]
    assert count(limited) == 6
    for path in tmp_path.glob(name.format("*")):
        single = opened(path)
        assert count(single) == 2 and single.notes == []
    plant_set(tmp_path, name, [2, 4], 5)
    assert count(opened(tmp_path)) == 16 and opened(tmp_path).notes == []


def test_each_set_counts_for_itself(tmp_path: Path) -> None:
    plant_set(tmp_path, "train-{}.parquet", [0], 2)
    plant_set(tmp_path, "test-{}.parquet", [1], 3)
    text = refusal(tmp_path)
    assert "1 of the 2 files train-" in text and "1 of the 3 files test-" in text
    external = {"source": "parquet", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"^data\.external: .*1 of the 2 .*data\.external\.limit"):
        open_source(Data.model_validate({"external": external}))


def test_sets_that_are_whole_are_no_matter(tmp_path: Path) -> None:
    plant_set(tmp_path / "first", "train-{}.parquet", [1, 2, 3], 3)  # counted from 1
    plant_set(tmp_path / "other", "train-{}.parquet", [0, 1], 2)
    write_hub(tmp_path / "a-1-of-2.parquet", noise(2, 8, 8, 3))  # nobody's way to name a set
    assert count(opened(tmp_path)) == 12
    cut_short(tmp_path / "other" / "train-00001-of-00002.parquet")  # is there, if of no use
    source = opened(tmp_path)
    assert [file.name for file in source.unreadable] == ["other/train-00001-of-00002.parquet"]


def test_prepared_files_are_refused_until_all_are_there(tmp_path: Path) -> None:
    out = tmp_path / "all" / "out"
    first = min(prepare(hub(hub_with_faults(tmp_path / "hub")), out))
    opened(out)
    (out / "prepared.json").unlink()
    for keys in ({}, {"limit": 5}):
        text = refusal(out, **keys)
        assert first in text and "prepared.json" in text and "`amint prepare`" in text
    assert f"out/{first}" in refusal(out.parent)
    (out.parent / "prepared.json").write_text("{}")  # of another folder
    refusal(out.parent)
    assert count(opened(out / first)) > 0
    (out / "prepared.json").write_text("{}")
    assert count(opened(out.parent)) == count(opened(out))


def test_an_unfinished_prefix_on_s3_is_refused(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    object_store.make_bucket("unfinished")
    address = "s3://unfinished/a/b"
    config = hub(hub_with_faults(tmp_path / "hub"))
    source, location = open_source(config), locate(address, "DEST")
    outputs = plan_outputs(source, 0.02)
    there = Data(source="parquet", path=address)
    with sole_writer(location):
        for output in outputs[:-1]:
            write_output(source, config, output, location, "plan")
        with pytest.raises(UserError, match="`amint prepare`"):
            open_source(there)
        write_output(source, config, outputs[-1], location, "plan")
        with pytest.raises(UserError, match=r"prepared\.json") as caught:
            open_source(there)
        assert len(str(caught.value).splitlines()) == 1
        remove_drafts(location, outputs)
        mark_finished(location, {"files": len(outputs)})
    assert count(open_source(there)) == 51
    assert len(list_files(location)) == len(outputs) + 1
    mark_unfinished(location)
    mark_unfinished(location)
    assert not exists(location, "prepared.json")
    with pytest.raises(UserError, match=r"prepared\.json"):
        open_source(there)
    one = Data(source="parquet", path=f"{address}/{outputs[0].name}")
    assert count(open_source(one)) > 0


# --- who writes, and what killed writers leave ----------------------------------------------------


def test_drafts_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    location = locate(str(tmp_path), "DEST")
    outputs = [Output(f"train-{i:05d}-of-00002.parquet", (i,)) for i in range(2)]
    for name in (outputs[0].name, outputs[1].name, "prepared.json"):
        with suppress(FileNotFoundError), write_atomically(location, name):
            assert len(list(tmp_path.iterdir())) == 1
            remove_drafts(location, outputs)
            assert list(tmp_path.iterdir()) == []
    others = [
        f".train-00002-of-00002.parquet.{'0' * 32}.tmp",  # of another plan
        f".{outputs[0].name}.tmp",
        f".{outputs[0].name}.notes.tmp",
        f"{outputs[0].name}.{'0' * 32}.tmp",
        outputs[0].name,
    ]
    for name in others:
        (tmp_path / name).touch()
    remove_drafts(location, outputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_two_calls_do_not_write_to_one_folder(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "new" / "out"), "DEST")
    with sole_writer(location):
        assert list_files(location) == []
        with pytest.raises(UserError) as caught, sole_writer(location):
            pass
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        assert text.startswith(f"prepare: another call is writing to {tmp_path}/new/out; wait")
    with sole_writer(location):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"cannot be locked: .*; choose another destination$"),
        sole_writer(locate(str(tmp_path / "file" / "out"), "DEST")),
    ):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError("When reading information: AWS Error NETWORK_CONNECTION: Timeout was reached"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
@pytest.mark.parametrize("verb", ["open_input", "list_files"])
def test_files_that_cannot_be_read_now_are_not_called_foreign(
    verb: str, error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out"
    first = min(prepare(config, out))

    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(preparing, verb, fail)
        with pytest.raises(RunError, match="cannot be read now: ") as caught:
            prepare(config, out)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.startswith("prepare: ")
    assert "remove" not in text and text.endswith("; the same command goes on")
    assert (first in text) == (verb == "open_input")
    assert prepare(config, out) == {}


# --- refusals -------------------------------------------------------------------------------------


def refused(config: Data, folder: Path, **keys: Any) -> str:
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError) as caught:
        prepare(config, folder, **keys)
    text = str(caught.value)
    assert text.startswith(f"prepare: {folder} holds ")
    assert len(text.splitlines()) == 1 and "choose another destination" in text
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    return text


def test_other_parquet_files_in_the_folder_are_refused(tmp_path: Path) -> None:
    config, out = hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out"
    first = prepare(config, out)
    write_hub(out / "mine.parquet", noise(1, 8, 8, 3))
    assert "mine.parquet" in refused(config, out)
    (out / "mine.parquet").write_text("no Parquet at all")
    assert "mine.parquet" in refused(config, out)
    name = min(first)
    whole = (out / name).read_bytes()
    (out / "mine.parquet").write_bytes(whole)  # would be counted twice
    assert "mine.parquet" in refused(config, out)
    (out / "mine.parquet").unlink()
    for instead in (b"", whole[:-50]):
        (out / name).write_bytes(instead)
        assert name in refused(config, out)
    (out / name).unlink()
    write_hub(out / name, noise(1, 8, 8, 3))  # somebody else's under the same name
    assert name in refused(config, out)


def test_the_same_names_for_other_shares_of_the_source_are_refused(tmp_path: Path) -> None:
    config = hub(tmp_path / "hub")
    for i, rows in enumerate((16, 4, 2)):  # the second goes with the first, or with the third
        write_hub(tmp_path / "hub" / f"train-{i}.parquet", noise(rows, 20, 20, 3, seed=i))
    source = open_source(config)
    sizes = [shard.size / 2**20 for shard in source.shards]
    limits = (sizes[0] + sizes[1], sizes[0])
    first, second = (plan_outputs(source, limit + 1e-6) for limit in limits)
    assert [o.name for o in first] == [o.name for o in second] and first != second
    prepare(config, tmp_path / "out", file_mib=limits[0] + 1e-6)
    refused(config, tmp_path / "out", file_mib=limits[1] + 1e-6)


@pytest.mark.parametrize("settings", ["file_mib", "max_megapixels", "limit", "files"])
def test_other_settings_or_files_are_refused(settings: str, tmp_path: Path) -> None:
    config, out = hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out"
    prepare(config, out)
    changed: Sequence[tuple[Data, dict[str, Any]]] = {
        "file_mib": [(config, {"file_mib": mib}) for mib in (0.01, 100)],
        "max_megapixels": [(hub(tmp_path / "hub", max_megapixels=1), {})],
        "limit": [(hub(tmp_path / "hub", limit=limit), {}) for limit in (5, 21)],
        "files": [(config, {})],
    }[settings]
    if settings == "files":
        cells = pq.read_table(tmp_path / "hub" / "test.parquet")["image"].to_pylist()
        pictures = [cell["bytes"] for cell in cells]
        write_hub(tmp_path / "hub" / "test.parquet", pictures, [1] * 10, class_names=NAMES)
    for other, keys in changed:
        refused(other, out, **keys)


def test_roles_and_views_may_be_set_otherwise(tmp_path: Path) -> None:
    config, out = hub(hub_with_faults(tmp_path / "hub")), tmp_path / "out"
    prepare(config, out)
    other = hub(tmp_path / "hub", image_size=32, split_seed=4, near_duplicates=2, channels=1)
    assert prepare(other, out) == {}
