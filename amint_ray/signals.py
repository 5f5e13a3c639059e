"""Ctrl-C, SIGTERM and SIGHUP end a command in order: workers stopped, the run marked, one line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn


class Stopped(BaseException):
    """A signal to stop; not an Exception, so that only clean-up code sees it pass."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_TO_TRY_AGAIN = 0.05
_signals: list[int] = []
_raised: list[int] = []


def install_handlers() -> None:
    """From now on a signal to stop raises `Stopped` in the main thread, once."""
    _signals.clear()
    _raised.clear()
    # SIGINT too: a shell script that starts us with & has it ignored, and Python would leave it so.
    for signum in _STOPPING:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, _on_signal)
    if sys.unraisablehook is not _without_stopped:
        sys.unraisablehook = _without_stopped


def received() -> int | None:
    """The first signal to stop that came, if any did."""
    return _signals[0] if _signals else None


def raise_if_stopped() -> None:
    """Raise again what Python swallows if the signal came in a callback or a finaliser."""
    if _signals:
        _raise()


def write(text: str) -> None:
    """To stderr. Not print: a signal may come in its middle. The terminal may be gone, too."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _on_signal(signum: int, frame: FrameType | None) -> None:
    _signals.append(signum)
    if len(_signals) == 1:
        write("amint: stopping\n")
        _raise_at_a_safe_moment(signum, frame)
        return
    # An impatient second Ctrl-C must not leave Ray's processes behind; a third means it.
    if len(_signals) == 2:
        write("amint: still stopping; once more ends it now, and may leave processes behind\n")
        return
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _raise() -> NoReturn:
    _raised.append(_signals[0])
    raise Stopped(_signals[0])


def _raise_at_a_safe_moment(signum: int, frame: FrameType | None) -> None:
    """Now, or as soon as no import is under way, nor a call of `logging`.

    An exception in Python's own code for these could leave a lock held that every thread needs;
    those would then wait for ever, and the command with them.
    """
    if _raised:  # by `raise_if_stopped`, meanwhile
        return
    if not _holds_a_lock(frame):
        _raise()
    signal.signal(signal.SIGALRM, _raise_at_a_safe_moment)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_TRY_AGAIN)


def _holds_a_lock(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(("<frozen importlib", logging.__file__)):
            return True
        frame = frame.f_back
    return False


def _without_stopped(unraisable: Any) -> None:
    """Say nothing of a `Stopped` that Python swallowed: `raise_if_stopped` raises it again."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)
