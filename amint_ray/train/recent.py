"""The sums of recent steps, passed on together: a message a step would cost more than a step."""

from __future__ import annotations

import time

from amint_ray.contracts import RunContext
from amint_ray.train.finite import Step
from amint_ray.train.step import SUMS

_SECONDS_TOGETHER = 5.0


class RecentSteps:
    """Collects steps and tells the context of them: `steps`, from `first`, their `sums`."""

    def __init__(self, context: RunContext, *, wanted: bool) -> None:
        self._context, self._wanted = context, wanted
        self._first = 0
        self._sums: list[list[float]] = []
        self._told = time.monotonic()

    def add(self, step: Step) -> None:
        """Take a step that is done."""
        if not self._wanted:
            return
        of = step.sums()
        self._first = self._first or step.number
        self._sums.append([of[name] for name in SUMS])
        if time.monotonic() - self._told > _SECONDS_TOGETHER:
            self.tell()

    def tell(self) -> None:
        """Pass on what was collected."""
        if self._sums:
            self._context.progress({"phase": "steps", "first": self._first, "sums": self._sums})
        self._first, self._sums, self._told = 0, [], time.monotonic()
