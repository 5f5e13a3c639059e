"""When a run without workers speaks; tests/launch/test_faults.py has one on a real cluster."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    TrainControllerState,
)
from ray.train.v2.api.exceptions import WorkerGroupError

from amint_ray.config.schema import Cluster
from amint_ray.launch import waiting
from amint_ray.launch.room import Machine
from amint_ray.launch.waiting import Waiting

DIED = WorkerGroupError("a worker died", {})


class World:
    """A clock, a cluster and a driver."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.machines = [Machine(1, 0)]
        self.told: list[float] = []
        self.callback = Waiting("digits-1", Cluster(workers=(2, 3)), 2)

    def turn(self, state: TrainControllerState, seconds: float, *, each: float = 1.0) -> None:
        """The controller's loop, which turns for some seconds in one state."""
        end = self.now + seconds
        while self.now < end:
            self.callback.after_controller_state_update(state, state)
            self.now += each


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    class Sender:
        def __init__(self, run: str) -> None:
            assert run == "digits-1"

        def send(self, event: dict[str, Any]) -> None:
            assert event["phase"] == "notice"
            assert "no workers are running; cluster.workers = 2: the cluster has" in event["text"]
            made.told.append(made.now - 1000)

    monkeypatch.setattr(waiting, "Sender", Sender)
    monkeypatch.setattr(waiting, "machines_of_cluster", lambda: made.machines)
    monkeypatch.setattr(waiting, "free_machines", lambda: made.machines)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: made.now)
    return made


def test_a_range_of_workers_is_waited_for_aloud(world: World) -> None:
    world.turn(InitializingState(), 10)
    world.turn(RunningState(), 100)
    world.turn(RestartingState(DIED), 200)
    assert world.told == [140, 195, 250, 305]
    world.turn(RunningState(), 10)
    world.turn(RestartingState(DIED), 25)
    assert len(world.told) == 4


def test_a_fixed_number_that_found_no_room_is_told_at_once_and_each_minute(world: World) -> None:
    world.turn(ReschedulingState(DIED), 180, each=60)
    assert world.told == [0, 60, 120]


def test_workers_that_only_take_their_time_are_not_spoken_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.machines = [Machine(2, 0)]
    world.turn(RestartingState(DIED), 200)
    assert world.told == []
    monkeypatch.setattr(waiting, "machines_of_cluster", lambda: 1 / 0)  # a cluster that is ill
    world.turn(RestartingState(DIED), 10)
