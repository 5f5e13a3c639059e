"""`amint reproduce`: trains an earlier run again, and tells what came out otherwise."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amint_ray.config.load import ELSEWHERE, HARMLESS, fingerprint, load_config
from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, Watcher, first_line, leaves
from amint_ray.data.roles import Manifest
from amint_ray.tracking import run_log
from amint_ray.tracking.versions import asking, open_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAY_DIFFER = tuple(key for key in HARMLESS if key != "evaluation")
"""Keys that may be given anew beside the sections `ELSEWHERE`: they touch neither the weights nor
how they are measured."""
_FIGURE = "task.accuracy"
"""Which every run has that came to its end."""
_WORKERS = "amint.workers"
_COMMIT, _CLEAN = "mlflow.source.git.commit", "amint.git_clean"


@dataclass(frozen=True)
class Earlier:
    """What MLflow keeps of the run that is to be reproduced.

    Attributes:
        run_id: its id.
        config: its whole configuration, with what was given anew.
        config_as_it_was: whether this version still reads the same from it; later ones may have
            more keys.
        fingerprint: of its images and their roles.
        manifest: these, where the artifact is there.
        tags: of the run.
        environment: what `run_log.environment` said, where the artifact is there.
        metrics: the last value of each.
    """

    run_id: str
    config: Config
    config_as_it_was: bool
    fingerprint: str
    manifest: Manifest | None
    tags: Mapping[str, str]
    environment: Mapping[str, Any] | None
    metrics: Mapping[str, float]


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


def check_overrides(overrides: Sequence[str]) -> None:
    """Whether what is given anew leaves the run what it is.

    Raises:
        UserError: a key shapes the weights or the figures.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    refused = [
        key for key in keys if key not in MAY_DIFFER and key.partition(".")[0] not in ELSEWHERE
    ]
    if refused:
        allowed = [*MAY_DIFFER, *(f"{section}.*" for section in ELSEWHERE)]
        raise UserError(
            f"{', '.join(refused)}: a run is reproduced with its own settings; given anew may be "
            f"{', '.join(allowed)}"
        )


