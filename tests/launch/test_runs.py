"""Which run a command goes on with, and what may differ then."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launch.silent import Silent

from amint_ray.config.load import load_config, training_fingerprint
from amint_ray.config.schema import Config
from amint_ray.contracts import UserError
from amint_ray.launch import runs
from amint_ray.launch.runs import (
    RunRecord,
    alive,
    find_unfinished,
    finish,
    open_run,
    resumed_config,
)
from amint_ray.storage import Location, locate
from infra.local.object_store import ObjectStore

CONFIG = load_config("digits")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(runs, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(runs, "_DEAD_AFTER", 0.4)
    return locate(str(tmp_path), "test")


def record(storage: Location, name: str = "digits-1", config: Config = CONFIG) -> RunRecord:
    settled = config.model_copy(
        update={"data": config.data.model_copy(update={"mode": "streamed", "streams": 48})}
    )
    made = RunRecord(
        run_name=name,
        mlflow_run_id="abc",
        manifest_fingerprint="f" * 64,
        asked=config.model_dump(mode="json"),
        settled=settled.model_dump(mode="json"),
    )
    made.write(storage)
    return made


def test_only_a_run_whose_driver_died_is_found(storage: Location) -> None:
    made = record(storage)
    assert find_unfinished(CONFIG, storage, Silent()) is None
    with alive(CONFIG, storage, made.run_name):
        assert find_unfinished(CONFIG, storage, Silent()) is None
    watcher = Silent()
    assert find_unfinished(CONFIG, storage, watcher) == made
    assert watcher.phases == ["looking whether digits-1 is still running"]
    assert find_unfinished(load_config("digits", ["train.lr=0.5"]), storage, Silent()) is None
    finish(CONFIG, storage, made.run_name)
    assert find_unfinished(CONFIG, storage, Silent()) is None
    assert not (Path(storage.path) / "unfinished").exists()


def test_a_run_whose_driver_lives_cannot_be_named(storage: Location) -> None:
    made = record(storage)
    other = load_config("digits", ["evaluation.batch_size=7"])
    with alive(CONFIG, storage, made.run_name):
        for config, force in ((CONFIG, False), (other, True)):  # the sign is of what it was
            with pytest.raises(UserError, match="--resume=digits-1: another process is at work"):
                open_run(config, storage, made.run_name, Silent(), force=force)
    watcher = Silent()
    assert open_run(CONFIG, storage, made.run_name, watcher, force=False) == made
    assert watcher.phases == ["looking whether digits-1 is still running"]


def test_storage_that_keeps_silent_does_not_hold_a_driver_up(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "_BEAT_SECONDS", 0.2)
    monkeypatch.setattr(runs, "_DEAD_AFTER", 2.0)
    monkeypatch.setattr(runs, "_SECONDS_FOR_A_BEAT", 0.5)
    object_store.make_bucket("silent-storage")
    storage = locate("s3://silent-storage/runs", "test", attempts=9)
    record(storage)
    assert object_store.pid is not None
    server: int = object_store.pid

    try:
        with alive(CONFIG, storage, "digits-1"):
            os.kill(server, signal.SIGSTOP)
            time.sleep(1)  # now a beat is under way
            os.kill(server, signal.SIGCONT)
            assert find_unfinished(CONFIG, storage, Silent()) is None
            os.kill(server, signal.SIGSTOP)
            time.sleep(1)
            left = time.monotonic()
        assert time.monotonic() - left < 3
    finally:
        os.kill(server, signal.SIGCONT)


def test_a_look_that_took_long_proves_nothing(
    storage: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may not have been able to write either, and needs a moment then."""
    record(storage)
    looks = iter([(0.0, b"1"), (0.6, b"1"), (0.0, b"2")])

    def beats(folder: Location) -> dict[str, bytes]:
        seconds, beat = next(looks)
        time.sleep(seconds)
        return {"digits-1": beat}

    monkeypatch.setattr(runs, "beats", beats)
    assert find_unfinished(CONFIG, storage, Silent()) is None
    assert next(looks, None) is None


def test_a_run_that_never_became_one_is_passed_over(storage: Location) -> None:
    older = record(storage, "digits-1")
    for name in ("digits-1", "digits-2"):  # the second has no record
        with alive(CONFIG, storage, name):
            pass
    assert find_unfinished(CONFIG, storage, Silent()) == older
    assert not list(Path(storage.path).rglob("digits-2.json"))


def test_what_shapes_the_weights_cannot_change(storage: Location) -> None:
    made = record(storage)
    assert open_run(CONFIG, storage, "digits-1", Silent(), force=False) == made
    elsewhere = load_config("digits", ["cluster.workers=2", "storage.keep=5"])
    assert open_run(elsewhere, storage, "digits-1", Silent(), force=False) == made
    other = load_config("digits", ["train.lr=0.5", "evaluation.batch_size=7"])
    for force in (False, True):
        with pytest.raises(UserError, match=r"train\.lr = .*now 0\.5.*shapes the weights") as told:
            open_run(other, storage, "digits-1", Silent(), force=force)
        assert "evaluation" not in str(told.value)
    with pytest.raises(UserError, match="no such run"):
        open_run(CONFIG, storage, "digits-9", Silent(), force=False)
    (Path(storage.path) / "digits-1/run.json").write_text('{"run_name": ')
    with pytest.raises(UserError, match="damaged"):
        open_run(CONFIG, storage, "digits-1", Silent(), force=False)


def test_what_does_not_touch_them_may_change_if_that_is_wanted(storage: Location) -> None:
    made = record(storage)
    other = load_config("digits", ["evaluation.batch_size=7", "train.checkpoint_every=3"])
    with pytest.raises(UserError, match=r"evaluation\.batch_size.*--force-resume"):
        open_run(other, storage, "digits-1", Silent(), force=False)
    config = resumed_config(other, open_run(other, storage, "digits-1", Silent(), force=True))
    assert (config.evaluation.batch_size, config.train.checkpoint_every) == (7, 3)
    assert (config.data.mode, config.data.streams) == ("streamed", 48)
    assert made.settled["evaluation"]["batch_size"] != 7


def test_external_images_may_have_moved(storage: Location) -> None:
    def with_external(path: str, *more: str) -> Config:
        settings = ["data.external.source=folder", f"data.external.path={path}"]
        return load_config("digits", [*settings, *more])

    old, new = with_external("/old"), with_external("/new")
    with alive(old, storage, record(storage, config=old).run_name):
        pass
    found = find_unfinished(new, storage, Silent())
    assert found is not None
    config = resumed_config(new, found)
    assert config.data.external.path == "/new"
    assert (config.data.mode, config.data.streams) == ("streamed", 48)
    assert training_fingerprint(config) == training_fingerprint(resumed_config(old, found))
    other = with_external("/old", "data.external.limit=5")
    assert training_fingerprint(old) != training_fingerprint(other)
    assert open_run(new, storage, found.run_name, Silent(), force=True) == found
