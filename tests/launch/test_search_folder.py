"""Which search a command goes on with."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch.searches import SPACE, searched
from launch.silent import Silent

from amint_ray.config.search import search_fingerprint
from amint_ray.contracts import UserError
from amint_ray.launch import runs
from amint_ray.launch.search_folder import SearchFolder, done_search, open_search, spent
from amint_ray.storage import Location, locate


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(runs, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(runs, "_DEAD_AFTER", 0.4)
    (tmp_path / "kept").mkdir()
    return locate(str(tmp_path / "kept"), "test")


def begun(tmp_path: Path, storage: Location, *overrides: str, new: bool = False) -> SearchFolder:
    """A search that came as far as its first trials."""
    folder = open_search(searched(tmp_path, *overrides), storage, Silent(), new=new)
    folder.note(manifest="f" * 64)
    return folder


def test_a_new_search_is_kept_once_all_was_found_right(tmp_path: Path, storage: Location) -> None:
    search = searched(tmp_path)
    folder = open_search(search, storage, Silent(), new=False)
    assert not list(Path(storage.path).iterdir())
    assert folder.record.name.startswith("mine-")
    assert folder.record.fingerprint == search_fingerprint(search)
    assert (folder.record.attempts, folder.record.ended) == (1, False)
    folder.note(run_id="abc")
    assert [path.name for path in Path(storage.path).rglob("*.json")] == ["search.json"]
    assert (Path(storage.path) / "searches/mine/search.json").exists()


def test_the_same_search_goes_on(tmp_path: Path, storage: Location) -> None:
    first = begun(tmp_path, storage)
    first.note(seconds=9.0, run_id="abc")
    for attempts in (2, 3):
        # How much is spent, and where, may change.
        again = begun(tmp_path, storage, "budget.trials=99", "cluster.workers=2")
        assert again.record.attempts == attempts
    assert (again.record.name, again.record.run_id) == (first.record.name, "abc")
    assert again.record.seconds == 9.0


def test_a_search_that_is_done_goes_on_if_more_may_be_spent(
    tmp_path: Path, storage: Location
) -> None:
    search = searched(tmp_path)
    begun(tmp_path, storage).note(ended=True, spent=spent(search), document={"best": {"id": 3}})
    done = open_search(search, storage, Silent(), new=False).record
    assert (done.ended, done.attempts, done.document) == (True, 1, {"best": {"id": 3}})
    found = done_search(search, storage)
    assert found is not None and found.record == done
    for more in ("seeds=2", "name=other"):
        assert done_search(searched(tmp_path, more), storage) is None
    for more in ("budget.trials=99", "final.seeds=5"):
        assert done_search(searched(tmp_path, more), storage) is None
        on = open_search(searched(tmp_path, more), storage, Silent(), new=False).record
        assert (on.name, on.ended, on.attempts) == (done.name, False, 2)


@pytest.mark.parametrize(
    ("overrides", "changes", "differs"),
    [
        (["train.epochs=3"], {}, "(other recipe or settings)"),
        ([], {"settings": {"train.epochs": 3}}, "(other recipe or settings)"),
        (["recipe=mnist_vit"], {}, "(other recipe or settings)"),
        (["seeds=2"], {}, "(other seeds)"),
        (
            ["algorithm.seed=1"],
            {"space": {**SPACE, "mint.head": "conv"}},
            "(other space, algorithm)",
        ),
        (["constraint={metric: task.accuracy, at_least: 0.5}"], {}, "(other constraint)"),
    ],
)
def test_another_search_is_told_what_differs(
    tmp_path: Path,
    storage: Location,
    overrides: list[str],
    changes: dict[str, object],
    differs: str,
) -> None:
    begun(tmp_path, storage)
    other = searched(tmp_path, *overrides, **changes)
    with pytest.raises(UserError) as told:
        open_search(other, storage, Silent(), new=False)
    text = str(told.value)
    assert f"searches/mine belongs to another search {differs}" in text
    assert "name=OTHER" in text and "--new" in text


def test_a_new_one_beside_it(tmp_path: Path, storage: Location) -> None:
    first = begun(tmp_path, storage)
    beside = begun(tmp_path, storage, "seeds=2", new=True)
    assert beside.place.uri.startswith(f"{first.place.uri}-2")
    assert beside.record.name != first.record.name
    assert beside.record.attempts == 1
    third = open_search(searched(tmp_path), storage, Silent(), new=True)
    assert third.place.uri != beside.place.uri  # within one second, too
    named = begun(tmp_path, storage, "seeds=3", "name=other")
    assert named.place.uri.endswith("searches/other")
    assert begun(tmp_path, storage).record.name == first.record.name


def test_a_new_one_can_be_gone_on_with_by_its_name(tmp_path: Path, storage: Location) -> None:
    for overrides in ([], [f"name={'n' * 80}"]):
        watcher = Silent()
        new = open_search(searched(tmp_path, *overrides), storage, watcher, new=True)
        new.note(run_id="abc")
        (notice,) = watcher.notices
        (name,) = (word.rstrip(",") for word in notice.split() if word.startswith("name="))
        again = open_search(searched(tmp_path, name), storage, Silent(), new=False)
        assert (again.place.uri, again.record.run_id) == (new.place.uri, "abc")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"name": ', ""),
        ("null", ""),
        ('{"name": "a"}', "fingerprint: "),
        ("", ""),
        ("[1]", ""),
        ('{"of_another_version": 1}', "of_another_version"),
        ('{"name": 3}', "name: "),
        ('{"identity": [1]}', "identity: "),
        ('{"attempts": "twice"}', "attempts: "),
        ('{"ended": "yes"}', "ended: "),
        ('{"document": 5}', "document: "),
    ],
)
def test_a_record_that_is_damaged(tmp_path: Path, storage: Location, text: str, says: str) -> None:
    folder = begun(tmp_path, storage)
    if says and says != "fingerprint: ":  # all else is as it was
        text = json.dumps(asdict(folder.record) | json.loads(text))
    (Path(storage.path) / "searches/mine/search.json").write_text(text)
    with pytest.raises(UserError) as told:
        open_search(searched(tmp_path), storage, Silent(), new=False)
    found = str(told.value)
    assert "mine/search.json is damaged (" in found and "remove the folder, or" in found
    assert says in found and "\n" not in found


def test_a_record_is_read_as_it_was_written(tmp_path: Path, storage: Location) -> None:
    figures = {"best": {"auc": float("nan"), "epoch": 3}, "final": None}
    begun(tmp_path, storage).note(seconds=9, document=figures)
    found = open_search(searched(tmp_path), storage, Silent(), new=False).record
    assert repr(found.document) == repr(figures)


def test_a_search_whose_driver_lives_is_not_taken_over(tmp_path: Path, storage: Location) -> None:
    first = begun(tmp_path, storage)
    with first.alive() as sign:
        assert Path(sign.path).exists()
        with pytest.raises(UserError, match=r"another process is at work on .*searches/mine"):
            open_search(searched(tmp_path), storage, Silent(), new=False)
        beside = open_search(searched(tmp_path), storage, Silent(), new=True)
        assert beside.record.name != first.record.name
    watcher = Silent()
    assert open_search(searched(tmp_path), storage, watcher, new=False).record.attempts == 2
    assert watcher.phases == [
        f"looking whether the search in {storage.path}/searches/mine is still running"
    ]
    last = open_search(searched(tmp_path), storage, Silent(), new=False)
    with last.alive():  # what is done is only looked at
        last.note(ended=True, spent=spent(searched(tmp_path)))
        assert open_search(searched(tmp_path), storage, Silent(), new=False).record.ended


def test_before_anything_is_noted_a_driver_is_seen_to_live(
    tmp_path: Path, storage: Location
) -> None:
    first = open_search(searched(tmp_path), storage, Silent(), new=False)
    with (
        first.alive(),
        pytest.raises(UserError, match=r"another process is at work on .*searches/mine"),
    ):
        open_search(searched(tmp_path), storage, Silent(), new=False)


def test_a_search_in_which_something_is_found_wrong_leaves_no_trace(
    tmp_path: Path, storage: Location
) -> None:
    first = open_search(searched(tmp_path), storage, Silent(), new=False)
    with pytest.raises(UserError, match="no such folder"), first.alive():
        assert list(Path(storage.path).iterdir())
        raise UserError("data.path: no such folder")
    assert not list(Path(storage.path).iterdir())
    begun(tmp_path, storage)
    again = open_search(searched(tmp_path), storage, Silent(), new=False)
    with pytest.raises(UserError, match="no such folder"), again.alive():
        raise UserError("data.path: no such folder")
    assert [file.name for file in Path(storage.path).rglob("*.*")] == ["search.json"]


def test_what_nobody_goes_on_with_is_deleted(tmp_path: Path, storage: Location) -> None:
    folder, place = begun(tmp_path, storage), Path(storage.path) / "searches/mine"
    name = folder.record.name
    trainings = ["t0001-0a", "t0001-1b", "t0002-0a", "t0010-0a", "plain-0-2c"]
    for path in [*(f"runs/{name}-{each}" for each in trainings), "tune-1", "tune-2", "trials"]:
        (place / path).mkdir(parents=True)
        (place / path / "file").touch()
    (place / "runs" / f"{name}-t0001-0a" / "file").unlink()
    folder.clean(["t0001", "plain-0", "t0099"])
    left = sorted(path.name for path in (place / "runs").iterdir())
    assert left == [f"{name}-t0002-0a", f"{name}-t0010-0a"]
    assert sorted(path.name for path in place.iterdir()) == ["runs", "search.json", "trials"]


def test_what_cannot_be_deleted_stays_and_the_rest_goes(tmp_path: Path, storage: Location) -> None:
    folder, place = begun(tmp_path, storage), Path(storage.path) / "searches/mine"
    for number in range(1, 4):
        (place / f"tune-{number}").mkdir()
    real = folder.place.filesystem

    def delete_dir(path: str) -> None:
        if path.endswith("tune-1"):
            raise OSError("busy")
        real.delete_dir(path)

    busy = SimpleNamespace(get_file_info=real.get_file_info, delete_dir=delete_dir)
    folder.place = replace(folder.place, filesystem=busy)
    folder.clean([])
    assert sorted(path.name for path in place.iterdir()) == ["search.json", "tune-1"]


def test_the_winners_trainings_are_kept(tmp_path: Path, storage: Location) -> None:
    folder = begun(tmp_path, storage)
    assert folder.final("winner-1") is None
    folder.note_final("winner-1", {"run_id": "abc"})
    assert begun(tmp_path, storage).final("winner-1") == {"run_id": "abc"}
    (Path(storage.path) / "searches/mine/final/winner-1.json").write_text('{"run')
    assert folder.final("winner-1") is None
    (Path(storage.path) / "searches/mine/final/winner-1.json").write_text("[1]")
    assert folder.final("winner-1") is None
