"""Commands around a stack's cluster as its users run them, and what they leave on it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local.stack import LocalStack

ROOT = Path(__file__).resolve().parents[2]
AMINT = [sys.executable, "-m", "amint_ray.cli"]
RAY = [str(Path(sys.executable).with_name("ray")), "job"]
QUICK = ["cluster.workers=1", "cluster.cpus_per_worker=0.5", "data.confounder_check=false"]
# Ray Train looks after its workers every 2 s otherwise.
QUICK_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
SECONDS_AT_MOST = 240.0


def laptop(stack: LocalStack, **more: str) -> dict[str, str]:
    """All that whoever sends a job needs: neither S3's keys nor MLflow's address."""
    dropped = ("AWS_", "RAY_", "MLFLOW_TRACKING")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS")
    return {**kept, **{name: stack.environment[name] for name in names}, **more}


def on_cluster(stack: LocalStack, **more: str) -> dict[str, str]:
    return {**laptop(stack), **stack.environment, **more}


class Running:
    """A command whose output goes to files."""

    def __init__(self, folder: Path, command: list[str], environment: Mapping[str, str]) -> None:
        folder.mkdir()
        self._files = [folder / "stdout", folder / "stderr"]
        with self._files[0].open("w") as stdout, self._files[1].open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, env=dict(environment), cwd=folder
            )

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    def ends_with(self, code: int) -> None:
        assert self.process.wait(SECONDS_AT_MOST) == code, self.stdout + self.stderr

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.stdout)
        return document


def wait_until(condition: Callable[[], Any], *running: Running) -> None:
    deadline = time.monotonic() + SECONDS_AT_MOST
    while not condition():
        for one in running:
            assert one.process.poll() is None, one.stdout + one.stderr
        assert time.monotonic() < deadline, [one.stdout + one.stderr for one in running]
        time.sleep(0.2)


def amint_submit(stack: LocalStack, folder: Path, *arguments: str, name: str) -> Running:
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps({"env_vars": QUICK_VARIABLES}))
    options = ["--json", "--name", name, "--runtime-env", str(file)]
    command = [*AMINT, "submit", *options, "--", "train", "digits", *arguments]
    return Running(folder, command, laptop(stack))


def ray_submit(stack: LocalStack, folder: Path, *arguments: str, name: str) -> Running:
    environment = ["--runtime-env", str(ROOT / "infra/runtime_env.yaml")]
    where = ["--address", stack.environment["RAY_API_SERVER_ADDRESS"], "--submission-id", name]
    command = [*RAY, "submit", *where, *environment, "--", "amint", "train", "digits", *arguments]
    return Running(folder, command, laptop(stack))


def mlflow_run(stack: LocalStack, experiment: str) -> tuple[str, dict[str, str]]:
    """The status and the tags of the only run of an experiment."""
    _, run = _only_run(stack, experiment)
    return run.info.status, run.data.tags


def artifact(stack: LocalStack, experiment: str, name: str) -> str:
    """The text of an artifact of the only run of an experiment."""
    client, run = _only_run(stack, experiment)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stack.environment["MLFLOW_TRACKING_URI"])
        return Path(client.download_artifacts(run.info.run_id, name, folder)).read_text()


def _only_run(stack: LocalStack, experiment: str) -> tuple[Any, Any]:
    import mlflow

    client = mlflow.MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    return client, run


def train_processes(stack: LocalStack) -> list[str]:
    """Controllers and workers of Ray Train on this cluster."""
    token, names = stack.environment["RAY_AUTH_TOKEN_PATH"], []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_AUTH_TOKEN_PATH") == token:
                names.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return [n for n in names if n.startswith(("ray::RayTrainWorker", "ray::TrainController"))]


def kept_checkpoints(stack: LocalStack, prefix: str) -> list[Path]:
    """The newest checkpoint of each run below a prefix, as far as the run knows of it."""
    found = []
    below = stack.folder / "s3/buckets/amint" / prefix
    for snapshot in below.glob("*/checkpoint_manager_snapshot.json"):
        try:
            latest = json.loads(snapshot.read_text())["latest_checkpoint_result"]
        except ValueError:  # it is being written
            continue
        if latest is not None:
            found.append(snapshot.parent / latest["checkpoint_dir_name"])
    return found


_CLIENT = """
import json, sys
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient
ensure_token_if_auth_enabled(None, create_token_if_missing=False)
client = GcsClient(address=sys.argv[1])
"""


def on_the_cluster(stack: LocalStack, code: str, *arguments: str) -> str:
    """The last line that a piece of code prints which has a `client` of the cluster's store."""
    command = [sys.executable, "-c", _CLIENT + code, stack.environment["RAY_ADDRESS"], *arguments]
    environment = {**os.environ, **stack.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


# What a head of another version would have written; the cluster's own answer is put back after it.
_VERSION = """
key, namespace = b"CLUSTER_METADATA", b"cluster"
said = json.loads(client.internal_kv_get(key, namespace))
print(said["ray_version"])
said["ray_version"] = sys.argv[2]
client.internal_kv_put(key, json.dumps(said).encode(), True, namespace)
"""


# What a worker leaves that found another try to be of no use.
GIVEN_UP = """
keys = [run + "/given-up" for run in sys.argv[2:4]]
if sys.argv[4:] == ["put"]:
    for key in keys:
        client.internal_kv_put(key.encode(), b"because", True, b"amint_ray")
print([client.internal_kv_get(key.encode(), b"amint_ray") for key in keys])
"""


@contextlib.contextmanager
def another_version(stack: LocalStack, version: str) -> Iterator[None]:
    own = on_the_cluster(stack, _VERSION, version)
    try:
        yield
    finally:
        on_the_cluster(stack, _VERSION, own)


def doctor(
    tmp_path: Path, environment: dict[str, str], *arguments: str
) -> tuple[list[dict[str, Any]], Running]:
    """What is wrong; and the command, which has ended."""
    command = [*AMINT, "doctor", "--json", "--seconds", "30", *arguments]
    running = Running(tmp_path / "doctor", command, environment)
    running.process.wait(SECONDS_AT_MOST)
    document = running.document()
    wrong = [check for check in document["checks"] if not check["ok"]]
    assert document["ok"] == (not wrong)
    assert running.process.returncode == (1 if wrong else 0), running.stderr
    assert all(set(check) == {"name", "where", "ok", "said"} for check in document["checks"])
    assert all("\n" not in check["said"] for check in document["checks"])
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert environment[name] not in running.stdout + running.stderr
    assert {path.name for path in (tmp_path / "doctor").iterdir()} == {"stdout", "stderr"}
    return wrong, running


def environment_of(stack: LocalStack) -> dict[str, str]:
    return {**stack.environment, **QUICK_VARIABLES}
