"""Where a process writes a checkpoint before it is brought to storage."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "amint-staging-"


class Staging:
    """Folders of this process on the local disk, for what is to be uploaded and then deleted.

    A process that is killed leaves what it was about to upload. The next one on the same machine
    takes it away, or a node where workers die often would fill its disk. A lock, which ends with
    the process that holds it, tells which folders are still in use.
    """

    def __init__(self) -> None:
        self._sweep()
        self._locks: dict[Path, int] = {}

    def new_folder(self) -> Path:
        """An empty folder.

        Raises:
            OSError: None can be made, because the disk is full for instance.
        """
        try:
            return self._locked_folder()
        except FileNotFoundError:  # another process's sweep came before the lock
            return self._locked_folder()

    @property
    def waiting(self) -> int:
        """How many of the folders are still there."""
        for folder in [folder for folder in self._locks if not folder.is_dir()]:
            os.close(self._locks.pop(folder))
        return len(self._locks)

    def _locked_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks, where none sweeps
            fcntl.flock(lock, fcntl.LOCK_SH)
        if not folder.is_dir():
            os.close(lock)
            raise FileNotFoundError(f"{folder} was taken away")
        self._locks[folder] = lock
        return folder

    @staticmethod
    def _sweep() -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):  # locked, someone else's, or gone meanwhile
                lock = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                finally:
                    os.close(lock)
