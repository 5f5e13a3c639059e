"""What a SIGKILL costs: a run whose workers are killed at random moments, and an undisturbed one.

    python -m benchmarks.kills [--kills 20] [--seed 0] [--quick] [--json]

Both train `digits` with two workers and a checkpoint each epoch. A kill waits until the run has
ended an epoch since the one before, and then up to five seconds more, drawn from the seed; it hits
one of the two workers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

_MOST_SECONDS_MORE = 5.0
_EPOCHS_A_KILL = 12


def _workers(mark: str) -> list[psutil.Process]:
    """The training processes that carry the mark."""
    found = []
    for process in psutil.process_iter():
        with_mark = False
        try:
            with_mark = process.environ().get("AMINT_BENCHMARK_MARK") == mark
            if with_mark and "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _run(folder: Path, epochs: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """One run; gives its seconds and weights, and what happened."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "amint_ray.cli", "train", "digits", f"train.epochs={epochs}"]
    settings = ["train.checkpoint_every=1", "cluster.workers=2", "cluster.max_failures=-1"]
    clean = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    out, err = folder / "out", folder / "err"
    started = time.monotonic()
    with out.open("w") as stdout, err.open("w") as stderr:
        run = subprocess.Popen(
            [*command, *settings, "data.confounder_check=false", "--json"],
            cwd=folder,
            env={**clean, "AMINT_BENCHMARK_MARK": mark},
            stdout=stdout,
            stderr=stderr,
        )
    done, epochs_of_kills = 0, []

    def lines() -> int:
        return len(re.findall(r"^amint: epoch ", err.read_text(), re.MULTILINE))

    try:
        seen = 0
        while run.poll() is None:
            if done < kills and lines() > seen:
                time.sleep(draw.uniform(0, _MOST_SECONDS_MORE))
                workers = _workers(mark)
                if run.poll() is None and workers:
                    draw.choice(workers).kill()
                    done, seen = done + 1, lines()
                    epochs_of_kills.append(re.findall(r"epoch (\d+)", err.read_text())[-1])
                    print(f"kill {done} behind epoch {epochs_of_kills[-1]}", file=sys.stderr)
            time.sleep(0.1)
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()
    if run.returncode != 0:
        raise RuntimeError(f"the run did not survive:\n{err.read_text()}")
    last = max(folder.rglob("checkpoint_*/scores.parquet"), key=lambda path: path.parent.name)
    return {
        "seconds": time.monotonic() - started,
        "kills": done,
        "behind_epochs": epochs_of_kills,
        "weights": last.with_name("model.safetensors").read_bytes(),
    }


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="see whether it runs: one kill")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kills = 1 if options.quick else options.kills
    draw = random.Random(options.seed)
    runs = []
    for number in (0, kills):
        with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
            runs.append(_run(Path(folder), _EPOCHS_A_KILL * kills, number, draw))
    undisturbed, killed = runs
    lost = killed["seconds"] - undisturbed["seconds"]
    found = {
        "epochs": _EPOCHS_A_KILL * kills,
        "kills": killed["kills"],
        "seconds_undisturbed": undisturbed["seconds"],
        "seconds_killed": killed["seconds"],
        "seconds_lost_a_kill": lost / max(killed["kills"], 1),
        "same_weights": killed["weights"] == undisturbed["weights"],
        "behind_epochs": killed["behind_epochs"],
    }
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        return
    print("| figure | value |\n|---|---|")
    for name, value in found.items():
        shown = f"{value:.1f}" if isinstance(value, float) else value
        print(f"| {name.replace('_', ' ')} | {shown} |")


if __name__ == "__main__":
    main()
