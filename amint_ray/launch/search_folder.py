"""Where a search is kept, and whether this command may go on with it.

searches/NAME/search.json     what the search is; MLflow's run; whether it has ended
searches/NAME/driver.json, claim     who is at work on it (`claim.py`)
searches/NAME/trials/         a file a trial (`ledger.py`)
searches/NAME/runs/           the trials' trainings, with their checkpoints
searches/NAME/final/          a file for each training of the winner
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pyarrow.fs import FileInfo, FileSelector, FileType

from amint_ray.config.search import Search, identity, search_fingerprint
from amint_ray.contracts import RunError, UserError, Watcher, first_line
from amint_ray.launch.claim import Claim
from amint_ray.launch.kept import read_kept
from amint_ray.storage import Location, open_input, write_atomically

_RECORD = "search.json"


@dataclass(frozen=True)
class SearchRecord:
    """What a search is.

    Attributes:
        name: unique; begins the names of all that belongs to it.
        fingerprint: over all that decides what it proposes.
        identity: what that is over.
        manifest: fingerprint of images and roles; empty until it is known.
        run_id: MLflow's.
        seconds: that drivers of it spent on its trials.
        attempts: how often it was begun or gone on with.
        ended: whether it is done, final trainings and all.
        spent: the budget and the final trainings that it was done with.
        document: what it gave then.
    """

    name: str
    fingerprint: str
    identity: dict[str, Any]
    manifest: str = ""
    run_id: str = ""
    seconds: float = 0.0
    attempts: int = 0
    ended: bool = False
    spent: dict[str, Any] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)


class SearchFolder:
    """A search's folder, and its record.

    Attributes:
        place: where it is.
        record: as it will be written next.

        claim: this driver's hold on it.
    """

    def __init__(self, claim: Claim, record: SearchRecord) -> None:
        self.place, self.claim, self.record = claim.place, claim, record
        self._noted = False

    @property
    def trials(self) -> Location:
        """For the ledger."""
        return self.place.below("trials")

    @property
    def runs(self) -> Location:
        """For the trials' trainings."""
        return self.place.below("runs")

    def note(self, **changes: Any) -> None:
        """Write the record down, changed.

        Raises:
            OSError: it cannot be written.
        """
        self.record = replace(self.record, **changes)
        with write_atomically(self.place, _RECORD) as file:
            file.write(json.dumps(asdict(self.record), indent=2).encode())
        self._noted = True

    @contextlib.contextmanager
    def alive(self) -> Iterator[Location]:
        """Let others see that this driver lives, by a file; gives its location.

        Where nothing was noted when the body ends, no trace of it stays; and no sign, where the
        search is done.

        Raises:
            UserError: another driver has begun since this folder was opened.
            RunError: storage does not take the files.
        """
        try:
            with self.claim.held() as sign:
                yield sign
        finally:
            if self.claim.mine() and (self.record.ended or not self._noted):
                self.claim.leave()

    def settle(self, watcher: Watcher) -> None:
        """See that no other driver began at the same time; see `Claim.settle`."""
        self.claim.settle(watcher)

    def clean(self, ended: Sequence[str]) -> None:
        """Delete what nobody goes on with: trainings of ended trials, and all of Tune's own files.

        What cannot be deleted stays: no reason to fail a search that is done.

        Args:
            ended: ids of those trials.
        """
        names = {f"{self.record.name}-{trial}" for trial in ended}
        for info in _folders(self.runs):
            if info.base_name.rpartition("-")[0] in names:  # behind it is what it was trained with
                _remove(self.runs, info.path)
        for info in _folders(self.place):
            if info.base_name.startswith("tune-"):
                _remove(self.place, info.path)

    def final(self, name: str) -> dict[str, Any] | None:
        """The document of one of the winner's trainings, if it was done."""
        try:
            with open_input(self.place, f"final/{name}.json") as file:
                found: Any = json.loads(file.read())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def note_final(self, name: str, document: dict[str, Any]) -> None:
        """Keep the document of one of the winner's trainings."""
        with write_atomically(self.place, f"final/{name}.json") as file:
            file.write(json.dumps(document).encode())


