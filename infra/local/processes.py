"""Starting and ending server processes that may outlive whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_LAST_WORDS = 600


@dataclass(frozen=True)
class Server:
    """A process, known by its pid and the moment of its start, since pids come again.

    Attributes:
        pid: of the process.
        created: as `moment_of_start` has it.
    """

    pid: int
    created: float

    @property
    def process(self) -> psutil.Process | None:
        """The process; None where it has ended."""
        try:
            found = psutil.Process(self.pid)
            same = moment_of_start(self.pid) == self.created
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def moment_of_start(pid: int) -> float:
    """When a process was started: clock ticks after the boot on Linux, which no clock moves.

    Elsewhere seconds since the epoch.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    # Field 22 of proc(5), counted behind the name, which may hold blanks and brackets.
    return float(text.rpartition(")")[2].split()[19])


def start_server(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    detached: bool,
    user: str | None = None,
    cwd: Path | None = None,
) -> Server:
    """Start a program that stays; what it prints is appended to its log.

    Args:
        command: the program and its arguments.
        log: file that takes what it prints.
        environment: all of its variables.
        detached: whether it is to outlive this process. Otherwise it ends with it, on Linux however
            that was killed, and with the thread that called this.
        user: whom it runs as; None: us.
        cwd: its working directory; None: ours.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=cwd,
            user=user,
            start_new_session=True,
            preexec_fn=_end_with_parent if _libc and not detached else None,
        )
    _ours[process.pid] = process
    return Server(process.pid, moment_of_start(process.pid))


_ours: dict[int, subprocess.Popen[bytes]] = {}
"""Children of this process, to be waited for when they end, lest they stay as zombies."""


def _end_with_parent() -> None:
    """Runs in the child before its program: a parent that SIGKILL ended could not stop it."""
    assert _libc is not None
    _libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def wait_until_ready(
    name: str, server: Server, answers: Callable[[], bool], *, log: Path, seconds: float
) -> None:
    """Wait for a server's first answer.

    Raises:
        RuntimeError: it ended, or kept silent for too long; tells what its log says.
    """
    deadline = time.monotonic() + seconds
    while not answers():
        ended = server.process is None
        if ended or time.monotonic() > deadline:
            said = " ".join(log.read_text(errors="replace").split())[-_LAST_WORDS:]
            what = "ended" if ended else f"did not answer within {seconds:g} s"
            raise RuntimeError(f"{name} {what}; {log} ends with: {said or 'nothing'}")
        time.sleep(0.05)


def stop_server(
    server: Server, *, how: signal.Signals = signal.SIGTERM, seconds: float = 30.0
) -> None:
    """End a server and all that it started, and wait until they are gone.

    Args:
        server: to be ended; nothing happens where it has ended.
        how: the signal that asks it to.
        seconds: after which those that are left are killed.
    """
    process = server.process
    if process is not None:
        family = [process, *process.children(recursive=True)]
        process.send_signal(how)
        _, left = psutil.wait_procs(family[:1], timeout=seconds)
        # What it started ends with it, a moment later.
        _, left = psutil.wait_procs([*left, *family[1:]], timeout=5.0)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
                one.kill()
        psutil.wait_procs(left, timeout=5.0)
    child = _ours.get(server.pid)
    if child is not None and child.poll() is not None:  # which takes a zombie away
        del _ours[server.pid]
