"""`amint reproduce`: trains an earlier run again, and tells what came out otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amint_ray.contracts import UserError, Watcher, leaves
from amint_ray.launch.earlier import Earlier, check_overrides, check_same, fetch
from amint_ray.tracking import run_log
from amint_ray.tracking.versions import asking, open_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

_WORKERS = "amint.workers"
_COMMIT, _CLEAN = "mlflow.source.git.commit", "amint.git_clean"


def reproduce(
    run_id: str, overrides: Sequence[str], watcher: Watcher, *, verbose: bool = False
) -> dict[str, Any]:
    """Train a run again from what MLflow keeps of it, as a new run, and compare all metrics.

    Args:
        run_id: MLflow's.
        overrides: where data, storage and cluster are now.
        watcher: is told how far it is, and of other code and packages.
        verbose: let Ray talk.

    Returns:
        `run_id`, `reproduced_run_id`, `model_uri` and `waiting` (as `run_training` has them: MLflow
        may have gone away); `workers` (`old`, `new`); `same_commit`, `same_versions` (None: not
        known) and `same_data`; `commit` (`old`, `new`), `versions` (the same by package, where
        they differ); `metrics`, by name `old`, `new`, `difference`, `interval` (the old one's) and
        `inside_interval`, None where there is none; and `verdict`: `equal` (all metrics, to the
        last bit), `inside` (each figure within the old one's interval) or `outside`.

    Raises:
        UserError: there is no such run, it cannot be reproduced, or the data are others.
        RunError: training failed.
    """
    check_overrides(overrides)
    watcher.phase(f"fetching run {run_id}")
    client = open_mlflow()
    earlier = fetch(client, run_id, overrides)
    if not earlier.config.tracking.enabled:
        raise UserError(
            "tracking.enabled=false: a run is reproduced as another MLflow run; leave it out"
        )
    code = compare_code(earlier, watcher)
    from amint_ray.launch.train_run import Resume, run_training  # torch and timm: seconds

    again = run_training(
        earlier.config,
        watcher,
        resume=Resume(never=True),
        tags={"amint.reproduces": run_id},
        check_data=lambda manifest: check_same(earlier, manifest),
        verbose=verbose,
    )
    new, workers = _outcome(client, again, watcher)
    metrics = compare(earlier.metrics, new)
    return {
        "run_id": run_id,
        "reproduced_run_id": again["run_id"],
        "model_uri": again["model_uri"],
        "waiting": again["waiting"],
        **code,
        "workers": {"old": earlier.tags.get(_WORKERS), "new": workers},
        "same_data": True,
        "metrics": metrics,
        "verdict": verdict(metrics),
    }


def _outcome(
    client: MlflowClient, again: Mapping[str, Any], watcher: Watcher
) -> tuple[Mapping[str, float], str | None]:
    """The new run's metrics and workers; where MLflow has gone away, the figures alone."""
    if again["waiting"] is None:
        try:
            recorded = asking(client.get_run, again["run_id"]).data
            return recorded.metrics, recorded.tags.get(_WORKERS)
        except UserError as error:
            watcher.notice(str(error))
    watcher.notice("MLflow does not give the new run's metrics: its figures alone are compared")
    return leaves(again), str(again["workers"])


def compare_code(earlier: Earlier, watcher: Watcher) -> dict[str, Any]:
    """Whether code and packages are those of the run; says so where they are not."""
    here, tags = run_log.git_commit(), earlier.tags
    commit = {"old": tags.get(_COMMIT), "new": here.get(_COMMIT)}
    same_commit = None if None in commit.values() else commit["old"] == commit["new"]
    if same_commit is None:
        watcher.notice(
            f"code: whether it is the run's cannot be told (its commit {commit['old'] or 'unknown'}"
            f", here {commit['new'] or 'unknown'})"
        )
    elif not same_commit:
        watcher.notice(
            f"code: the run has commit {commit['old']}, here is {commit['new']}; figures may differ"
        )
    if "false" in (tags.get(_CLEAN), here.get(_CLEAN)):
        whose = "the run's" if tags.get(_CLEAN) == "false" else "here"
        watcher.notice(f"code: with changes that are not committed ({whose})")
    if not earlier.config_as_it_was:
        watcher.notice("config: this version of amint_ray has other keys; figures may differ")
    now = run_log.environment()
    before = earlier.environment and earlier.environment.get("packages")
    if not isinstance(before, dict):
        watcher.notice("packages: the run's versions are not known (environment.json)")
        return {"same_commit": same_commit, "same_versions": None, "commit": commit, "versions": {}}
    old = {"python": earlier.environment and earlier.environment.get("python"), **before}
    new = {"python": now["python"], **now["packages"]}
    versions = {
        name: {"old": old.get(name), "new": new.get(name)}
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }
    if versions:
        told = ", ".join(f"{name} {v['old']} (here {v['new']})" for name, v in versions.items())
        watcher.notice(f"packages: the run has {told}; figures may differ")
    return {
        "same_commit": same_commit,
        "same_versions": not versions,
        "commit": commit,
        "versions": versions,
    }


def compare(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Every metric of two runs that does not tell how fast they were.

    A metric's own `.low` and `.high` are its interval.
    """
    names = sorted(name for name in {*old, *new} if not _is_pace(name))
    ends = {f"{name}{end}" for name in names for end in (".low", ".high")}
    return {name: _compared(name, old, new) for name in names if name not in ends}


def _is_pace(name: str) -> bool:
    return name.startswith("system/") or name.endswith("seconds") or "per_second" in name


def _compared(name: str, old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, Any]:
    before, now = old.get(name), new.get(name)
    low, high = old.get(f"{name}.low"), old.get(f"{name}.high")
    both_nan = before is not None and now is not None and math.isnan(before) and math.isnan(now)
    difference = None if before is None or now is None else 0.0 if both_nan else now - before
    inside = None
    if low is not None and high is not None:
        inside = now is not None and (difference == 0 or low <= now <= high)
    return {
        "old": before,
        "new": now,
        "difference": difference,
        "interval": None if low is None or high is None else [low, high],
        "inside_interval": inside,
    }


def verdict(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """`equal`, `inside` or `outside`, of all metrics that the old run has."""
    had = [metric for metric in metrics.values() if metric["old"] is not None]
    if all(metric["difference"] == 0 for metric in had):
        return "equal"
    return "outside" if any(m["inside_interval"] is False for m in had) else "inside"
