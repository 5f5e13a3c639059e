"""All attacks on models of a recipe, over several seeds: what each sees, and what it costs.

    python -m benchmarks.attacks [RECIPE [KEY=VALUE …]] [--seeds 3] [--shadows 16] [--json]
    python -m benchmarks.attacks --in-turn [RECIPE …] [--shadows 8]

Seed s sets the split, the training and the shadow models. Splits share one set of images, so that
their test sets overlap: the intervals over seeds are too narrow. With `--in-turn` the same shadow
models are trained one after another, each on all cores, and side by side, each on one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.runs import mean_interval

_QUESTIONS = ("member", "withheld")


def amint(folder: str, arguments: Sequence[str]) -> dict[str, Any]:
    """One `amint … --json` in a folder; gives its document."""
    elsewhere = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    done = subprocess.run(
        [sys.executable, "-m", "amint_ray.cli", *arguments, "--json"],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key not in elsewhere},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"amint {' '.join(arguments)} failed:\n{done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def attacked(
    recipe: str, overrides: Sequence[str], seed: int, shadows: int, methods: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model of this seed, and all attacks on it."""
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        of_attack = [each for each in overrides if each.startswith("attack.")]
        of_run = [each for each in overrides if each not in of_attack]
        seeds = [f"train.seed={seed}", f"data.split_seed={seed}"]
        run = amint(folder, ["train", recipe, *of_run, *seeds])
        print(f"seed {seed}: trained", file=sys.stderr, flush=True)
        own = [*of_attack, f"attack.shadows={shadows}", f"attack.seed={seed}"]
        return run, amint(folder, ["attack", run["run_id"], "--methods", methods, *own])


def in_turn(recipe: str, overrides: Sequence[str], shadows: int) -> dict[str, float]:
    """Seconds of an attack by shadow models, one after another and side by side."""
    cores = len(os.sched_getaffinity(0))
    walls = {}
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        run = amint(folder, ["train", recipe, *overrides])
        for name, each in (("in_turn", cores), ("side_by_side", 1)):
            own = [f"attack.shadows={shadows}", "attack.compare_plain=false"]
            where = [f"storage.path={name}", f"cluster.cpus_per_worker={each}"]
            started = time.time()
            amint(folder, ["attack", run["run_id"], "--methods", "watson", *own, *where])
            walls[name] = time.time() - started
            print(name, walls[name], file=sys.stderr, flush=True)
    return {**walls, "ratio": walls["in_turn"] / walls["side_by_side"]}


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "–"
    if len(known) == 1:
        return f"{known[0]:.3f}"
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(known))


def _table(documents: Sequence[dict[str, Any]]) -> None:
    print("| method | member: AUC | TPR at 1 % FPR | withheld: AUC | TPR at 1 % FPR | core hours |")
    print("|---|---|---|---|---|---|")
    for name in documents[0]["methods"]:
        rows = [document["methods"][name] for document in documents]
        cells = []
        for question in _QUESTIONS:
            cells.append(_cell([row[question]["auc"]["value"] for row in rows]))
            rates = [row[question]["tpr_at_fpr"].get("0.01", {"value": None}) for row in rows]
            cells.append(_cell([rate["value"] for rate in rates]))
        hours = sum(row["cost"]["core_hours"] + row["cost"]["seconds"] / 3600 for row in rows)
        print(f"| {name} | {' | '.join(cells)} | {hours / len(rows):.2g} |")
    print("\n| this model less λ₂ = 0, all of D against test | AUC | over pairs of shadows |")
    print("|---|---|---|")
    leaks = [document["leak"] for document in documents]
    for name in leaks[0]["pair"]:
        pairs = [leak["pair"].get(name, {}) for leak in leaks]
        own = _cell([pair["difference"]["auc"]["value"] if pair else None for pair in pairs])
        trainings = [(leak["trainings"] or {}).get(name) for leak in leaks]
        means = _cell([None if each is None else each["auc"]["value"] for each in trainings])
        print(f"| {name} | {own} | {means} |")


def main() -> None:
    """Run, and print Markdown tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="digits")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shadows", type=int, default=16)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.in_turn:
        json.dump(in_turn(options.recipe, options.overrides, options.shadows), sys.stdout, indent=1)
        return
    runs, documents = [], []
    for seed in range(options.seeds):
        run, document = attacked(
            options.recipe, options.overrides, seed, options.shadows, options.methods
        )
        print(f"seed {seed}: {document['seconds']['total']:.0f} s", file=sys.stderr, flush=True)
        runs.append(run)
        documents.append(document)
    if options.json:
        json.dump({"runs": runs, "attacks": documents}, sys.stdout, indent=2)
        return
    accuracies = [run["task"]["accuracy"]["value"] for run in runs]
    print(f"task accuracy on test: {_cell(accuracies)}\n")
    _table(documents)


if __name__ == "__main__":
    main()
