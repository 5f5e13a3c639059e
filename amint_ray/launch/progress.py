"""News from training workers to the driver, through Ray's key-value store.

The store is there anyway; a queue actor would cost another process start. Where the run is
overwrites where it was; all other news have a key each, so none is lost while the driver looks
elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ray.experimental import internal_kv

_NAMESPACE = "amint_ray"
_SECONDS_BETWEEN_STEPS = 0.2
_KEPT = ("notice", "steps", "epoch", "machine")
"""In the order in which they are passed on."""


class Sender:
    """The worker's end."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._last_step = 0.0

    def send(self, event: Mapping[str, Any]) -> None:
        """Publish an event: every one of `_KEPT`, of the others one now and then."""
        if event["phase"] in _KEPT:
            number = event.get("epoch") or event.get("first") or time.time_ns()
            _put(f"{self._run}/{event['phase']}/{number}", event)
            return
        now = time.monotonic()
        if event["phase"] == "train" and now - self._last_step < _SECONDS_BETWEEN_STEPS:
            return
        self._last_step = now
        _put(f"{self._run}/now", event)


def give_up(run: str, reason: str) -> None:
    """Leave word why trying again is of no use."""
    internal_kv._internal_kv_put(f"{run}/given-up", reason, namespace=_NAMESPACE)


def given_up(run: str) -> str | None:
    """Why an earlier try of this run found another to be of no use, if one did."""
    reason: bytes | None = internal_kv._internal_kv_get(f"{run}/given-up", namespace=_NAMESPACE)
    return None if reason is None else reason.decode()


class Receiver:
    """The driver's end."""

    def __init__(self, run: str) -> None:
        self._run = run

    def poll(self) -> Iterator[dict[str, Any]]:
        """What came in since: all that is kept, kind by kind and in order, then where the run is.

        An epoch that was trained again, after a failure, comes again.
        """
        listed = internal_kv._internal_kv_list(f"{self._run}/", namespace=_NAMESPACE)
        found = [key.decode().split("/") for key in listed]
        for kind in _KEPT:
            numbers = sorted(int(key[-1]) for key in found if key[-2] == kind)
            for number in numbers:
                if (event := _take(f"{self._run}/{kind}/{number}")) is not None:
                    yield event
        if (event := _take(f"{self._run}/now")) is not None:
            yield event

    def close(self) -> None:
        """Leave nothing of the run behind in a cluster that lives on."""
        internal_kv._internal_kv_del(f"{self._run}/", del_by_prefix=True, namespace=_NAMESPACE)


def _put(key: str, event: Mapping[str, Any]) -> None:
    internal_kv._internal_kv_put(key, json.dumps(event), namespace=_NAMESPACE)


def _take(key: str) -> dict[str, Any] | None:
    value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    if value is None:
        return None
    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    event: dict[str, Any] = json.loads(value)
    return event
