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
    """A folder of this process on the local disk, for what is to be uploaded.

    A process that is killed leaves what it was about to upload. The next one on the same machine
    takes it away, or a node where workers die often would fill its disk. A lock, which ends with
    the process that holds it, tells whose folder is still in use.
    """

    def __init__(self) -> None:
        self._sweep()
        self._path: Path | None = None

    def new_folder(self) -> Path:
        """An empty folder.

        Raises:
            OSError: None can be made, because the disk is full for instance.
        """
        if self._path is None or not self._path.is_dir():
            self._path = Path(tempfile.mkdtemp(prefix=PREFIX))
            # Never closed: the lock is to last as long as the process.
            lock = os.open(self._path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks, where none sweeps
                fcntl.flock(lock, fcntl.LOCK_SH)
        return Path(tempfile.mkdtemp(dir=self._path))

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