def fetch(client: MlflowClient, run_id: str, overrides: Sequence[str]) -> Earlier:
    """Everything that MLflow keeps of a run and that is needed to train it again.

    Raises:
        UserError: there is no such run, it is none of ours or has no figures, or what is needed is
            missing.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(f"run {run_id}: MLflow cannot read it: {first_line(error)}") from error
        where = run_log.without_password(run_log.tracking_uri())
        raise UserError(
            f"there is no run {run_id!r} in {where}; give MLflow's id of a run, which `amint "
            "train` and `amint models` print"
        ) from error
    except Exception as error:  # SQLAlchemy's, the network's
        raise UserError(f"run {run_id}: MLflow cannot read it: {first_line(error)}") from error
    tags, metrics = run.data.tags, run.data.metrics
    if run.info.lifecycle_stage != "active":
        raise UserError(
            f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` brings it back"
        )
    if "amint.config_fingerprint" not in tags:
        raise UserError(f"run {run_id} is none of amint_ray's: it has no amint.config_fingerprint")
    if run.info.status != "FINISHED" or _FIGURE not in metrics:
        raise UserError(
            f"run {run_id} is {run.info.status} and has "
            f"{'figures' if _FIGURE in metrics else 'no figures to compare with'}; only a finished "
            "run can be reproduced"
        )
    with tempfile.TemporaryDirectory(prefix="amint-reproduce-") as name:
        found = _download(client, run_id, Path(name))
        config, original = _read_config(run_id, found.get("config.yaml"), overrides)
        manifest = _read_manifest(run_id, found.get("manifest.parquet"), tags)
        environment = _read_json(found.get("environment.json"))
    known = manifest.fingerprint if manifest else tags.get("amint.manifest_fingerprint")
    if known is None:
        raise UserError(
            f"run {run_id}: neither manifest.parquet nor the tag amint.manifest_fingerprint is "
            "there, so that nobody can tell whether the data are the same"
        )
    return Earlier(
        run_id=run_id,
        config=config,
        config_as_it_was=fingerprint(original) == tags["amint.config_fingerprint"],
        fingerprint=known,
        manifest=manifest,
        tags=tags,
        environment=environment,
        metrics=metrics,
    )


def _download(client: MlflowClient, run_id: str, folder: Path) -> dict[str, Path]:
    """Those of the needed artifacts that are there."""
    needed = {"config.yaml", "manifest.parquet", "environment.json"}
    there = {file.path for file in asking(client.list_artifacts, run_id)}
    return {
        name: Path(asking(client.download_artifacts, run_id, name, str(folder)))
        for name in sorted(needed & there)
    }


def _read_config(run_id: str, file: Path | None, overrides: Sequence[str]) -> tuple[Config, Config]:
    """The configuration with what is given anew, and without."""
    if file is None:
        raise UserError(
            f"run {run_id}: its artifact config.yaml is missing; it cannot be reproduced without"
        )
    try:
        original = load_config(str(file))
    except UserError as error:
        raise UserError(
            f"run {run_id}: its config.yaml is none that this version of amint_ray takes: "
            f"{first_line(error).replace(str(file), file.name)}"
        ) from error
    # It is no part of the search that the run may have been a part of.
    return load_config(str(file), ["tracking.parent_run=null", *overrides]), original


def _read_manifest(run_id: str, file: Path | None, tags: Mapping[str, str]) -> Manifest | None:
    if file is None:
        return None
    try:
        manifest = Manifest.read(file)
    except Exception as error:  # Arrow's, for whatever a damaged file leads to
        reason = first_line(error).replace(str(file), file.name)
        raise UserError(f"run {run_id}: its manifest cannot be used: {reason}") from error
    told = tags.get("amint.manifest_fingerprint", manifest.fingerprint)
    if told != manifest.fingerprint:
        raise UserError(
            f"run {run_id}: manifest.parquet is not the one that the run was trained by "
            f"({manifest.fingerprint[:12]}, its tag says {told[:12]})"
        )
    return manifest


def _read_json(file: Path | None) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text()) if file else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


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


def check_same(earlier: Earlier, manifest: Manifest) -> None:
    """Whether images and roles are those of the run.

    Raises:
        UserError: they are not; the text says how many differ, where that is known.
    """
    if manifest.fingerprint == earlier.fingerprint:
        return
    what = "their names are not known (manifest.parquet is missing)"
    if earlier.manifest is not None:
        what = differences(earlier.manifest, manifest)
    raise UserError(
        f"data: not what run {earlier.run_id} was trained on: {what} (manifest "
        f"{earlier.fingerprint[:12]}, now {manifest.fingerprint[:12]}); bring the images back, or "
        "say where they are with data.path=…"
    )


def differences(old: Manifest, new: Manifest) -> str:
    """How many samples differ between two manifests, in words."""
    before, now = _by_id(old), _by_id(new)
    missing, added = before.keys() - now.keys(), now.keys() - before.keys()
    if missing and Counter(before.values()) == Counter(now.values()):
        return f"{len(missing):,} of {len(before):,} samples have other names"
    told = {
        f"of {len(before):,} samples are missing": len(missing),
        "are new": len(added),
    }
    for i, what in enumerate(("content", "label", "role")):
        told[f"have another {what}"] = sum(
            1 for key in before.keys() & now.keys() if before[key][i] != now[key][i]
        )
    return ", ".join(f"{count:,} {what}" for what, count in told.items() if count)


def _by_id(manifest: Manifest) -> dict[str, tuple[str, int, str]]:
    columns = (manifest.content, manifest.label, manifest.role)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return dict(zip(manifest.sample_id.tolist(), rows, strict=True))


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
