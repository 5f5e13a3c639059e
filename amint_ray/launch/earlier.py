"""What MLflow keeps of an earlier run: enough to train it again, or to find its images again."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amint_ray.config.load import (
    ELSEWHERE,
    HARMLESS,
    did_you_mean,
    fingerprint,
    is_key,
    load_config,
    nearest_key,
)
from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, first_line
from amint_ray.data.roles import Manifest
from amint_ray.tracking import run_log
from amint_ray.tracking.registry import run_of_model
from amint_ray.tracking.versions import asking

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAY_DIFFER = tuple(key for key in HARMLESS if key != "evaluation")
"""Keys that may be given anew beside the sections `ELSEWHERE`: they touch neither the weights nor
how they are measured."""
_FIGURE = "task.accuracy"
"""Which every run has that came to its end."""


@dataclass(frozen=True)
class Earlier:
    """What MLflow keeps of a finished run.

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


def check_overrides(
    overrides: Sequence[str], *, purpose: str = "reproduced", also: Sequence[str] = ()
) -> None:
    """Whether what is given anew leaves the run what it is.

    Args:
        overrides: `key.path=value` each.
        purpose: what is to be done with the run, as a participle.
        also: further sections that may be given anew for that.

    Raises:
        UserError: there is no such key, or it shapes the weights or the figures.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    sections = [*also, *ELSEWHERE]
    for key in keys:
        if key and not is_key(key):
            section = key.partition(".")[0]
            near = "" if is_key(section) else did_you_mean(section, sections)
            near = near or nearest_key(key)
            raise UserError(f"{key}: unknown key{near}; {_allowed(purpose, sections)}")
    refused = [
        key for key in keys if key not in MAY_DIFFER and key.partition(".")[0] not in sections
    ]
    if refused:
        raise UserError(f"{', '.join(refused)}: {_allowed(purpose, sections)}")


def _allowed(purpose: str, sections: Sequence[str]) -> str:
    keys = [*MAY_DIFFER, *(f"{section}.*" for section in sections)]
    return f"a run is {purpose} with its own settings; given anew may be {', '.join(keys)}"


def run_of(client: MlflowClient, uri: str) -> str:
    """Id of the run that trained a model, or that is meant.

    Raises:
        UserError: there is no such model.
    """
    return uri if re.fullmatch(r"[0-9a-f]{32}", uri) else run_of_model(client, uri)


def fetch(
    client: MlflowClient, run_id: str, overrides: Sequence[str], *, purpose: str = "reproduced"
) -> Earlier:
    """Everything that MLflow keeps of a run and that is needed to train it again.

    Args:
        client: of the MLflow that has it.
        run_id: MLflow's.
        overrides: where data, storage and cluster are now.
        purpose: what is to be done with the run, as a participle.

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
        raise UserError(
            f"run {run_id} is none of amint_ray's: it has no amint.config_fingerprint; give a run "
            "or model that `amint train` made (`amint models` lists them)"
        )
    if run.info.status != "FINISHED" or _FIGURE not in metrics:
        raise UserError(
            f"run {run_id} is {run.info.status} and has "
            f"{'figures' if _FIGURE in metrics else 'no figures to compare with'}; only a finished "
            f"run can be {purpose}: let `amint train` bring it to its end, or give another run"
        )
    with tempfile.TemporaryDirectory(prefix="amint-earlier-") as name:
        found = _download(client, run_id, Path(name))
        config, original = _read_config(run_id, found.get("config.yaml"), overrides, purpose)
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


def _read_config(
    run_id: str, file: Path | None, overrides: Sequence[str], purpose: str
) -> tuple[Config, Config]:
    """The configuration with what is given anew, and without."""
    if file is None:
        raise UserError(
            f"run {run_id}: its artifact config.yaml is missing; it cannot be {purpose} without: "
            "bring the artifact back, or give another run or model"
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
