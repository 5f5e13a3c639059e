"""What a person sees while something is done, and that stdout is left to the result."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_OF_SILENCE = 60.0
"""After which a line that says nothing new says that it still goes on."""


class LiveDisplay:
    """A bar that follows epochs, step rate, both losses and the time left."""

    def __init__(
        self,
        console: Console,
        heartbeat: Callable[[], None] = lambda: None,
        *,
        above: RenderableType | None = None,
    ) -> None:
        self.heartbeat = heartbeat
        self._progress = _ProgressBelow(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress.above = above
        self._task = self._progress.add_task("starting", total=None, detail="")
        self._steps = _StepRate()
        self._losses = ""
        self._began = time.monotonic()
        self._progress.start()

    def phase(self, text: str) -> None:
        """Name what is going on; how long it takes is unknown."""
        self.heartbeat()
        self._began = time.monotonic()
        self._progress.reset(self._task, total=None, description=text, detail="")

    def event(self, event: Mapping[str, Any]) -> None:
        """Move the bar."""
        if event["phase"] == "train":
            rate = self._steps.update(event["step"])
            self._progress.update(
                self._task,
                description=f"epoch {event['epoch']}/{event['epochs']}",
                completed=event["step"],
                total=event["steps"],
                detail=(f"{rate:.1f} steps/s  {self._losses}" if rate else self._losses)
                + lost(event.get("lost", 0)),
            )
        elif event["phase"] == "epoch":
            self._losses = losses(event)
        elif event["phase"] == "read":
            self._progress.update(self._task, completed=event["done"], total=event["total"])
        elif event["phase"] == "parts":
            self._progress.update(
                self._task,
                completed=event["epochs"],
                total=event["epochs_total"] or None,
                detail=f"{duration(time.monotonic() - self._began)}  {parts(event)}",
            )
        elif event["phase"] == "evaluate":
            self.phase("scoring every sample")

    def notice(self, text: str) -> None:
        """A line above the bar that stays."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._progress.console.print(f"amint: {text}", markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()


class _ProgressBelow(Progress):
    """A bar with something else above it, as a terminal takes one live display alone."""

    above: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above
        yield from super().get_renderables()


class PlainDisplay:
    """Lines of text for logs and pipes: each phase, and an epoch's line every few seconds."""

    def __init__(self, console: Console, heartbeat: Callable[[], None] = lambda: None) -> None:
        self.heartbeat = heartbeat
        self._console = console
        self._last = self._started = -math.inf
        self._steps = _StepRate()
        self._pace = self._said = ""
        self._lost = 0

    def phase(self, text: str) -> None:
        """One line a phase."""
        self.heartbeat()
        self._started = time.monotonic()
        if text != self._said:  # such as the end of a search's last training, and its own
            self._print(text)
        self._said = text

    def event(self, event: Mapping[str, Any]) -> None:
        """One line now and then."""
        if event["phase"] == "train":
            if rate := self._steps.update(event["step"]):
                left = (event["steps"] - event["step"]) / rate
                self._pace = f"  {rate:.1f} steps/s  {left:.0f} s left"
            self._lost = event.get("lost", 0)
        elif event["phase"] == "evaluate":
            self._print("scoring every sample")
        elif event["phase"] == "read":
            if time.monotonic() - self._started >= _SECONDS_BETWEEN_LINES and self._now_and_then():
                self._print(f"{event['done']:,} of {event['total']:,} images")
        elif event["phase"] == "parts":
            self._tell_parts(parts(event))
        elif event["phase"] == "epoch" and self._now_and_then():
            self._print(f"epoch {event['epoch']:g}  {losses(event)}{self._pace}{lost(self._lost)}")

    def _tell_parts(self, text: str) -> None:
        """What is new, or for a long time is not."""
        quiet = time.monotonic() - self._last
        if (text != self._said or quiet >= _SECONDS_OF_SILENCE) and self._now_and_then():
            began = self._started if math.isfinite(self._started) else self._last
            self._print(f"{duration(self._last - began)}  {text}")
            self._said = text

    def _now_and_then(self) -> bool:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return False
        self._last = now
        return True

    def notice(self, text: str) -> None:
        """One line."""
        with contextlib.suppress(OSError):  # whoever read the pipe may be gone
            self._print(text)

    def close(self) -> None:
        """Nothing to take away."""

    def _print(self, text: str) -> None:
        self._console.print(f"amint: {text}", markup=False, highlight=False, soft_wrap=True)


class _StepRate:
    """Steps a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def update(self, step: int) -> float | None:
        now = time.monotonic()
        self._seen = [(t, s) for t, s in self._seen if now - t < 10] + [(now, step)]
        (first, start), (last, end) = self._seen[0], self._seen[-1]
        return (end - start) / (last - first) if last > first and end > start else None


def losses(event: Mapping[str, Any]) -> str:
    """Both losses of an epoch's entry."""
    text = f"task {event['train/task_loss']:.4f}"
    if "train/mint_loss" in event:
        text += f"  mint {event['train/mint_loss']:.4f}"
    return text


def parts(event: Mapping[str, Any]) -> str:
    """How many parts of an attack are done, and how far its trainings are."""
    text = f"{event['done']} of {event['total']} {'part' if event['total'] == 1 else 'parts'} done"
    if event["epochs_total"]:
        text += f", {event['epochs']:.0f} of {event['epochs_total']:.0f} epochs trained"
    return text


def duration(seconds: float) -> str:
    """As a clock has it."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lost(images: int) -> str:
    """How many images could not be read, if any."""
    return f"  {images:,} images lost" if images else ""


def open_display(
    heartbeat: Callable[[], None], *, plain: bool = False
) -> LiveDisplay | PlainDisplay:
    """Live where stderr is a terminal, plain elsewhere.

    Args:
        heartbeat: called at each phase and a few times a second; may raise to stop the run.
        plain: no bar even at a terminal, because others write to it too.
    """
    console = Console(stderr=True)
    live = console.is_terminal and not plain
    return LiveDisplay(console, heartbeat) if live else PlainDisplay(console, heartbeat)


@contextlib.contextmanager
def results_only(*, verbose: bool) -> Iterator[TextIO]:
    """Keep stdout for the result: whatever libraries print there goes to stderr instead.

    Without `verbose`, their log lines and warnings are dropped.
    """
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that Ray starts
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        logging.getLogger("alembic").setLevel(logging.ERROR)
    sys.stdout.flush()
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        yield result
    finally:
        sys.stdout.flush()
        os.dup2(result.fileno(), 1)
