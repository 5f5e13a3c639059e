"""What a SIGKILL costs: a run whose workers are killed at random moments, and an undisturbed one.

    python -m benchmarks.kills [--kills 20] [--seed 0] [--quick] [--json]

Both train `digits` with two workers and a checkpoint each epoch. A kill waits for a new checkpoint
since the one before, and then up to three seconds more, drawn from the seed; it hits one of the two
workers. Exit code 1 where not all kills were survived, or the weights differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

_MOST_SECONDS_MORE = 3.0
_EPOCHS_A_KILL = 20


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
    behind_epochs: list[int] = []

    def newest() -> tuple[str, int]:
        """Name and epoch of the newest checkpoint; names are dates."""
        for file in sorted(folder.rglob("checkpoint_*/state.json"), reverse=True):
            with contextlib.suppress(
                FileNotFoundError, json.JSONDecodeError
            ):  # it is being written
                return file.parent.name, json.loads(file.read_text())["epoch"]
        return "", 0

    try:
        seen = ""
        while run.poll() is None:
            if len(behind_epochs) < kills and newest()[0] > seen:
                time.sleep(draw.uniform(0, _MOST_SECONDS_MORE))
                workers = _workers(mark)
                if run.poll() is None and workers:
                    draw.choice(workers).kill()
                    seen, epoch = newest()
                    behind_epochs.append(epoch)
                    print(f"kill {len(behind_epochs)} behind epoch {epoch}", file=sys.stderr)
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
        "kills": len(behind_epochs),
        "behind_epochs": behind_epochs,
        "weights": last.with_name("model.safetensors").read_bytes(),
    }


def main() -> int:
    """Run, and print a Markdown table or JSON; gives the exit code."""
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
        print(json.dumps(found, indent=2))
    else:
        print("| figure | value |\n|---|---|")
        for name, value in found.items():
            shown = f"{value:.1f}" if isinstance(value, float) else value
            print(f"| {name.replace('_', ' ')} | {shown} |")
    return 0 if found["kills"] == kills and found["same_weights"] else 1


if __name__ == "__main__":
    sys.exit(main())
