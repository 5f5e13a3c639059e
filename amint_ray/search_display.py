"""What a person sees while a search goes on: its trials, the running ones first."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from amint_ray.contracts import few_samples
from amint_ray.display import LiveDisplay, PlainDisplay, duration
from amint_ray.evaluation.objectives import (
    Objective,
    figure_value,
    goodness,
    metric_names,
    short_names,
    shown_parameters,
)

_SECONDS_BETWEEN_LINES = 15.0
_LINES_AROUND = 5
"""The table's heading and its rule, the counts, the bar, and one that the cursor needs."""
_FEWEST_DONE = 3
"""Of the best trials that keep their place, however many run, on a screen of the usual height."""
_MOST_DONE = 8


@dataclass(frozen=True)
class _Standing:
    """How a search stands."""

    trials: Sequence[Mapping[str, Any]]
    objectives: Sequence[Objective]
    planned: int
    concurrent: int

    def counts(self) -> str:
        """How many trials are in which state."""
        states = Counter(trial["state"] for trial in self.trials)
        running = states["running"]
        ended = self.ended()
        waiting = max(states["waiting"], self.planned - ended - running)
        told = [f"{states['done']} done", f"{states['stopped']} stopped"]
        told += [f"{states['failed']} failed"] if states["failed"] else []
        told.append(f"{running} of {self.concurrent} running")
        return ", ".join([*told, f"{waiting} waiting"])

    def ended(self) -> int:
        """How many trials will not go on."""
        return sum(trial["state"] in ("done", "stopped", "failed") for trial in self.trials)

    def ranked(self) -> list[Mapping[str, Any]]:
        """The candidates that are done, those that keep the constraint first, the best first."""
        metric, mode = self.objectives[0]
        rated = []
        for trial in self.trials:
            value = figure_value(trial["figures"], metric)
            if trial["state"] == "done" and not trial["baseline"] and value is not None:
                rated.append((bool(trial["violation"]), -goodness(value, mode), trial["id"], trial))
        return [row[3] for row in sorted(rated, key=lambda row: row[:3])]

    def parameter_names(self) -> dict[str, str]:
        """What parameters are called, the same for all trials."""
        return short_names(name for trial in self.trials for name in trial["parameters"])

    def metric_names(self) -> dict[str, str]:
        """What objectives are called."""
        return metric_names(metric for metric, _ in self.objectives)


