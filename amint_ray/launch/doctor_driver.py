"""What `amint doctor` checks once, where the run's driver would be."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, first_line
from amint_ray.launch.doctor_node import Check, Wrong
from amint_ray.launch.no_secrets import secrets_in_runtime_env
from amint_ray.storage import writable_folder
from amint_ray.tracking.run_log import check_tracking, tracking_uri, without_password

_LARGEST_UPLOAD = 100 * 2**20
"""Bytes of a package that Ray's dashboard takes."""
_NEVER_UPLOADED = {".git", ".venv", "venv", "__pycache__"}
_RUNTIME_ENV_VARIABLES = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV")


def checks_of_driver(
    config: Config, runtime_env: Mapping[str, Any] | None, seconds: float
) -> dict[str, Check]:
    """The checks.

    Args:
        config: what a run would have.
        runtime_env: what a job would have; None: what this process has got, if anything.
        seconds: that a check may take.
    """
    environment = _own_runtime_env() if runtime_env is None else dict(runtime_env)
    checks: dict[str, Check] = {
        "tracking": lambda: _record_and_delete(config.tracking.experiment, seconds),
        "working directory": lambda: _upload_size(environment),
        "secrets": lambda: _no_secrets_in(environment),
    }
    if not config.storage.path.startswith("s3:"):
        checks["storage"] = lambda: _local_storage(config.storage.path)
    return checks


def _local_storage(path: str) -> str:
    try:
        folder = writable_folder(path, "storage.path")
    except UserError as error:
        raise Wrong(str(error)) from None
    return f"{folder} can be written; workers on other machines must see it, too, or use s3://"


def _record_and_delete(experiment: str, seconds: float) -> str:
    """A run in MLflow, which is deleted at once."""
    uri = tracking_uri()
    try:
        check_tracking(uri)
    except UserError as error:
        raise Wrong(str(error)) from None
    shown = without_password(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"{shown}: the first run will make it (MLFLOW_TRACKING_URI names a server)"
    # A server that fails is asked again for half a minute otherwise.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, int(seconds / 2))))
    import mlflow

    client = mlflow.MlflowClient(uri)
    made = None
    try:
        known = client.get_experiment_by_name(experiment) or client.get_experiment_by_name(
            "Default"
        )
        where = None if known is None or known.lifecycle_stage != "active" else known.experiment_id
        if where is None:
            where = made = client.create_experiment(f"amint-doctor-{uuid.uuid4().hex}")
        run = client.create_run(where, run_name="amint-doctor")
        client.set_terminated(run.info.run_id)
        client.delete_run(run.info.run_id)
    except Exception as error:  # MLflow's own, SQLAlchemy's, the network's
        raise Wrong(f"MLflow at {shown} takes no run: {first_line(error)}") from None
    finally:
        if made is not None:
            with contextlib.suppress(Exception):
                client.delete_experiment(made)
    return f"{shown}: a run was made and deleted"


def _own_runtime_env() -> dict[str, Any]:
    """The runtime environment that this process has got from Ray or its user."""
    for name in _RUNTIME_ENV_VARIABLES:
        with contextlib.suppress(ValueError, AttributeError):
            document = json.loads(os.environ.get(name) or "{}")
            environment = document.get("runtime_env", document)
            if isinstance(environment, dict) and environment:
                return environment
    return {}


def _no_secrets_in(environment: Mapping[str, Any]) -> str:
    found = secrets_in_runtime_env(environment)
    if not found:
        return "none in the runtime environment"
    raise Wrong(
        f"in the runtime environment: {', '.join(found)}: Ray shows it in its dashboard and logs; "
        "give it to the nodes instead (a Secret of the RayCluster, the raylets' environment)"
    )


def _upload_size(environment: Mapping[str, Any]) -> str:
    """What a job would upload of a folder of this machine."""
    given = environment.get("working_dir")
    if isinstance(given, str) and "://" in given:
        return "the runtime environment's is fetched from an address"
    folder = Path(str(given)) if given else Path.cwd()
    if not folder.exists():
        raise Wrong(f"working_dir = {str(given)!r}: is not there")
    size = 0
    for file in _uploaded(folder, environment.get("excludes") or []):
        size += file.lstat().st_size
        if size > _LARGEST_UPLOAD:
            break
    limit = f"{_LARGEST_UPLOAD / 2**20:.0f} MiB, which is the most that Ray uploads"
    if size <= _LARGEST_UPLOAD:
        said = "working_dir has" if given else "nothing is uploaded; this folder would be"
        return f"{said} {size / 2**20:.1f} MiB"
    if given:
        raise Wrong(f"working_dir has more than {limit}: exclude files, or install the package")
    return f"nothing is uploaded; --working-dir=. would be refused: it has more than {limit}"


def _uploaded(folder: Path, excludes: list[str]) -> Iterator[Path]:
    """Files that Ray would take: not what git ignores, nor what is excluded."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "-z", "-co", "--exclude-standard"],
            capture_output=True,
            check=True,
        ).stdout
        names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):  # no git, or not one of its folders
        names = []
        for top, below, files in os.walk(folder):
            below[:] = [name for name in below if name not in _NEVER_UPLOADED]
            names += [str((Path(top) / name).relative_to(folder)) for name in files]
    patterns = [pattern.strip("/") for pattern in excludes]
    for name in names:
        path = Path(name)
        above = [path, *path.parents][:-1]
        if any(fnmatch(str(part), pattern) for part in above for pattern in patterns):
            continue
        if (folder / path).is_file():
            yield folder / path
