"""What early stopping saves a search, what a search costs beside its trials, and what it finds.

    python -m benchmarks.search [--seeds 5] [--first 0] [--trials 12] [--cifar10 FOLDER]
        [--no-alone] [--json]
    python -m benchmarks.search --winner [--cifar10 FOLDER]

Without `--winner`: for each seed the same random configurations are searched with ASHA and without
(seed s sets what is drawn, the split and the training; `--first` is the first of them), and of the
first seed's trials each is trained alone by `amint train` (not with `--no-alone`). With it: one
search by TPE, whose winner is trained again with three seeds beside the recipe as it is. With
`--cifar10` on a tenth of CIFAR-10 (ResNet-18), else digits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import amint_train

_SETTINGS = {
    "digits": ["train.epochs=27", "data.confounder_check=false"],
    "cifar10_resnet50": [
        *("model.backbone=resnet18", "data.limit=5000", "data.confounder_check=false"),
        *("train.epochs=9", "train.lr=1e-3", "train.schedule=cosine", "mint.head=mlp"),
        *("mint.pool=4", "cluster.workers=1"),
    ],
}
_SEARCH = """
recipe: {recipe}
space:
  placement:
    branches:
      entry: {{mint.taps: entry}}
      middle: {{mint.taps: middle}}
      output: {{mint.taps: output}}
  loss.lambda_mint: {{loguniform: [0.01, 10]}}
scheduler: {{name: asha, grace: {grace}, reduction: 3}}
report_every: {grace}
"""
_SHARES = "data.shares={member: .16, withheld: .04, external: .14, calibration: .26, test: .40}"


def amint_tune(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One `amint tune … --json` in an empty folder of its own.

    Returns:
        Its document, with `wall`, the command's seconds, and `first_step`, those until its first
        trial had begun to train.
    """
    grace = 3 if recipe == "digits" else 1
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        file = Path(folder) / "search.yaml"
        file.write_text(_SEARCH.format(recipe=recipe, grace=grace))
        elsewhere = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-m", "amint_ray.cli", "tune", file.name, *overrides, "--json"],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k not in elsewhere},
            capture_output=True,
            text=True,
            check=False,
        )
        wall = time.time() - started
        if done.returncode != 0:
            raise RuntimeError(f"amint tune {' '.join(overrides)} failed:\n{done.stderr}")
        document: dict[str, Any] = json.loads(done.stdout)
        document["wall"] = wall
        document["first_step"] = _first_step(Path(folder), document) - started
    return document


def _first_step(folder: Path, document: dict[str, Any]) -> float:
    """When the first trial began to train: its first look, less the time between two looks."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    times = []
    for trial in document["trials"]:
        told = client.get_metric_history(trial["run_id"], "train/task_loss")
        began = [point.timestamp / 1000 for point in told]
        # Looks are told of as they come: the first one by as much later as they are apart.
        times.append(float(began[0] - (began[1] - began[0] if len(began) > 1 else 0)))
    return min(times)


def _epochs(document: dict[str, Any]) -> int:
    return sum(trial["epoch"] for trial in document["trials"])


def compare(
    recipe: str, common: Sequence[str], *, seeds: range, trials: int, alone: bool
) -> dict[str, Any]:
    """The same configurations with ASHA and without, by seed; and those of the first seed alone."""
    rows, by_itself = [], None
    for seed in seeds:
        of_seed = [
            *common,
            *(f"algorithm.seed={seed}", "algorithm.name=random", f"budget.trials={trials}"),
            *(f"train.seed={seed}", f"data.split_seed={seed}", "final.seeds=0"),
        ]
        row = {}
        for name in ("asha", "none"):
            print(f"{recipe}, seed {seed}, scheduler {name}", file=sys.stderr, flush=True)
            row[name] = amint_tune(recipe, [*of_seed, f"scheduler.name={name}"])
        whole, cut = row["none"], row["asha"]
        rows.append(
            {
                "seed": seed,
                "epochs": {"asha": _epochs(cut), "none": _epochs(whole)},
                "trial_seconds": {
                    "asha": cut["seconds"]["trials"],
                    "none": whole["seconds"]["trials"],
                },
                "wall": {"asha": cut["wall"], "none": whole["wall"]},
                "first_step": {"asha": cut["first_step"], "none": whole["first_step"]},
                "same_winner": cut["best"]["parameters"] == whole["best"]["parameters"],
                "winner": {
                    name: row[name]["best"]["figures"]["membership.member.auc"] for name in row
                },
            }
        )
        if seed == seeds[0] and alone:
            by_itself = trained_alone(recipe, [o for o in of_seed if _of_configuration(o)], whole)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"rows": rows, "alone": by_itself}


def _of_configuration(override: str) -> bool:
    return override.partition(".")[0] in ("train", "data", "model", "mint", "cluster")


def trained_alone(recipe: str, overrides: Sequence[str], search: dict[str, Any]) -> dict[str, Any]:
    """The seconds of each trial's configuration, trained by a command of its own, one by one."""
    walls, inside = [], []
    for trial in search["trials"]:
        print(f"{recipe}, {trial['id']} alone", file=sys.stderr, flush=True)
        own = [f"{key}={json.dumps(value)}" for key, value in trial["settings"].items()]
        started = time.time()
        seconds = amint_train([recipe, *overrides, *own, "cluster.workers=1"])["seconds"]
        walls.append(time.time() - started)
        inside.append(seconds["workers"] + seconds["train"])
    return {"wall": sum(walls), "workers_and_training": sum(inside), "search": search["wall"]}


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--cifar10", metavar="FOLDER")
    parser.add_argument("--no-alone", action="store_true")
    parser.add_argument("--winner", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    recipe = "digits" if options.cifar10 is None else "cifar10_resnet50"
    common = [*_SETTINGS[recipe]]
    common += [_SHARES] if options.cifar10 is None else [f"data.path={options.cifar10}"]
    if options.winner:
        asked = ["constraint={metric: task.accuracy, most_below_plain: 0.02}", "final.default=true"]
        found = amint_tune(recipe, [*common, *asked, f"budget.trials={options.trials}"])
        json.dump({key: found[key] for key in ("best", "baseline", "final")}, sys.stdout, indent=1)
        return
    seeds = range(options.first, options.first + options.seeds)
    found = compare(recipe, common, seeds=seeds, trials=options.trials, alone=not options.no_alone)
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        return
    print(
        "| seed | epochs, ASHA | epochs, all | ratio | wall, ASHA, s | wall, all, s | same winner |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        cut, whole = row["epochs"]["asha"], row["epochs"]["none"]
        walls = " | ".join(f"{row['wall'][name]:.0f}" for name in ("asha", "none"))
        same = "yes" if row["same_winner"] else "no"
        print(f"| {row['seed']} | {cut} | {whole} | {cut / whole:.2f} | {walls} | {same} |")
    first = [row["first_step"][name] for row in found["rows"] for name in ("asha", "none")]
    print(f"\nfirst step of the first trial: median {statistics.median(first):.0f} s")
    if (alone := found["alone"]) is None:
        return
    print(
        f"trials alone, one by one: {alone['wall']:.0f} s, of which workers and training "
        f"{alone['workers_and_training']:.0f} s; the search, two at a time: {alone['search']:.0f} s"
    )


if __name__ == "__main__":
    main()
