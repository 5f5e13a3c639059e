"""The end of a search: its front, its pictures, and the winner trained again from scratch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from amint_ray.config.load import to_yaml
from amint_ray.config.search_schema import Paper
from amint_ray.contracts import SearchWatcher, first_line, leaves
from amint_ray.evaluation.importance import importance
from amint_ray.evaluation.objectives import front_axes, metric_names
from amint_ray.evaluation.parallel_figure import parallel_coordinates
from amint_ray.evaluation.search import Choice, Configuration, baseline, best, configurations, front
from amint_ray.evaluation.search_figures import importance_bars, learning_curves, pareto
from amint_ray.launch.ledger import Ledger
from amint_ray.launch.prepare import Prepared
from amint_ray.launch.recording import (
    Recording,
    data_tags,
    dataset_fields,
    open_records,
    recorded,
)
from amint_ray.launch.records import RunRecords
from amint_ray.launch.search_folder import SearchFolder
from amint_ray.launch.search_plan import Plan
from amint_ray.launch.winner import final_config, train_again
from amint_ray.storage import open_input, write_atomically
from amint_ray.tracking.run_log import NewRun, OpenedRun, flat

_WINNER = "winner.yaml"


@contextmanager
def open_parent(
    plan: Plan,
    prepared: Prepared,
    folder: SearchFolder,
    watcher: SearchWatcher,
    *,
    tags: Mapping[str, str],
) -> Iterator[Recording]:
    """The search's own MLflow run around the body; a search that goes on has the one it had."""
    record, spec = folder.record, plan.search.spec
    tracking = plan.base.tracking
    new = NewRun(
        experiment=tracking.experiment,
        name=record.name,
        tags={
            "mlflow.source.name": "amint tune",
            "amint.recipe": plan.base.name,
            **data_tags(prepared.config, prepared.dataset, prepared.confounders),
            **tags,
        },
        params=flat(spec.model_dump(mode="json", exclude={"variables", "paper"})),
        texts={
            "search.json": json.dumps(spec.model_dump(mode="json"), indent=2),
            "base.yaml": to_yaml(plan.base),
        },
        parent=tracking.parent_run,
    )

    def opened(run: OpenedRun) -> None:
        folder.note(run_id=run.run_id)

    def begin() -> RunRecords:
        return open_records(
            tracking,
            new,
            uri=prepared.tracking_uri,
            files=folder.place,
            spool=prepared.spool.parent / record.name,
            dataset=dataset_fields(prepared.config, prepared.dataset.index.manifest),
            resume=record.run_id or None,
            tags=tags,
            opened=opened,
        )

    with recorded(begin, watcher) as parent:
        yield parent


def conclude(
    plan: Plan,
    prepared: Prepared,
    folder: SearchFolder,
    ledger: Ledger,
    parent: Recording,
    watcher: SearchWatcher,
    *,
    tags: Mapping[str, str],
    verbose: bool,
) -> dict[str, Any]:
    """Judge, draw and record the trials, and train the winner again.

    Returns:
        `trials` (as `evaluation.search` takes them), `front` and `best` (configurations),
        `feasible` (whether `best` keeps the constraint), `objectives`, `constraint`, `baseline`,
        `importance`, `final` (the winner's trainings from scratch, on `test`; None without),
        `paper`, `counts`, `seconds`, `recipe_file`, `waiting` (where records wait that MLflow did
        not take) and `next`, the command to type.
    """
    watcher.phase("judging the trials")
    spec = plan.search.spec
    objectives = [(objective.metric, objective.mode) for objective in spec.objective]
    axes = front_axes(objectives)
    trials = ledger.documents()
    constrained = spec.constraint is not None
    candidates = configurations(trials, objectives, constrained=constrained)
    plain = baseline(trials)
    on_front, choice = front(candidates, axes), best(candidates, objectives)
    importances = {metric: importance(candidates, metric) for metric, _ in axes}
    document: dict[str, Any] = {
        "search": folder.record.name,
        "run_id": parent.run_id or None,
        "recipe": plan.base.name,
        "trials": trials,
        "front": [each.as_dict() for each in on_front],
        "best": None if choice.configuration is None else choice.configuration.as_dict(),
        "feasible": choice.feasible,
        "objectives": [objective.model_dump() for objective in spec.objective],
        "constraint": None if spec.constraint is None else spec.constraint.model_dump(),
        "baseline": None if plain is None else plain.as_dict(),
        "importance": importances,
        "counts": {
            state: sum(trial["state"] == state for trial in trials if not trial["baseline"])
            for state in ("done", "stopped", "failed")
        },
        "paper": None if spec.paper is None else _beside_paper(spec.paper, candidates),
    }
    if choice.configuration is None:
        watcher.notice("no configuration ran to its end; nothing can be chosen")
    elif not choice.feasible:
        watcher.notice("no configuration keeps the constraint; the best breaks it least")
    pictures = {
        "pareto": pareto(candidates, on_front, axes, plain),
        "parallel_coordinates": parallel_coordinates(candidates, axes),
        "importance": importance_bars(importances),
        **{
            f"curves_{metric}": learning_curves(trials, metric, mode) for metric, mode in objectives
        },
    }
    document["recipe_file"] = _winner_file(plan, folder, choice, watcher)
    _tell_files(parent, document, pictures)
    final = None
    if choice.configuration is not None and spec.final.seeds > 0:
        final = train_again(
            plan, folder, parent, choice.configuration, watcher, tags=tags, verbose=verbose
        )
    document["final"] = final
    parent.tell_figures(
        {
            "selection": {} if choice.configuration is None else choice.configuration.figures,
            "final": {} if final is None else final["figures"],
        },
        step=0,
    )
    document["next"] = _next_command(document)
    _, waiting = parent.finish(watcher, wait_seconds=plan.base.tracking.wait_seconds)
    document["waiting"] = None if waiting is None else str(waiting)
    searched = sum(trial["seconds"] for trial in trials)
    document["seconds"] = {"trials": searched, "search": folder.record.seconds}
    return document


