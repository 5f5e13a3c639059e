"""Population-based training with trials of several workers, on a cluster of three raylets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from launch.commands import Command, train_workers

from infra.local.stack import LocalStack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEARCH = """
recipe: digits
settings:
  train.epochs: 10
  train.schedule: constant
  data.confounder_check: false
  cluster.workers: 2
space:
  loss.lambda_mint: {loguniform: [0.01, 3.0]}
  train.lr: {loguniform: [1.0e-4, 1.0e-2]}
algorithm: {name: pbt, perturb_every: 5}
scheduler: {name: none}
budget: {trials: 2}
final: {seeds: 0}
"""
GROUPS = """
import json, os, ray
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
groups = ray.util.placement_group_table().values()
print(json.dumps([group["state"] for group in groups if group["state"] != "REMOVED"]))
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack"), workers=2, cpus=2) as running:
        yield running


def placement_groups(stack: LocalStack) -> list[str]:
    """States of those that the cluster still has."""
    environment = {"PATH": "", **stack.environment}
    done = subprocess.run(
        [sys.executable, "-c", GROUPS], env=environment, capture_output=True, text=True, check=True
    )
    states: list[str] = json.loads(done.stdout)
    return states


def test_a_population_that_was_stopped_leaves_nothing_running_and_goes_on(
    stack: LocalStack, tmp_path: Path
) -> None:
    (tmp_path / "population.yaml").write_text(SEARCH)
    arguments = ["tune", "population.yaml", "storage.path=s3://amint/runs"]
    first = Command(tmp_path, arguments, environment=stack.environment)
    # Before anybody has a checkpoint: who is past the exchange takes no part in it.
    first.wait_until(lambda: len(train_workers(stack.folder)) == 4)
    first.interrupt(signal.SIGINT)
    assert first.wait() == 128 + signal.SIGINT
    assert "2 MLflow runs of trials are marked KILLED" in first.stderr
    assert placement_groups(stack) == []
    assert train_workers(stack.folder) == []

    client = mlflow.MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("amint")
    killed = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert [run.info.status for run in killed.values()] == ["KILLED"] * 3

    second = Command(tmp_path, [*arguments, "--json"], environment=stack.environment)
    document = second.document()
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == set(killed)
    assert [run.info.status for run in runs.values()] == ["FINISHED"] * 3
    trials: list[dict[str, Any]] = document["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 2
    rates = [
        [p.value for p in client.get_metric_history(trial["run_id"], "perturbed/train.lr")]
        for trial in trials
    ]
    assert any(len(set(values)) > 1 for values in rates)
    for trial, values in zip(trials, rates, strict=True):
        assert min(values) >= 1e-4
        assert max(values) <= 1e-2
        assert trial["settings"]["train.lr"] == values[-1]
        assert runs[trial["run_id"]].data.params["cluster.workers"] == "2"
    # Nobody began from scratch, whosever weights it took over.
    assert "2 workers go on after epoch" in second.stderr
    assert placement_groups(stack) == []
