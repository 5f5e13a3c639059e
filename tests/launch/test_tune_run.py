"""Whole searches with the real command: stopped, killed, gone on with, and judged."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import mlflow
import pytest
from launch.commands import Command

from amint_ray.config.load import load_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 9
SEARCH = """
recipe: digits
settings:
  train.epochs: 9
  train.checkpoint_every: 1
  data.confounder_check: false
space:
  placement:
    branches:
      entry: {mint.taps: [stages.0, stages.1]}
      output: {mint.taps: [stages.2, stages.3]}
  loss.lambda_mint: {loguniform: [0.01, 3.0]}
constraint: {metric: task.accuracy, most_below_plain: 0.5}
scheduler: {name: asha, grace: 3, reduction: 3}
budget: {trials: 3}
report_every: 3
final: {seeds: 2}
"""


def ended(folder: Path) -> dict[str, dict[str, Any]]:
    """The trials that have ended, as they are on the disk."""
    found = {}
    for file in folder.rglob("trials/*.json"):
        trial = json.loads(file.read_text())
        if trial["state"] in ("done", "stopped", "failed"):
            found[trial["id"]] = trial
    return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    """A search whose driver was killed once trials had ended and others ran, and gone on with."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "small.yaml").write_text(SEARCH)
    first = Command(folder, ["tune", "small.yaml"])
    first.wait_until(lambda: len(ended(folder)) >= 2 and "epoch" in first.stderr)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert first.leftovers() == []
    before = ended(folder)
    second = Command(folder, ["tune", "small.yaml", "--json"])
    return folder, second.document(), (before, second)


def test_what_ended_before_the_driver_was_killed_is_not_repeated(
    searched: tuple[Path, dict[str, Any], Any],
) -> None:
    _, document, (before, second) = searched
    trials = {trial["id"]: trial for trial in document["trials"]}
    assert sorted(trials) == ["plain-0", "t0000", "t0001", "t0002"]
    for name, trial in before.items():
        assert trials[name] == trial
    assert all(trial["tries"] <= 2 for trial in trials.values())
    assert f"{len(before)} trials have ended" in second.stderr
    assert second.leftovers() == []


def test_a_trial_that_was_stopped_early_is_marked_and_the_others_ran_to_their_end(
    searched: tuple[Path, dict[str, Any], Any],
) -> None:
    _, document, _ = searched
    for trial in document["trials"]:
        looks = [entry["epoch"] for entry in trial["history"]]
        assert looks == list(range(3, trial["epoch"] + 1, 3))
        assert (trial["epoch"] == EPOCHS) == (trial["state"] == "done")
    assert document["counts"]["failed"] == 0
    assert document["counts"]["done"] + document["counts"]["stopped"] == 3
    assert document["counts"]["done"] >= 1


def test_mlflow_has_one_run_for_the_search_and_one_for_each_trial(
    searched: tuple[Path, dict[str, Any], Any],
) -> None:
    folder, document, _ = searched
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    parent = client.get_run(document["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["space.loss.lambda_mint.loguniform"] == "[0.01, 3.0]"
    below = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{document['run_id']}'"
    )
    children = {run.info.run_id: run for run in below}
    trials = {trial["run_id"]: trial for trial in document["trials"]}
    assert set(children) == {*trials, *document["final"]["run_ids"]}
    keys = set(client.get_run(document["final"]["run_ids"][0]).data.params)
    for run_id, trial in trials.items():
        run = children[run_id]
        state = {"done": "FINISHED", "stopped": "KILLED"}[trial["state"]]
        assert (run.info.status, run.data.tags["amint.trial_state"]) == (state, trial["state"])
        assert set(run.data.params) == keys
        lambda_mint = trial["settings"]["loss.lambda_mint"]
        assert float(run.data.params["loss.lambda_mint"]) == lambda_mint
        epochs = [p.step for p in client.get_metric_history(run_id, "train/task_loss")]
        assert epochs == sorted(set(epochs))
        told = client.get_metric_history(run_id, "selection.task.accuracy")
        assert {p.step: p.value for p in told} == {
            entry["epoch"]: entry["task.accuracy"] for entry in trial["history"]
        }
    artifacts = {file.path for file in client.list_artifacts(document["run_id"])}
    assert {"trials.json", "trials.csv", "front.json", "winner.yaml", "pareto.png"} <= artifacts
    assert {"parallel_coordinates.png", "importance.png"} <= artifacts
    assert "curves_membership.member.auc.png" in artifacts


def test_the_winner_is_trained_again_with_seeds_no_trial_had_and_one_model_is_registered(
    searched: tuple[Path, dict[str, Any], Any],
) -> None:
    folder, document, _ = searched
    final, best = document["final"], document["best"]
    done = [t for t in document["trials"] if t["state"] == "done" and not t["baseline"]]
    auc = "membership.member.auc"
    assert best["figures"][auc]["value"] == max(t["figures"][auc]["value"] for t in done)
    assert final["seeds"] == [1, 2]
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    values = []
    for run_id in final["run_ids"]:
        run = client.get_run(run_id)
        assert float(run.data.params["loss.lambda_mint"]) == best["settings"]["loss.lambda_mint"]
        values.append(run.data.metrics[auc])
    assert final["figures"][auc]["value"] == pytest.approx(sum(values) / 2)
    told = final["optimism"][auc]
    assert told["difference"] == pytest.approx(told["selection"] - told["final"])
    versions = client.search_model_versions("")
    assert [(v.name, v.run_id) for v in versions] == [("amint-digits", final["run_ids"][0])]
    winner = load_config(document["recipe_file"])
    assert winner.loss.lambda_mint == best["settings"]["loss.lambda_mint"]
    assert list(winner.mint.taps) == best["settings"]["mint.taps"]
    assert (winner.train.seed, winner.evaluation.select_every) == (0, None)
    assert document["next"] == "amint promote amint-digits 1"


def test_what_is_done_is_shown_again_and_another_search_is_refused_its_folder(
    searched: tuple[Path, dict[str, Any], Any],
) -> None:
    folder, document, _ = searched
    again = Command(folder, ["tune", "small.yaml", "--json"])
    assert again.document() == document
    other = Command(folder, ["tune", "small.yaml", "seeds=2"])
    assert other.wait() == 2
    assert "belongs to another search (other seeds)" in other.stderr
    assert len(other.stderr.strip().splitlines()[-1]) < 400


def test_no_trial_looks_at_test(searched: tuple[Path, dict[str, Any], Any]) -> None:
    """Whatever trials left: neither scores nor figures of `test` are among it."""
    folder, document, _ = searched
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = database.execute("select run_uuid, key from metrics").fetchall()
    trials = {trial["run_id"] for trial in document["trials"]}
    keys = {key for run_id, key in rows if run_id in trials}
    assert all(key.startswith(("selection.", "train/", "calibration/")) for key in keys), keys
