"""Which search a command goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch.searches import SPACE, searched
from launch.silent import Silent

from amint_ray.config.search import search_fingerprint
from amint_ray.contracts import UserError
from amint_ray.launch import runs
from amint_ray.launch.search_folder import SearchFolder, open_search, spent
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
    for more in ("budget.trials=99", "final.seeds=5"):
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
    named = begun(tmp_path, storage, "seeds=3", "name=other")
    assert named.place.uri.endswith("searches/other")
    assert begun(tmp_path, storage).record.name == first.record.name


@pytest.mark.parametrize("text", ['{"name": ', "null", '{"name": "a"}', ""])
def test_a_record_that_is_damaged(tmp_path: Path, storage: Location, text: str) -> None:
    begun(tmp_path, storage)
    (Path(storage.path) / "searches/mine/search.json").write_text(text)
    with pytest.raises(UserError, match=r"mine/search\.json is damaged .*remove the folder, or"):
        open_search(searched(tmp_path), storage, Silent(), new=False)


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
    assert watcher.phases == ["looking whether driver is still running"]
    first.note(ended=True, spent=spent(searched(tmp_path)))
    with first.alive():  # what is done is only looked at
        assert open_search(searched(tmp_path), storage, Silent(), new=False).record.ended


def test_the_winners_trainings_are_kept(tmp_path: Path, storage: Location) -> None:
    folder = begun(tmp_path, storage)
    assert folder.final("winner-1") is None
    folder.note_final("winner-1", {"run_id": "abc"})
    assert begun(tmp_path, storage).final("winner-1") == {"run_id": "abc"}
    (Path(storage.path) / "searches/mine/final/winner-1.json").write_text('{"run')
    assert folder.final("winner-1") is None