def _tell_files(
    parent: Recording, document: Mapping[str, Any], pictures: Mapping[str, Figure]
) -> None:
    """The table of trials, the front, the winner's recipe and the pictures, as artifacts."""
    files = parent.new_folder()
    (files / "trials.json").write_text(json.dumps(document["trials"], indent=1))
    _write_table(files / "trials.csv", document["trials"])
    rest = {name: document[name] for name in ("front", "best", "baseline", "importance", "paper")}
    (files / "front.json").write_text(json.dumps(rest, indent=1))
    if document["recipe_file"] is not None:
        text = Path(document["recipe_file"]).read_text("utf-8")
        (files / _WINNER).write_text(text, encoding="utf-8")
    for name, picture in pictures.items():
        picture.savefig(files / f"{name}.png", dpi=120)
    parent.tell_files(files)


def _write_table(path: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    """A row a trial: what it is, its parameters, and its figures at its last look."""
    rows = [
        {
            **{key: trial[key] for key in ("id", "run_id", "state", "configuration", "seed")},
            **{key: trial[key] for key in ("epoch", "epochs", "seconds", "violation", "reason")},
            **trial["parameters"],
            **leaves(trial["figures"]),
        }
        for trial in trials
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _winner_file(
    plan: Plan, folder: SearchFolder, choice: Choice, watcher: SearchWatcher
) -> str | None:
    """Write the winner's configuration as a recipe; gives the local path, if there is one."""
    if choice.configuration is None:
        return None
    config = final_config(plan, choice.configuration.settings, seed=plan.search.seed)
    config = config.model_copy(update={"cluster": plan.search.base.cluster})
    changed = ", ".join(f"{k} = {v}" for k, v in choice.configuration.settings.items())
    text = f"# Found by search {folder.record.name}: {changed}\n{to_yaml(config)}"
    try:
        with write_atomically(folder.place, _WINNER) as file:
            file.write(text.encode())
    except OSError as error:
        watcher.notice(f"WARNING: no recipe of the winner: {first_line(error)}")
        return None
    return _local_winner(folder, text, watcher)


def _local_winner(folder: SearchFolder, text: str, watcher: SearchWatcher) -> str | None:
    """Path of the winner's recipe on this machine; None where it cannot be written.

    Beside the search where that is on a disk of this machine, else in the working directory.
    """
    if not folder.place.remote:
        return str(Path(folder.place.path) / _WINNER)
    here = Path(f"{folder.record.name}-{_WINNER}")
    try:
        here.write_text(text, encoding="utf-8")
    except OSError as error:
        watcher.notice(
            f"WARNING: the winner's recipe is {folder.place.uri}/{_WINNER} alone: "
            f"{first_line(error)}"
        )
        return None
    return str(here)


def shown_again(folder: SearchFolder, watcher: SearchWatcher) -> dict[str, Any]:
    """The document of a search that is done, with the winner's recipe where it is shown now."""
    watcher.notice(f"this search is done; {folder.place.uri} has it, --new begins anew")
    document = dict(folder.record.document)
    if document.get("best") is None:
        return document
    try:
        with open_input(folder.place, _WINNER) as file:
            text = file.read().decode()
    except OSError:  # it was removed, or never written
        path = None
    else:
        path = _local_winner(folder, text, watcher)
    document["recipe_file"] = path
    return {**document, "next": _next_command(document)}


def _beside_paper(paper: Paper, candidates: Sequence[Configuration]) -> list[dict[str, Any]]:
    """The paper's cells and ours."""
    short = metric_names(paper.figures)
    rows = []
    for row, columns in paper.cells.items():
        for column, cell in columns.items():
            ours = [
                each
                for each in candidates
                if each.complete
                and str(each.parameters.get(paper.rows)) == row
                and str(each.parameters.get(paper.columns)) == column
            ]
            figures = ours[0].figures if ours else {}
            rows.append(
                {
                    "row": row,
                    "column": column,
                    "source": paper.source,
                    "paper": dict(zip(short.values(), cell, strict=True)),
                    "ours": {label: figures.get(name) for name, label in short.items()},
                }
            )
    return rows


def _next_command(document: Mapping[str, Any]) -> str | None:
    final = document["final"]
    if final is not None and final["model_uri"] is not None:
        name, version = final["model_uri"].removeprefix("models:/").split("/")
        return f"amint promote {name} {version}"
    if document["recipe_file"] is not None:
        return f"amint train {document['recipe_file']}"
    return None
