"""Where the seconds of `amint train digits` go, and what each measure against waiting is worth.

    python -m benchmarks.startup [--runs 3] [--json]

Every way is run in turn, so that a machine whose speed drifts hurts all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from typing import Any

from benchmarks.runs import amint_train

_RAY_DEFAULTS = """
import os, sys
import amint_ray.launch.cluster as cluster
cluster._OWN_CLUSTER.clear()
from amint_ray.cli import main
sys.exit(main())
"""


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        from_source = {"PYTHONPYCACHEPREFIX": empty, "PYTHONDONTWRITEBYTECODE": "1"}
        ways: dict[str, dict[str, Any]] = {
            "amint train digits": {},
            "without byte-compiled packages": {"environment": from_source},
            "with Ray's default settings": {"program": _RAY_DEFAULTS},
            "one worker": {"overrides": ["cluster.workers=1"]},
        }
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for run in range(options.runs):
            for name, way in ways.items():
                print(f"run {run + 1}, {name}", file=sys.stderr)
                arguments = ["digits", *way.get("overrides", [])]
                rest = {key: value for key, value in way.items() if key != "overrides"}
                seconds[name].append(amint_train(arguments, **rest)["seconds"])
    if options.json:
        json.dump(seconds, sys.stdout, indent=2)
        return
    phases = list(next(iter(seconds.values()))[0])
    print(f"| seconds, median of {options.runs} | {' | '.join(phases)} | ratio |")
    print("|---|" + "---|" * (len(phases) + 1))
    base = statistics.median(run["total"] for run in seconds["amint train digits"])
    for name, runs in seconds.items():
        medians = {phase: statistics.median(run[phase] for run in runs) for phase in phases}
        cells = " | ".join(f"{medians[phase]:.1f}" for phase in phases)
        print(f"| {name} | {cells} | {medians['total'] / base:.2f} |")


if __name__ == "__main__":
    main()
