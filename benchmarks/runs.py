"""Running `amint train` as a user would, and summing its documents up."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats


def amint_train(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    program: str = "import sys; from amint_ray.cli import main; sys.exit(main())",
) -> dict[str, Any]:
    """One `amint train … --json` in an empty folder of its own; gives its document.

    Args:
        arguments: recipe and overrides.
        environment: variables to add.
        program: what to run; by default the command's entry point.
    """
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        elsewhere = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        clean = {k: v for k, v in os.environ.items() if k not in elsewhere}
        done = subprocess.run(
            [sys.executable, "-c", program, "train", *arguments, "--json"],
            cwd=folder,
            env={**clean, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"amint train {' '.join(arguments)} failed:\n{done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and its Student interval over runs with different seeds."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n)
    return mean, mean - half, mean + half
