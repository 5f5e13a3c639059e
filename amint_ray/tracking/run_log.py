"""One MLflow run: where it is kept, what it is told."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

import amint_ray
from amint_ray.config.load import fingerprint, to_yaml
from amint_ray.config.schema import Config
from amint_ray.contracts import UserError, first_line
from amint_ray.storage import writable_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PACKAGES = ("amint-ray", "ray", "torch", "torchvision", "timm", "mlflow", "numpy", "pyarrow")
_LONGEST_PARAM = 6000
_SECONDS_TO_ANSWER = 5.0
_OTHER_STORES = ("postgresql", "mysql", "mssql", "databricks")

Status = Literal["FINISHED", "FAILED", "KILLED"]


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the working directory."""
    return from_environment() or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def from_environment() -> str | None:
    """MLFLOW_TRACKING_URI, where it is set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def without_password(uri: str) -> str:
    """The address as it may be shown."""
    password = urllib.parse.urlsplit(uri).password
    return uri if password is None else uri.replace(f":{password}@", ":***@")


def check_tracking(uri: str) -> None:
    """Find out at once whether the run can be recorded, before any work is done.

    Raises:
        UserError: nobody answers, or the folder cannot be written.
    """
    try:
        parts = urllib.parse.urlsplit(uri)
    except ValueError as error:
        # Neither the address nor the error, which may repeat it: it cannot be told from a password.
        raise UserError(
            "tracking: MLFLOW_TRACKING_URI is no address; in a user's name or password write "
            "what is neither letter nor digit as %XX (urllib.parse.quote does)"
        ) from error
    if parts.scheme in ("http", "https"):
        _check_server(uri, parts)
    elif parts.scheme == "sqlite":
        _check_sqlite(uri)
    elif parts.scheme.partition("+")[0] not in _OTHER_STORES:
        raise UserError(
            f"tracking: MLFLOW_TRACKING_URI={without_password(uri)!r} is neither an MLflow server "
            "nor a database; use http(s)://HOST:PORT, sqlite:///FILE or postgresql://…"
        )


def _check_server(uri: str, parts: urllib.parse.SplitResult) -> None:
    # urllib takes a user and password in the address for a part of the host's name.
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    try:
        urllib.request.urlopen(f"{server}/health", timeout=_SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return  # somebody answers; whether we may log is for MLflow to say
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise UserError(
            f"tracking: no MLflow server answers at {without_password(uri)} "
            f"(MLFLOW_TRACKING_URI): {reason}; start it, or unset the variable to use a file"
        ) from error


def _check_sqlite(uri: str) -> None:
    file = Path(uri.removeprefix("sqlite:///"))
    key = "MLFLOW_TRACKING_URI" if from_environment() else "working directory"
    if not uri.startswith("sqlite:///") or not file.name:
        raise UserError(f"tracking: {uri!r} names no file; use sqlite:///FILE ({key})")
    try:
        if file.exists() and (not file.is_file() or not _is_database(file)):
            raise UserError(f"tracking: {file.absolute()} is no SQLite database ({key})")
    except OSError as error:
        raise UserError(f"tracking: {file}: {error.strerror} ({key})") from error
    writable_folder(file.parent, f"tracking ({key})")


def _is_database(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(16) in (b"", b"SQLite format 3\0")


@dataclass(frozen=True)
class OpenedRun:
    """An MLflow run that takes records.

    Attributes:
        run_id: MLflow's.
        started: when it began, in milliseconds.
        resumed: whether it was there before.
        epochs: that it was told of.
        last_step: that it was told of; 0: none.
        metrics: the last value of each that it has.
        attempt: how often it was begun or gone on with.
    """

    run_id: str
    started: int
    resumed: bool = False
    epochs: frozenset[int] = frozenset()
    last_step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 1


ATTEMPT = "amint.attempt"
"""Tag: how often a run was begun or gone on with."""
EPOCH_METRIC, STEP_METRIC = "train/task_loss", "step/task_loss"
"""That each epoch has, and each point within one; at steps that count epochs, and steps."""


@dataclass(frozen=True)
class NewRun:
    """What a run is told when it is created.

    Attributes:
        experiment: that it belongs to.
        name: its own.
        tags: beside those that every run of ours gets.
        params: as MLflow shows them; a value that is too long is cut.
        texts: artifacts by name.
        parent: id of the run that it is shown below.
    """

    experiment: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    texts: Mapping[str, str]
    parent: str | None = None


def run_of(config: Config, *, run_name: str, tags: Mapping[str, str]) -> NewRun:
    """The run of a training.

    Args:
        config: the whole configuration.
        run_name: its name.
        tags: beside recipe and fingerprint.
    """
    return NewRun(
        experiment=config.tracking.experiment,
        name=run_name,
        tags={
            "amint.recipe": config.name,
            "amint.config_fingerprint": fingerprint(config),
            "mlflow.source.name": "amint train",
            **tags,
        },
        params=flat(config.model_dump(mode="json")),
        texts={"config.yaml": to_yaml(config)},
        parent=config.tracking.parent_run,
    )


def open_run(
    uri: str,
    new: NewRun,
    *,
    resume: str | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> OpenedRun:
    """Create a run, or find the one to go on with.

    Args:
        uri: of the server or database.
        new: what a run that is created is told.
        resume: id of the run to go on with; where it is gone, a new one takes its place.
        notice: is told where that is so.

    Raises:
        UserError: MLflow takes no run.
    """
    import mlflow

    be_brief()
    mlflow.set_tracking_uri(uri)
    try:
        with _alone_while_created(uri):
            client = mlflow.MlflowClient(uri)
            experiment = _experiment(client, new.experiment)
        mlflow.set_experiment(experiment_id=experiment)  # where the model is logged, too
        if resume is not None:
            found = _find(client, resume)
            if found is not None:
                return found
            notice(f"MLflow run {resume} is gone; a new one takes its place")
        return _create(client, experiment, new)
    except Exception as error:  # MLflow's own, SQLAlchemy's, the network's, the disk's
        raise UserError(
            f"tracking: MLflow at {without_password(uri)} takes no run: {first_line(error)}"
        ) from error


def be_brief() -> None:
    """Have MLflow's client tell soon that a call fails: whoever calls here calls again."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


