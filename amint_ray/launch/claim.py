"""A folder in storage that one driver at a time works on; without locks, which S3 does not have.

driver.json     a number that rises while the driver lives
claim           which driver that is
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from amint_ray.contracts import RunError, UserError, Watcher, first_line
from amint_ray.launch.runs import beating, beats, standing_still
from amint_ray.storage import Location, delete, open_input, write_atomically

_DRIVER, _CLAIM = "driver", "claim"
_SECONDS_TO_SETTLE = 2.0
"""After which two drivers that began at the same time both see whose claim stands."""


class Claim:
    """One driver's hold on a folder.

    Args:
        place: the folder.
        what: is at work there, in words, for errors.
    """

    def __init__(self, place: Location, what: str) -> None:
        self.place, self._what = place, what
        self._before: bytes | None = None
        self._token, self._claimed = "", 0.0
        self._found_parent = True

    def look(self, watcher: Watcher, *, wait: bool = True) -> None:
        """See that no other driver is at work; waits where one was, to see whether it lives.

        Args:
            watcher: is told of the wait, and can end it.
            wait: False where it does not matter who else is there.

        Raises:
            UserError: one is.
            OSError: storage cannot be read.
        """
        signs = {name: beat for name, beat in beats(self.place).items() if name == _DRIVER}
        called = f"the {self._what} in {self.place.uri}"
        if signs and wait and not standing_still(self.place, signs, watcher, called=called):
            raise self._at_work()
        self._before = signs.get(_DRIVER)

    @contextlib.contextmanager
    def held(self) -> Iterator[Location]:
        """Let others see that this driver lives, while the body runs, by a file; gives its place.

        Raises:
            UserError: another driver has begun since `look`.
            RunError: storage does not take the files.
        """
        if beats(self.place).get(_DRIVER) != self._before:
            raise self._at_work()
        self._token = secrets.token_hex(8)
        self._found_parent = self.place.remote or Path(self.place.path).parent.exists()
        with beating(self.place, _DRIVER) as sign:
            try:
                with write_atomically(self.place, _CLAIM) as file:
                    file.write(self._token.encode())
            except OSError as error:
                raise RunError(f"{self.place.uri}: {first_line(error)}") from error
            self._claimed = time.monotonic()
            yield sign

    def settle(self, watcher: Watcher) -> None:
        """See that no other driver began at the same time; to be called while `held`.

        Before this, nothing may be written that another driver would read.

        Args:
            watcher: can end the wait.

        Raises:
            UserError: one did, and it is the one that goes on.
        """
        while time.monotonic() < self._claimed + _SECONDS_TO_SETTLE:
            watcher.heartbeat()
            time.sleep(0.05)
        if not self.mine():
            raise self._at_work()

    def mine(self) -> bool:
        """Whether this driver is the last that claimed the folder."""
        try:
            with open_input(self.place, _CLAIM) as file:
                return bytes(file.read()).decode() == self._token
        except OSError:
            return False

    def leave(self) -> None:
        """Take back what was written; a folder that has nothing else in it goes, too.

        So does the one that it is in, but only where that came with it: who made it may want it.
        """
        for name in (f"{_DRIVER}.json", _CLAIM):
            with contextlib.suppress(OSError):
                delete(self.place, name)
        if not self.place.remote:
            with contextlib.suppress(OSError):  # there is more in it
                Path(self.place.path).rmdir()
                if not self._found_parent:
                    Path(self.place.path).parent.rmdir()

    def _at_work(self) -> UserError:
        return UserError(
            f"{self._what}: another process is at work on {self.place.uri}; wait until it has "
            "ended, or stop it first"
        )


@contextlib.contextmanager
def alone_at(place: Location, what: str, watcher: Watcher) -> Iterator[None]:
    """Hold a folder around the body.

    Args:
        place: the folder.
        what: is at work there, in words, for errors.
        watcher: is told of a wait, and can end it.

    Raises:
        UserError: another driver is at work there.
        RunError: storage cannot be read or written.
    """
    claim = Claim(place, what)
    try:
        claim.look(watcher)
    except OSError as error:
        raise RunError(f"{place.uri}: {first_line(error)}") from error
    mine = False
    try:
        with claim.held():
            try:
                claim.settle(watcher)
                yield
            finally:
                mine = claim.mine()
    finally:  # once no more signs are written; what is done needs no claim to be gone on with
        if mine:
            claim.leave()
