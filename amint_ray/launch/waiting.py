"""What Ray Train's controller says while no workers run; without it, it waits and keeps silent."""

from __future__ import annotations

import contextlib
import time

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    SchedulingState,
    TrainControllerState,
)

from amint_ray.config.schema import Cluster
from amint_ray.launch.progress import Sender
from amint_ray.launch.room import free_machines, lacks, machines_of_cluster

_SECONDS_BEFORE = 30.0
_SECONDS_BETWEEN = 55.0
"""Ray Train tries again every 60 s."""
_SECONDS_BETWEEN_LOOKS = 5.0
_WITHOUT_WORKERS = (
    InitializingState,
    SchedulingState,
    ReschedulingState,
    RestartingState,
    ResizingState,
)


class Waiting(ControllerCallback):  # type: ignore[misc]
    """Tells the driver what the cluster lacks, once and again every minute.

    A fixed number of workers that finds no room is tried again after a minute, and so on; of a
    range, the controller waits for the fewest. Neither is given up: a node may come back.
    """

    def __init__(self, run: str, config: Cluster, fewest: int) -> None:
        self._run = run
        self._config = config
        self._fewest = fewest
        self._since: float | None = None
        self._looked = self._told = float("-inf")

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called at each turn of the controller's loop; must not raise, or the run would end."""
        if not isinstance(current_state, _WITHOUT_WORKERS):
            self._since, self._told = None, float("-inf")
            return
        with contextlib.suppress(Exception):
            self._look(found_no_room=isinstance(current_state, ReschedulingState))

    def _look(self, *, found_no_room: bool) -> None:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if not found_no_room and now - self._since < _SECONDS_BEFORE:
            return
        if now - self._told < _SECONDS_BETWEEN or now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        missing = lacks(self._config, machines_of_cluster(), free_machines(), self._fewest)
        if missing is not None:
            self._told = now
            text = f"no workers are running; {missing}; the run goes on once there is room"
            Sender(self._run).send({"phase": "notice", "text": text})
