"""What a person sees of a search's result: tables and lines on stdout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amint_ray.contracts import few_samples
from amint_ray.evaluation.objectives import (
    AUDIT,
    HEADLINE,
    figure_value,
    front_axes,
    metric_names,
    short_names,
    shown,
    shown_parameters,
)
from amint_ray.tables import interval

_WIDE = 100
"""Columns of a screen from which on a figure and its interval stand side by side."""
_GUESSING = 0.5
"""An AUC."""
_MOST_ROWS = 20
_MOST_REASONS = 3
_LIMITS = {
    "at_least": "at least {}",
    "at_most": "at most {}",
    "most_below_plain": "at most {} below plain training's",
    "most_above_plain": "at most {} above plain training's",
}


def print_search(document: Mapping[str, Any], console: Console) -> None:
    """The front, the best, what became of it on `test`, and how to go on."""
    axes = front_axes([(o["metric"], o["mode"]) for o in document["objectives"]])
    metrics = [metric for metric, _ in axes]
    narrow = console.width < _WIDE
    console.print(_front(document, metrics, narrow=narrow))
    _lines(console, _found(document, metrics))
    if document["final"] is not None:
        console.print(_final(document["final"], metrics, narrow=narrow))
    if document.get("paper"):
        console.print(_paper(document["paper"], narrow=narrow))
    recorded = {
        "MLflow run": document["run_id"],
        "registered model": (document["final"] or {}).get("model_uri"),
        "recipe": document["recipe_file"],
        "seconds": "  ".join(f"{name} {value:.1f}" for name, value in document["seconds"].items()),
        "next": document["next"],
    }
    _lines(console, {label: text for label, text in recorded.items() if text})


def _lines(console: Console, lines: Mapping[str, str]) -> None:
    for label, text in lines.items():
        console.print(f"{label:<23} {text}", highlight=False, markup=False, soft_wrap=True)


def _front(document: Mapping[str, Any], metrics: Sequence[str], *, narrow: bool) -> Table:
    """A row a configuration, the best one marked, and the plain model."""
    table = Table(title=Text(f"{document['search']}: the front, on calibration images"))
    table.add_column("number", no_wrap=True)
    table.add_column("parameters", overflow="fold", ratio=1)
    for name in metric_names(metrics).values():
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_column("seeds", justify="right")
    best = document["best"]
    rows, others = document["front"][:_MOST_ROWS], document["front"][_MOST_ROWS:]
    if best is not None and all(best["number"] != row["number"] for row in rows):
        rows = [*rows, best]
        others = [row for row in others if row["number"] != best["number"]]
    if others:
        table.caption = f"and {len(others)} more (--json has them all)"
    names = short_names(name for row in rows for name in row["parameters"])
    for row in rows:
        mark = " *" if best is not None and row["number"] == best["number"] else "  "
        cells = [f"{row['number']}{mark}", shown_parameters(row["parameters"], names)]
        cells += [_interval(row["figures"].get(metric), narrow=narrow) for metric in metrics]
        table.add_row(*map(Text, [*cells, str(len(row["seeds"]))]))
    plain = document["baseline"]
    if plain is not None:
        cells = ["plain", "loss.lambda_mint=0"]
        cells += [_interval(plain["figures"].get(metric), narrow=narrow) for metric in metrics]
        table.add_section()
        table.add_row(*map(Text, [*cells, str(len(plain["seeds"]))]))
    return table


def _interval(figure: Mapping[str, Any] | None, *, narrow: bool) -> str:
    """As `tables.interval`, also where limits or the whole figure are missing."""
    value = None if figure is None else figure_value({"": figure}, "")
    if figure is None or value is None:
        return "–"
    if figure.get("low") is None or figure.get("high") is None:
        return f"{value:.3f}"
    return interval(figure).replace(" ", "\n" if narrow else " ", 1)


def _found(document: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, str]:
    """Counts, constraint, the best, and what mattered."""
    counts = document["counts"]
    lines = {
        "trials": f"{counts['done']} done, {counts['stopped']} stopped early, "
        f"{counts['failed']} failed"
    }
    reasons = Counter(t["reason"] for t in document["trials"] if t["state"] == "failed")
    if reasons:
        told = [
            f"{times} times: {few_samples(why)}"
            for why, times in reasons.most_common(_MOST_REASONS)
        ]
        lines["why they failed"] = "; ".join(told)
    if document["constraint"] is not None:
        limits = [
            text.format(shown(document["constraint"][key]))
            for key, text in _LIMITS.items()
            if document["constraint"].get(key) is not None
        ]
        lines["constraint"] = " ".join([document["constraint"]["metric"], *limits])
    best = document["best"]
    if best is None:
        lines["best"] = "none: no configuration is complete"
    else:
        settings = " ".join(f"{key}={shown(value)}" for key, value in best["settings"].items())
        lines["best (*)"] = f"{best['number']}: {settings or 'the recipe as it is'}"
        if not document["feasible"]:
            broken = best["violation"]
            least = f"{best['number']} breaks it least, by {shown(broken)}"
            lines["CONSTRAINT BROKEN"] = (
                f"no configuration keeps it; {least}"
                if broken
                else "no configuration is known to keep it: its metric is missing at last looks"
            )
        lines |= _doubts(document)
    short = metric_names(metrics)
    for metric, shares in (document["importance"] or {}).items():
        if shares is not None:
            top = list(shares.items())[:4]
            told = [f"{name} {share['value']:.0%}" for name, share in top]
            lines[f"{short.get(metric, metric)} depends on"] = ", ".join(told)
    return lines


def _doubts(document: Mapping[str, Any]) -> dict[str, str]:
    """Why the best may be nothing to rely on."""
    asked = [objective["metric"] for objective in document["objectives"]]
    names = dict.fromkeys([*(name for name in asked if name.endswith(".auc")), AUDIT[0]])
    figures = {name: document["best"]["figures"].get(name) or {} for name in names}
    short, lines = metric_names(names), {}
    told = [
        f"{short[name]} {interval(figure)}"
        for name, figure in figures.items()
        if figure.get("low") is not None
        and figure.get("high") is not None
        and figure["low"] <= _GUESSING <= figure["high"]
    ]
    if told:
        lines["GUESSING"] = (
            f"the interval of the best holds {_GUESSING} ({', '.join(told)}): no better than "
            "guessing is not excluded"
        )
    if document["final"] is None:
        lines["NOT ON TEST"] = (
            "final.seeds = 0: the best was not measured on test; what it was chosen by is too good"
        )
    return lines


def _final(final: Mapping[str, Any], metrics: Sequence[str], *, narrow: bool) -> Table:
    """The winner trained again, on `test`, beside what it was chosen for."""
    seeds = ", ".join(map(str, final["seeds"]))
    table = Table(title=f"the best, trained again from scratch (seeds {seeds}), on test images")
    default = final.get("default")
    table.add_column("")
    headings = ["when chosen", "final", "better when\nchosen"]
    for heading in [*headings, "the recipe's\ndefault"] if default else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    optimism = final["optimism"]
    wanted = dict.fromkeys([*metrics, *HEADLINE, *optimism])
    names = [name for name in wanted if name in final["figures"]]
    short = metric_names(names)
    for name in names:
        chosen = optimism.get(name, {})
        cells = [
            short[name],
            _number(chosen.get("selection"), ""),
            _interval(final["figures"][name], narrow=narrow),
            _number(chosen.get("difference"), "+"),
        ]
        if default:
            cells.append(_interval(default["figures"].get(name), narrow=narrow))
        table.add_row(*map(Text, cells))
    return table


def _number(value: Any, sign: str) -> str:
    """To three places; figures with limits are told by their value."""
    number = value["value"] if isinstance(value, Mapping) else value
    return "–" if number is None else f"{number:{sign}.3f}"


def _paper(rows: Sequence[Mapping[str, Any]], *, narrow: bool) -> Table:
    """Published figures beside ours, a line a cell of the published table."""
    table = Table(
        title="as published, and here",
        caption="published: on the paper's unseen images; here: on half of calibration",
    )
    table.add_column("")
    table.add_column("")
    figures = list(dict.fromkeys(key for row in rows for key in row["paper"]))
    for figure in figures:
        table.add_column(f"{figure},\npublished", justify="right", no_wrap=True)
        table.add_column("here", justify="right", no_wrap=True)
    before = None
    for row in rows:
        if before is not None and row["row"] != before:
            table.add_section()
        first = "" if row["row"] == before else row["row"]
        before = row["row"]
        cells = [first, row["column"]]
        for figure in figures:
            theirs = row["paper"].get(figure)
            cells.append("–" if theirs is None else f"{theirs:.2f}")
            cells.append(_interval(row["ours"].get(figure), narrow=narrow))
        table.add_row(*map(Text, cells))
    return table


def print_planned(document: Mapping[str, Any], console: Console) -> None:
    """What a search would begin with."""
    trials = document["trials"]
    table = Table(title=Text(f"{document['search']}: the first {len(trials)} trials"))
    table.add_column("trial")
    table.add_column("parameters", overflow="fold", ratio=1)
    table.add_column("seed", justify="right")
    names = short_names(name for trial in trials for name in trial["parameters"])
    for trial in trials:
        plain = trial.get("baseline", False)
        told = "plain training (λ₂ = 0)" if plain else shown_parameters(trial["parameters"], names)
        table.add_row(*map(Text, [trial["id"], told, str(trial["seed"])]))
    console.print(table)
    lines = {
        "trials in all": f"{document['planned']}",
        "at a time": f"{document['concurrent'] or 'as many as the cluster has room for'}",
        "next": document["next"],
    }
    _lines(console, lines)
