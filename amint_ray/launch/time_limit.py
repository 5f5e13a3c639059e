"""Waiting for a call no longer than some seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

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