@contextlib.contextmanager
def reading(storage: Location, key: str = "storage.path") -> Iterator[None]:
    """Say of storage that cannot be read which it is.

    Args:
        storage: what is read.
        key: the configuration key that set it.

    Raises:
        RunError: for any OSError of the body.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{key} = {storage.uri!r}: {first_line(error)}") from error


def open_search(search: Search, storage: Location, watcher: Watcher, *, new: bool) -> SearchFolder:
    """The folder of a search that goes on, or of a new one.

    Nothing is written before `note` is called: a search in which something is found wrong after
    this leaves no folder, to which it would not belong once it is put right.

    Args:
        search: what is asked for.
        storage: where runs and searches are kept.
        watcher: is told the name of a new one, and where this has to wait, to see whether the
            search's driver lives.
        new: begin a new one in any case; its folder gets a name of its own.

    Raises:
        UserError: the folder belongs to another search, or another process is at work on it.
        OSError: storage cannot be read.
    """
    fingerprint, name = search_fingerprint(search), search.spec.name
    if new:
        # Short enough to be a name itself, by which the search can be gone on with.
        name = f"{name[:59]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        watcher.notice(f"to go on with this search: the same command, name={name} for --new")
    place = storage.below(f"searches/{name}")
    claim, record = Claim(place, "search"), _read(place)
    _check_same(place, record, search)
    ended = record is not None and _is_done(record, search)
    claim.look(watcher, wait=not ended)
    if record is None:
        unique = f"{name}-{secrets.token_hex(3)}"
        record = SearchRecord(unique, fingerprint, identity(search))
    attempts = record.attempts + (not ended)
    record = replace(record, ended=ended, attempts=attempts)
    return SearchFolder(claim, record)


def _check_same(place: Location, record: SearchRecord | None, search: Search) -> None:
    """Whether a folder is free for a search, or its own.

    Raises:
        UserError: it is not.
    """
    if record is not None and record.fingerprint != search_fingerprint(search):
        raise UserError(
            f"search: {place.uri} belongs to another search ({_differing(record, search)}); give "
            "this one another name (name=OTHER), or begin anew beside it with --new"
        )


def earlier_search(search: Search, storage: Location) -> SearchFolder | None:
    """The folder of this very search, where it was begun; `record.ended`: whether it is done.

    Args:
        search: what is asked for.
        storage: where runs and searches are kept.

    Raises:
        UserError: the folder is another search's, or its record is damaged.
        OSError: storage cannot be read.
    """
    place = storage.below(f"searches/{search.spec.name}")
    record = _read(place)
    _check_same(place, record, search)
    if record is None:
        return None
    return SearchFolder(Claim(place, "search"), replace(record, ended=_is_done(record, search)))


def done_search(search: Search, storage: Location) -> SearchFolder | None:
    """The folder of this very search, where it is done; None otherwise, whatever is the matter.

    Args:
        search: what is asked for.
        storage: where runs and searches are kept.

    Raises:
        UserError: its record is damaged.
        OSError: storage cannot be read.
    """
    place = storage.below(f"searches/{search.spec.name}")
    record = _read(place)
    if record is None or record.fingerprint != search_fingerprint(search):
        return None
    return SearchFolder(Claim(place, "search"), record) if _is_done(record, search) else None


def _is_done(record: SearchRecord, search: Search) -> bool:
    """Whether the search was done, and no more may be spent on it now."""
    return record.ended and record.spent == spent(search)


def _read(place: Location) -> SearchRecord | None:
    """A search's record; None: there is none yet.

    Raises:
        UserError: it is damaged.
        OSError: storage cannot be read.
    """
    try:
        with open_input(place, _RECORD) as file:
            return read_kept(SearchRecord, file.read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"search: {place.uri}/{_RECORD} is damaged ({first_line(error)}); remove the folder, "
            "or give the search another name (name=OTHER)"
        ) from error


def _folders(place: Location) -> list[FileInfo]:
    """What lies in a folder; nothing where it cannot be read."""
    try:
        found = place.filesystem.get_file_info(FileSelector(place.path, allow_not_found=True))
    except OSError:
        return []
    return [info for info in found if info.type == FileType.Directory]


def _remove(place: Location, path: str) -> None:
    with contextlib.suppress(OSError):
        place.filesystem.delete_dir(path)


def spent(search: Search) -> dict[str, Any]:
    """What a search that is done may go on with more of."""
    parts: Any = {"budget": {"trials", "hours"}, "final": True}
    return search.spec.model_dump(mode="json", include=parts)


def _differing(record: SearchRecord, search: Search) -> str:
    """Which keys differ, in words."""
    now = identity(search)
    keys = [key for key in {**record.identity, **now} if record.identity.get(key) != now.get(key)]
    told = {"configuration": "recipe or settings"}
    return f"other {', '.join(dict.fromkeys(told.get(key, key) for key in keys))}"
