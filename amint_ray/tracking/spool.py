"""What an MLflow run is told waits on the local disk until the server has it.

    RUN/spool.json       which run, of which server
    RUN/records.jsonl    what it is told, one record a line, in order
    RUN/sent             how many bytes of that the server has
    RUN/files/N/         folders that records speak of
    RUN/lock             held by the process that writes or sends

A record is sent until it has arrived, and only then counted as sent: one whose answer got lost is
sent again, so the server must take each twice without harm (`tracking/sending.py`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_RUN, _RECORDS, _SENT, _FILES, _LOCK = "spool.json", "records.jsonl", "sent", "files", "lock"

Record = dict[str, Any]
"""`kind`, and what `tracking/sending.py` wants of that kind; plain JSON."""


class InUseError(Exception):
    """Another process writes to this spool or sends it."""


class NoSpoolError(Exception):
    """A folder is no spool, or is damaged."""


@dataclass(frozen=True)
class SpooledRun:
    """Whom the records are for.

    Attributes:
        run_id: of the MLflow run.
        run_name: its name, and the spool's.
        tracking_uri: of its server or database, without a password.
        attempt: how often the run was begun or gone on with when these records were written.
    """

    run_id: str
    run_name: str
    tracking_uri: str
    attempt: int = 1


class Spool:
    """The records of one run that have not been sent; one process at a time has it open.

    Attributes:
        folder: where it is kept.
        run: whom it is for.
    """

    def __init__(self, folder: Path, run: SpooledRun | None = None) -> None:
        """Open a run's spool, with all that was left in it.

        Args:
            folder: its own.
            run: whom it is for, where it need not be there yet.

        Raises:
            InUseError: another process has it open.
            NoSpoolError: it is not there, or damaged.
            OSError: it cannot be read or written.
        """
        self.folder = folder
        if run is not None:
            folder.mkdir(parents=True, exist_ok=True)
        elif not (folder / _RUN).is_file():
            raise NoSpoolError(f"{folder}: there is no {_RUN} in it")
        # Of the process and not of a thread: another one closes it than opened it.
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InUseError(f"{folder}: another process is at work on this run") from None
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Record, int]] = deque()
        self._unwritten = b""
        self._open = True
        try:
            self.run = run or self._read_run()
            if run is not None:
                _replace(folder / _RUN, json.dumps(asdict(run), indent=2))
            self._read_records()
            self._file = (folder / _RECORDS).open("ab", buffering=0)
        except BaseException:  # a signal, too: the lock must not outlive what could not be opened
            self._lock.release()
            raise
        self._written = self._file.tell()
        self._end = self._written

    def _read_run(self) -> SpooledRun:
        try:
            return SpooledRun(**json.loads((self.folder / _RUN).read_text()))
        except (ValueError, TypeError) as error:
            raise NoSpoolError(f"{self.folder / _RUN} is damaged: {error}") from error

    def _read_records(self) -> None:
        """What the server does not have yet; a line that was cut short was never promised."""
        path, sent = self.folder / _RECORDS, 0
        if not path.exists():
            (self.folder / _SENT).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError, ValueError):
            sent = int((self.folder / _SENT).read_text())
        size = path.stat().st_size
        if sent > size:  # the disk lost what it had said was written
            sent = size
            _replace(self.folder / _SENT, str(sent))
        with path.open("r+b") as file:
            file.seek(sent)
            end = sent
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(line)
                try:
                    self._waiting.append((json.loads(line), end))
                except ValueError as error:
                    raise NoSpoolError(f"{path} is damaged at byte {end - len(line)}") from error

    def append(self, record: Record) -> None:
        """Add a record behind all others.

        A disk that is full does not stop the run: the record waits in memory for it to have room.
        """
        line = json.dumps(record).encode() + b"\n"
        with self._changed:
            self._end += len(line)
            self._unwritten += line
            self._write()
            self._waiting.append((record, self._end))
            self._changed.notify_all()

    def _write(self) -> None:
        """Bring what is not there yet to the disk, all of it or nothing."""
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten, self._written = b"", self._end
                return
        except OSError:
            pass
        with contextlib.suppress(OSError):  # else half a line would stand before the next
            self._file.truncate(self._written)

    @property
    def durable(self) -> bool:
        """Whether all records are on the disk."""
        return not self._unwritten

    def new_folder(self) -> Path:
        """An empty folder, for a record to name as its `folder`; it goes when that is sent.

        Raises:
            OSError: it cannot be made.
        """
        files = self.folder / _FILES
        files.mkdir(exist_ok=True)
        taken = [int(path.name) for path in files.iterdir() if path.name.isdecimal()]
        number = 1 + max(taken, default=0)
        folder = files / str(number)
        folder.mkdir()
        return folder

    def folder_of(self, record: Record) -> Path:
        """The folder that a record names."""
        return self.folder / _FILES / str(record["folder"])

    def waiting(self) -> list[Record]:
        """The records that have not been sent, oldest first."""
        with self._changed:
            return [record for record, _ in self._waiting]

    def wait_for_records(self, seconds: float) -> None:
        """Return as soon as there is something to send, or when so many seconds have passed."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting), seconds)

    def sent(self, records: int) -> None:
        """Count the oldest records as sent, and delete the folders they speak of."""
        with self._changed:
            gone = [self._waiting.popleft() for _ in range(records)]
            try:
                _replace(self.folder / _SENT, str(gone[-1][1]))
            except OSError:
                return  # they may be sent again, and need their folders then
        for record, _ in gone:
            if "folder" in record:
                shutil.rmtree(self.folder_of(record), ignore_errors=True)

    def close(self) -> None:
        """Let others have it; where nothing waits any more, nothing of it stays."""
        with self._changed:
            if not self._open:
                return
            self._open = False
            if self._unwritten:
                self._write()
        with contextlib.suppress(OSError):
            self._file.close()
        empty = not self._waiting
        with contextlib.suppress(OSError):
            if empty:
                # In this order: what is cut off here must not be sent again without its files.
                (self.folder / _RECORDS).unlink(missing_ok=True)
                shutil.rmtree(self.folder / _FILES, ignore_errors=True)
                for name in (_SENT, _RUN, _LOCK):
                    (self.folder / name).unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            if empty:
                self.folder.rmdir()
                self.folder.parent.rmdir()  # unless there are other runs' in it


