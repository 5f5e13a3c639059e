"""Where a search is kept, and whether this command may go on with it.

searches/NAME/search.json     what the search is; MLflow's run; whether it has ended
searches/NAME/driver.json     a number that rises while its driver lives
searches/NAME/trials/         a file a trial (`ledger.py`)
searches/NAME/runs/           the trials' trainings, with their checkpoints
searches/NAME/final/          a file for each training of the winner
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from amint_ray.config.search import Search, identity, search_fingerprint
from amint_ray.contracts import UserError, Watcher, first_line
from amint_ray.launch.runs import beating, beats, standing_still
from amint_ray.storage import Location, open_input, write_atomically

_RECORD, _DRIVER = "search.json", "driver"


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
    """

    def __init__(self, place: Location, record: SearchRecord) -> None:
        self.place, self.record = place, record

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

    @contextlib.contextmanager
    def alive(self) -> Iterator[Location]:
        """Let others see that this driver lives, by a file; gives its location."""
        with beating(self.place, _DRIVER) as sign:
            yield sign

    def final(self, name: str) -> dict[str, Any] | None:
        """The document of one of the winner's trainings, if it was done."""
        try:
            with open_input(self.place, f"final/{name}.json") as file:
                found: dict[str, Any] = json.loads(file.read())
                return found
        except (FileNotFoundError, ValueError):
            return None

    def note_final(self, name: str, document: dict[str, Any]) -> None:
        """Keep the document of one of the winner's trainings."""
        with write_atomically(self.place, f"final/{name}.json") as file:
            file.write(json.dumps(document).encode())


def open_search(search: Search, storage: Location, watcher: Watcher, *, new: bool) -> SearchFolder:
    """The folder of a search that goes on, or of a new one.

    Nothing is written before `note` is called: a search in which something is found wrong after
    this leaves no folder, to which it would not belong once it is put right.

    Args:
        search: what is asked for.
        storage: where runs and searches are kept.
        watcher: is told where this has to wait, to see whether the search's driver lives.
        new: begin a new one in any case; its folder gets a name of its own.

    Raises:
        UserError: the folder belongs to another search, or another process is at work on it.
        OSError: storage cannot be read.
    """
    fingerprint, name = search_fingerprint(search), search.spec.name
    if new:
        name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    place = storage.below(f"searches/{name}")
    try:
        with open_input(place, _RECORD) as file:
            record = SearchRecord(**json.loads(file.read()))
    except FileNotFoundError:
        unique = f"{name}-{secrets.token_hex(3)}"
        made = SearchRecord(unique, fingerprint, identity(search), attempts=1)
        return SearchFolder(place, made)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"search: {place.uri}/{_RECORD} is damaged ({first_line(error)}); remove the folder, "
            "or give the search another name (name=OTHER)"
        ) from error
    if record.fingerprint != fingerprint:
        raise UserError(
            f"search: {place.uri} belongs to another search ({_differing(record, search)}); give "
            "this one another name (name=OTHER), or begin anew beside it with --new"
        )
    before = {name: beat for name, beat in beats(place).items() if name == _DRIVER}
    if before and not record.ended and not standing_still(place, before, watcher):
        raise UserError(
            f"search: another process is at work on {place.uri}; wait until it has ended, or stop "
            "it first"
        )
    ended = record.ended and record.spent == spent(search)
    attempts = record.attempts + (not ended)
    return SearchFolder(place, replace(record, ended=ended, attempts=attempts))


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
