"""What recording a run costs it: digits with an MLflow server against `tracking.enabled=false`.

    python -m benchmarks.tracking_overhead [--repeats 5] [--epochs 150] [--quick] [--json]

The server is that of the local stack (PostgreSQL, artifacts to S3), on the same cores as the
training. A point for every step and the machine's figures every ten seconds are recorded, as by
default. Both ways are run in turn. An epoch's time is the loop's seconds over its epochs; `log` is
what comes after training: figures, pictures, the model and its registration.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from typing import Any

from benchmarks.runs import amint_train
from infra.local.stack import LocalStack

WAYS = {"recorded": "true", "not recorded": "false"}


def measure(repeats: int, epochs: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each run, by way."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory(prefix="amint-stack-") as folder,
        LocalStack(folder, ray=False) as stack,
    ):
        for repeat in range(repeats):
            # Whoever is second finds warmer caches.
            order = list(WAYS) if repeat % 2 == 0 else list(reversed(WAYS))
            for way in order:
                print(f"repeat {repeat + 1}: {way}", file=sys.stderr)
                document = amint_train(
                    [
                        *("digits", f"train.epochs={epochs}", f"tracking.enabled={WAYS[way]}"),
                        *("cluster.workers=1", "data.confounder_check=false"),
                    ],
                    environment=dict(stack.environment),
                )
                seconds = document["seconds"]
                found[way].append(
                    {"epoch": seconds["train"] / epochs, "log": seconds["log"]}
                    | {"total": seconds["total"]}
                )
    return found


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the ratio of each repeat."""
    recorded, plain = (found[way] for way in WAYS)
    ratios = [a["epoch"] / b["epoch"] for a, b in zip(recorded, plain, strict=True)]
    return {
        "epoch_ratio": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        },
        "seconds": {
            way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for way, runs in found.items()
        },
    }


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--quick", action="store_true", help="see whether it runs; no figures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    repeats, epochs = (1, 5) if options.quick else (options.repeats, options.epochs)
    found = measure(repeats, epochs)
    told = summary(found)
    if options.json:
        json.dump({"runs": found, **told}, sys.stdout, indent=2)
        return
    print("| seconds, median | an epoch | log | total |")
    print("|---|---|---|---|")
    for way, of in told["seconds"].items():
        print(f"| {way} | {of['epoch']:.4f} | {of['log']:.2f} | {of['total']:.1f} |")
    ratio = told["epoch_ratio"]
    print(
        f"\nepoch time, recorded over not: {ratio['median']:.3f} "
        f"({ratio['least']:.3f} to {ratio['most']:.3f})"
    )


if __name__ == "__main__":
    main()
