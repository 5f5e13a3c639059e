"""Where MLflow is told nothing: a run's files and model are kept beside its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from amint_ray.storage import Location, write_atomically
from amint_ray.tracking.spool import Record, Spool

FILES, MODEL = "files", "model"


class StorageSender:
    """Takes a spool's records as `tracking.sending.MLflowSender` does, and keeps what are files.

    Attributes:
        versions: none.
    """

    def __init__(self, run: Location, spool: Spool) -> None:
        self.versions: dict[str, str] = {}
        self._run, self._spool = run, spool

    def __call__(self, records: Sequence[Record]) -> int:
        """Store the first of these.

        Raises:
            OSError: it cannot be written.
        """
        record = records[0]
        if record["kind"] in ("files", "model"):
            place = self._run.below(MODEL if record["kind"] == "model" else FILES)
            self._copy(self._spool.folder_of(record), place)
        return 1

    @staticmethod
    def _copy(folder: Path, place: Location) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                relative = path.relative_to(folder).as_posix()
                with path.open("rb") as source, write_atomically(place, relative) as file:
                    shutil.copyfileobj(source, file)
