"""What one MLflow run is told, as the records that wait for it (`tracking/spool.py`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from amint_ray.launch.beside import StorageSender
from amint_ray.tracking.run_log import EPOCH_METRIC, STEP_METRIC, OpenedRun
from amint_ray.tracking.sending import Delivery, MLflowSender
from amint_ray.tracking.spool import Spool, metrics_told, newest_time, steps_told
from amint_ray.train.step import SUMS

_SECONDS_TO_STOP = 5.0
"""That a call which is under way is waited for."""


class RunRecords:
    """An MLflow run that takes records; only one thread calls this.

    Attributes:
        run_id: MLflow's; empty where nothing is recorded there.
        spool: what it is told.
        delivery: brings that to MLflow.
        versions: of the models that were registered: the number by name.
    """

    def __init__(
        self,
        run: OpenedRun,
        spool: Spool,
        sender: MLflowSender | StorageSender,
        *,
        steps_per_point: int,
    ) -> None:
        self.run_id, self.spool, self.versions = run.run_id, spool, sender.versions
        left = spool.waiting()
        self._epochs = {*run.epochs, *steps_told(left, EPOCH_METRIC)}
        self._step = max({run.last_step, *steps_told(left, STEP_METRIC)})
        self._figures = {**run.metrics, **metrics_told(left)}
        self._started = run.started
        self._newest = max(run.started, newest_time(left))
        self._steps_per_point = steps_per_point
        self._point: list[Sequence[float]] = []
        self.delivery = Delivery(spool, sender, to="MLflow" if run.run_id else "storage.path")

    def tell(self, kind: str, **fields: Any) -> None:
        """Add a record."""
        self.spool.append({"kind": kind, **fields})

    def now(self) -> int:
        """Milliseconds; never less than before, whatever becomes of the machine's clock."""
        self._newest = max(self._newest, int(time.time() * 1000))
        return self._newest

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Metrics at a step."""
        if self.run_id:  # else nobody is to be told
            self.tell("metrics", time=self.now(), step=step, values=dict(values))

    def epoch(self, entry: Mapping[str, float]) -> None:
        """At step = epoch; once, also of one that was trained twice because the first was lost."""
        number = int(entry["epoch"])
        if number not in self._epochs:
            self._epochs.add(number)
            self.metrics(
                {key: value for key, value in entry.items() if key not in ("epoch", "phase")},
                step=number,
            )

    def steps(self, first: int, sums: Sequence[Sequence[float]]) -> None:
        """Means over `steps_per_point` steps, at the last of them; each step once."""
        if first > self._step + 1:
            self.delivery.say(f"the losses of steps {self._step + 1} to {first - 1} are not known")
            self.point()
        for step, of in enumerate(sums, start=first):
            if step <= self._step:
                continue
            self._step = step
            self._point.append(of)
            if step % self._steps_per_point == 0:
                self.point()

    def point(self) -> None:
        """The mean over the steps since the last one."""
        if not self._point:
            return
        total = dict(zip(SUMS, map(sum, zip(*self._point, strict=True)), strict=True))
        values = {STEP_METRIC: total["task_loss"] / total["task_rows"]}
        if total["told_rows"]:
            values["step/mint_loss"] = total["mint_loss"] / total["told_rows"]
        self._point = []
        self.metrics(values, step=self._step)

    def figures(self, figures: Mapping[str, float], *, step: int) -> None:
        """Those that it was not told of before it was interrupted, or told otherwise."""
        new = {key: value for key, value in figures.items() if self._figures.get(key) != value}
        if new:
            self.metrics(new, step=step)

    def machine(self, node: int, values: Mapping[str, float]) -> None:
        """At the seconds since the run began; the first machine's as MLflow names its own."""
        prefix = "system/" if node == 0 else f"system/node_{node}/"
        step = (self.now() - self._started) // 1000
        self.metrics({f"{prefix}{name}": value for name, value in values.items()}, step=step)

    def close(self) -> bool:
        """End the delivery, and tell whether everything had arrived."""
        stopped = self.delivery.stop(_SECONDS_TO_STOP)
        done = not self.spool.waiting()
        if stopped:  # else a call is under way that counts its record as sent when it returns
            self.spool.close()
        return done
