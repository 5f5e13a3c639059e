"""A watcher that shows nothing and keeps what it is told."""

from __future__ import annotations


class Silent:
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.notices: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def event(self, event: object) -> None: ...

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def heartbeat(self) -> None: ...
