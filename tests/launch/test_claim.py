"""One driver at a time at work on a folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from launch.silent import Silent

from amint_ray.contracts import RunError, UserError
from amint_ray.launch import claim as claims
from amint_ray.launch import runs
from amint_ray.launch.claim import Claim
from amint_ray.storage import Location, locate

AT_WORK = r"^attack: another process is at work on .*/place; wait until it has ended, or stop it"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(runs, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(runs, "_DEAD_AFTER", 0.4)
    monkeypatch.setattr(claims, "_SECONDS_TO_SETTLE", 0.1)
    return locate(str(tmp_path), "test").below("attacks/place")


def looked(place: Location) -> Claim:
    """Of a driver that has found the folder free."""
    claim = Claim(place, "attack")
    claim.look(Silent())
    return claim


def test_a_driver_that_lives_is_seen_and_one_that_died_is_not_waited_for_long(
    place: Location,
) -> None:
    first, watcher = looked(place), Silent()
    with first.held() as sign:
        first.settle(watcher)
        assert Path(sign.path).parent == Path(place.path)
        with pytest.raises(UserError, match=AT_WORK):
            Claim(place, "attack").look(watcher)
        Claim(place, "attack").look(watcher, wait=False)
        assert first.mine()
    # It has left its sign behind, as one does that was killed.
    second = looked(place)
    with second.held():
        second.settle(watcher)
        assert second.mine() and not first.mine()


def test_a_driver_that_began_since_the_look_is_seen(place: Location) -> None:
    late, first = looked(place), looked(place)
    with first.held(), pytest.raises(UserError, match=AT_WORK), late.held():
        pass


def test_of_two_that_begin_together_the_last_to_claim_goes_on(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = looked(place), looked(place)
    with contextlib.ExitStack() as stack:
        # Neither has seen the other's sign when it leaves its own.
        with monkeypatch.context() as blind:
            blind.setattr(claims, "beats", lambda folder: {})
            stack.enter_context(one.held())
            stack.enter_context(other.held())
        other.settle(Silent())
        with pytest.raises(UserError, match=AT_WORK):
            one.settle(Silent())


def test_what_a_driver_leaves(place: Location) -> None:
    """Nothing, where nothing else is there; and never what others keep."""
    claim = looked(place)
    with claim.held():
        assert {file.name for file in Path(place.path).iterdir()} == {"driver.json", "claim"}
    claim.leave()
    assert not Path(place.path).parent.exists()
    again = looked(place)
    with again.held():
        (Path(place.path) / "part.npz").touch()
    again.leave()
    assert [file.name for file in Path(place.path).iterdir()] == ["part.npz"]
    assert not again.mine()
    again.leave()  # which is no mistake


def test_a_folder_that_was_there_before_stays(place: Location) -> None:
    parent = Path(place.path).parent
    parent.mkdir()
    claim = looked(place)
    with claim.held():
        pass
    claim.leave()
    assert list(parent.iterdir()) == []


def test_storage_that_takes_no_files(place: Location) -> None:
    claim = looked(place)
    Path(place.path).parents[1].mkdir(exist_ok=True)
    Path(place.path).parent.write_text("a file where the folder should be")
    with pytest.raises(RunError, match=f"^{place.uri}: .*irectory"), claim.held():
        pass
