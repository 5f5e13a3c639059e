"""Calls in threads."""

from __future__ import annotations

import threading

from amint_ray.launch.time_limit import InOrder


def test_calls_are_made_in_order_and_their_thread_ends_with_them() -> None:
    before = set(threading.enumerate())
    calls, made = InOrder(), list[int]()
    (thread,) = set(threading.enumerate()) - before
    for number in range(3):
        last = calls.submit(lambda number=number: made.append(number))  # type: ignore[misc]
    calls.close()
    last.result(5)
    thread.join(5)
    assert made == [0, 1, 2]
    assert not thread.is_alive()
