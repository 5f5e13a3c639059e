"""Calls in threads: waited for no longer than some seconds, or made one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Begin a call in a daemon thread, which does not keep the process from ending."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns, if it does in time.

    The call goes on in its thread where it does not. The caller can be interrupted by Ctrl-C all
    the while, which a server that keeps silent would not let through.

    Raises:
        TimeoutError: it does not.
        Exception: whatever the call raises.
    """
    return in_thread(call).result(seconds)


class InOrder:
    """A daemon thread that makes one call after the other, in the order they were given in."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have a call made when all before it are done."""
        future: Future[T] = Future()
        self._waiting.put((call, future))
        return future

    def close(self) -> None:
        """End the thread when all calls so far are done; none may be submitted after this."""
        self._waiting.put(None)

    def _work(self) -> None:
        while (given := self._waiting.get()) is not None:
            call, future = given
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