def set_aside(folder: Path, run_id: str) -> Path | None:
    """Move away a spool that waits for another run; what it holds must not be told to this one.

    Args:
        folder: of the spool, which need not be there.
        run_id: of the run that wants the folder.

    Returns:
        Where it is now; None: there was none.

    Raises:
        InUseError: another process has it open.
        NoSpoolError: it is damaged.
        OSError: it cannot be moved.
    """
    if not (folder / _RUN).is_file():
        return None
    spool = Spool(folder)
    other = spool.run.run_id != run_id and bool(spool.waiting())
    spool.close()
    if not other:
        return None
    aside = folder.with_name(f"{folder.name}.{spool.run.run_id[:8] or 'unrecorded'}")
    return folder.rename(aside)


def find_spools(folder: Path) -> list[Path]:
    """The spools in a folder, or the folder itself where it is one; sorted by name."""
    if (folder / _RUN).is_file():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted(path.parent for path in folder.glob(f"*/{_RUN}"))


def steps_told(records: list[Record], metric: str) -> set[int]:
    """The steps at which records have a metric."""
    return {r["step"] for r in records if r["kind"] == "metrics" and metric in r["values"]}


def metrics_told(records: list[Record]) -> dict[str, float]:
    """The last value of each metric that records have."""
    told: dict[str, float] = {}
    for record in records:
        if record["kind"] == "metrics":
            told |= record["values"]
    return told


def newest_time(records: list[Record]) -> int:
    """The latest time that records bear, in milliseconds; 0 where none does."""
    return max((int(record["time"]) for record in records if "time" in record), default=0)


def _replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)
