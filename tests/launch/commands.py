"""Running the real command in a process of its own, and finding what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

SECONDS_AT_MOST = 480


@dataclass
class Command:
    """`amint ARGUMENTS` in a folder; it and all its descendants carry a mark."""

    folder: Path
    arguments: list[str]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of this process, but for another server's or cluster's address."""
    within: tuple[str, ...] = ()
    """A command that runs the one behind it."""

    def __post_init__(self) -> None:
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        }
        self._stdout = self.folder / f"stdout-{self.mark}"
        self._stderr = self.folder / f"stderr-{self.mark}"
        with self._stdout.open("w") as out, self._stderr.open("w") as err:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", "amint_ray.cli", *self.arguments],
                cwd=self.folder,
                env={**environment, **self.environment, "AMINT_TEST_MARK": self.mark},
                stdout=out,
                stderr=err,
                start_new_session=True,  # so that a signal can go to the group, as Ctrl-C's does
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(SECONDS_AT_MOST)
        except subprocess.TimeoutExpired:
            self.process.kill()
            for process in self.descendants():
                process.kill()
            raise

    def interrupt(self, signum: signal.Signals) -> None:
        """SIGINT to the whole process group, as from a terminal; others to the process alone.

        Ray's own processes block SIGINT; any other ends them, and then Ray ends its driver.
        """
        if signum == signal.SIGINT:
            os.killpg(self.process.pid, signum)
        else:
            os.kill(self.process.pid, signum)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_AT_MOST
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.stderr}"
            assert time.monotonic() < deadline, f"waited too long:\n{self.stderr}"
            time.sleep(0.1)

    def document(self) -> dict[str, Any]:
        assert self.wait() == 0, self.stderr
        document: dict[str, Any] = json.loads(self.stdout)
        return document

    def descendants(self, name: str = "") -> list[psutil.Process]:
        """Live processes that carry the mark, those whose command line holds `name`."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.pid != self.process.pid
                    and process.environ().get("AMINT_TEST_MARK") == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                    and name in " ".join(process.cmdline())
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def leftovers(self) -> list[str]:
        """What still runs when the command has ended and all have had the time to end, too."""
        psutil.wait_procs(self.descendants(), timeout=60)
        return [" ".join(process.cmdline())[:120] for process in self.descendants()]


def on_own_disk(folder: Path, options: str = "", then: str = ":") -> tuple[str, ...]:
    """What runs a command that alone sees a disk in a folder; no root is needed for it.

    Args:
        folder: empty.
        options: of `mount -t tmpfs`.
        then: done once it is there, with its path as `$0`.
    """
    unshare = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    try:
        probe = ["mount -t tmpfs none .", "sh"]
        subprocess.run([*unshare, *probe], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a disk of his own")
    script = f'mount -t tmpfs {options} none "$0" || exit\n{then}\nexec "$@"\n'
    return *unshare, script, str(folder)


def train_workers(folder: Path) -> list[psutil.Process]:
    """Ray Train's workers on a stack's nodes."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("RAY_AUTH_TOKEN_PATH") == str(folder / "ray_token")
            if ours and "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