def _described(trial: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A trial's parameters, or that it is the plain model."""
    if trial["baseline"]:
        return "plain training (λ₂ = 0)"
    return shown_parameters(trial["parameters"], names)


def _figures(trial: Mapping[str, Any], standing: _Standing) -> list[tuple[str, str]]:
    """Each objective's short name and value."""
    rows = []
    for metric, name in standing.metric_names().items():
        value = figure_value(trial["figures"], metric)
        rows.append((name, "–" if value is None else f"{value:.4g}"))
    return rows


class _TrialTable:
    """The table, made anew for the screen's size whenever it is drawn."""

    def __init__(self) -> None:
        self.standing: _Standing | None = None
        self._started = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        standing = self.standing
        if standing is None:
            return
        width = options.max_width
        elapsed = duration(time.monotonic() - self._started)
        counts = Text(f"{elapsed}  {standing.counts()}", no_wrap=True, overflow="ellipsis")
        rows = self._rows(standing, console.height - _LINES_AROUND)
        if not rows:
            yield counts
            return
        names = standing.parameter_names()
        figures = [_cut(name, _NAME) for name in standing.metric_names().values()]
        headings = ["trial", "state", "epoch", *figures, "time", "parameters"]
        lines = [self._cells(trial, standing, names) for trial in rows]
        widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
        # Parameters have what the other columns leave; rich would take it from those.
        left = max(1, width - sum(widths[:-1]) - 2 * len(widths[:-1]))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for heading, cell_width in zip(headings, [*widths[:-1], left], strict=True):
            right = heading in ("epoch", "time", *figures)
            table.add_column(
                Text(_cut(heading, cell_width)),
                justify="right" if right else "left",
                no_wrap=True,
                width=cell_width,
            )
        for cells in lines:
            cells[-1] = _cut(cells[-1], left)
            table.add_row(*map(Text, cells), style=_STYLES.get(cells[1]))
        yield table
        yield counts

    @staticmethod
    def _cells(
        trial: Mapping[str, Any], standing: _Standing, names: Mapping[str, str]
    ) -> list[str]:
        """A trial's row."""
        broken = trial["state"] == "done" and trial["violation"]
        return [
            trial["id"],
            _BROKEN if broken else trial["state"],
            f"{trial['epoch'] or 0}/{trial['epochs']}",
            *(value for _, value in _figures(trial, standing)),
            duration(trial["seconds"] or 0),
            _described(trial, names),
        ]

    @staticmethod
    def _rows(standing: _Standing, room: int) -> list[Mapping[str, Any]]:
        """Those that run and then the best that are done, as many as there is room for."""
        running = [trial for trial in standing.trials if trial["state"] == "running"]
        best = standing.ranked()[:_MOST_DONE]
        kept = min(len(best), _FEWEST_DONE, max(0, room // 3))
        running = running[: max(0, room - kept)]
        return running + best[: max(0, room - len(running))]


_BROKEN = "breaks"
"""Instead of "done" where the constraint is not kept."""
_STYLES = {"running": "cyan", _BROKEN: "dim"}
_NAME = 14
"""Letters of an objective's name."""


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


class LiveSearchDisplay(LiveDisplay):
    """A table of trials above the bar, which follows how many have ended."""

    def __init__(self, console: Console, heartbeat: Callable[[], None] = lambda: None) -> None:
        self._table = _TrialTable()
        self._counting = False
        super().__init__(console, heartbeat, above=self._table)

    def phase(self, text: str) -> None:
        """Name what is going on; the bar starts anew."""
        self._counting = False
        super().phase(text)

    def trials(
        self,
        trials: Sequence[Mapping[str, Any]],
        *,
        objectives: Sequence[Objective],
        planned: int,
        concurrent: int,
    ) -> None:
        """Show how the trials stand."""
        standing = _Standing(tuple(trials), tuple(objectives), planned, concurrent)
        self._table.standing = standing
        ended = standing.ended()
        if self._counting:
            self._progress.update(self._task, completed=ended, total=planned)
        else:  # what had ended before says nothing about the pace
            self._progress.reset(self._task, completed=ended, total=planned)
            self._counting = True


class PlainSearchDisplay(PlainDisplay):
    """A line whenever a trial begins or ends, and now and then how all of them stand."""

    def __init__(self, console: Console, heartbeat: Callable[[], None] = lambda: None) -> None:
        super().__init__(console, heartbeat)
        self._states: dict[str, str] | None = None
        self._began = time.monotonic()
        self._told_at = -_SECONDS_BETWEEN_LINES
        self._told: Any = None

    def trials(
        self,
        trials: Sequence[Mapping[str, Any]],
        *,
        objectives: Sequence[Objective],
        planned: int,
        concurrent: int,
    ) -> None:
        """Tell what is new."""
        standing = _Standing(trials, objectives, planned, concurrent)
        states = {trial["id"]: trial["state"] for trial in trials}
        before = self._states
        self._states = states
        names = standing.parameter_names()
        with contextlib.suppress(OSError):  # whoever read the pipe may be gone
            for trial in trials:
                # What had ended when the search was taken up again is only counted.
                known = trial["state"] if before is None else before.get(trial["id"])
                is_new = trial["state"] != known and trial["state"] != "waiting"
                if is_new or (before is None and trial["state"] == "running"):
                    self._print(_news(trial, standing, names))
            self._progress_line(standing)

    def _progress_line(self, standing: _Standing) -> None:
        now = time.monotonic()
        seen = [(trial["state"], trial["epoch"]) for trial in standing.trials]
        if seen == self._told or now - self._told_at < _SECONDS_BETWEEN_LINES:
            return
        self._told, self._told_at = seen, now
        best = standing.ranked()[:1]
        told = f"; best {best[0]['id']}: {_figures_text(best[0], standing)}" if best else ""
        self._print(f"{duration(now - self._began)}  {standing.counts()}{told}")


def _news(trial: Mapping[str, Any], standing: _Standing, names: Mapping[str, str]) -> str:
    """What became of a trial."""
    name, state = trial["id"], trial["state"]
    at = f"at epoch {trial['epoch'] or 0}/{trial['epochs']} after {duration(trial['seconds'] or 0)}"
    if state == "running":
        return f"{name} runs: {_described(trial, names)}, seed {trial['seed']}"
    if state == "failed":
        return f"{name} failed {at}: {few_samples(trial['reason'] or 'no reason is known')}"
    broken = f"; breaks the constraint by {trial['violation']:.3g}" if trial["violation"] else ""
    return f"{name} {state} {at}: {_figures_text(trial, standing)}{broken}"


def _figures_text(trial: Mapping[str, Any], standing: _Standing) -> str:
    return ", ".join(f"{name} {value}" for name, value in _figures(trial, standing))


SearchDisplay = LiveSearchDisplay | PlainSearchDisplay


def open_search_display(heartbeat: Callable[[], None], *, plain: bool = False) -> SearchDisplay:
    """Live where stderr is a terminal, plain elsewhere.

    Args:
        heartbeat: called at each phase and a few times a second; may raise to stop the search.
        plain: no table even at a terminal, because others write to it too.
    """
    console = Console(stderr=True)
    live = console.is_terminal and not plain
    return LiveSearchDisplay(console, heartbeat) if live else PlainSearchDisplay(console, heartbeat)