def _create(client: MlflowClient, experiment: str, new: NewRun) -> OpenedRun:
    parent = {}
    if new.parent is not None:
        parent = {"mlflow.parentRunId": client.get_run(new.parent).info.run_id}
    creation = uuid.uuid4().hex
    run = client.create_run(
        experiment,
        run_name=new.name,
        tags={
            ATTEMPT: "1",
            "amint.creation": creation,
            **git_commit(),
            **parent,
            **new.tags,
        },
    )
    run_id = str(run.info.run_id)
    # Where an answer is lost, MLflow's client asks again, and there are two.
    for other in client.search_runs([experiment], f"tags.`amint.creation` = '{creation}'"):
        if other.info.run_id != run_id:
            client.delete_run(other.info.run_id)
    try:
        _log_params(client, run_id, new.params)
        for name, text in new.texts.items():
            client.log_text(run_id, text, name)
        client.log_dict(run_id, environment(), "environment.json")
    except BaseException:  # a signal, too: no run is to stay RUNNING that nobody works on
        with contextlib.suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise
    return OpenedRun(run_id, run.info.start_time)


def _find(client: MlflowClient, run_id: str) -> OpenedRun | None:
    """The run to go on with, if it is there."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None
    if run.info.lifecycle_stage != "active":
        return None

    def steps(metric: str) -> frozenset[int]:
        return frozenset(point.step for point in client.get_metric_history(run_id, metric))

    attempt = 1 + int(run.data.tags.get(ATTEMPT, "1"))
    client.set_tag(run_id, ATTEMPT, str(attempt))
    return OpenedRun(
        run_id,
        run.info.start_time,
        resumed=True,
        epochs=steps(EPOCH_METRIC),
        last_step=max(steps(STEP_METRIC), default=0),
        metrics=run.data.metrics,
        attempt=attempt,
    )


def runs_below(uri: str, parent: str, tag: str) -> dict[str, tuple[str, str]]:
    """The runs below another that have a tag: id and status by the tag's value.

    Args:
        uri: of the server or database.
        parent: id of the other run.
        tag: its name.
    """
    import mlflow

    be_brief()
    client = mlflow.MlflowClient(uri)
    experiment, below = client.get_run(parent).info.experiment_id, f"= '{parent}'"
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId {below}", max_results=10_000)
    return {
        run.data.tags[tag]: (run.info.run_id, run.info.status)
        for run in found
        if tag in run.data.tags
    }


def _experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another run made it in this moment
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in values.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])


@contextlib.contextmanager
def _alone_while_created(uri: str) -> Iterator[None]:
    """Two runs that both find no database would both make its tables, and one would fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with FileLock(f"{uri.removeprefix('sqlite:///')}.lock", timeout=120):
        yield


def environment() -> dict[str, Any]:
    """Versions and machine, so that a figure can be traced to what made it."""
    import platform

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": versions,
    }


def git_commit() -> dict[str, str]:
    """The commit that this package's own files are checked out from, if they are."""
    here = Path(amint_ray.__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {}  # installed, not checked out: an enclosing repository is not ours
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit is None:
        return {}
    return {"mlflow.source.git.commit": commit, "amint.git_clean": str(not changes).lower()}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's values by dotted key; lists and empty mappings as JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = json.dumps(value) if isinstance(value, list | dict) else value
    return found
