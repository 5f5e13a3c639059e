"""Jobs sent to a real cluster with a token, followed and stopped; and `amint doctor` on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from amint_ray.train.state import check_checkpoint
from infra.local.stack import LocalStack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
AMINT = [sys.executable, "-m", "amint_ray.cli"]
RAY = [str(Path(sys.executable).with_name("ray")), "job"]
QUICK = ["cluster.workers=1", "cluster.cpus_per_worker=0.5", "data.confounder_check=false"]
# Ray Train looks after its workers every 2 s otherwise.
QUICK_ENVIRONMENT = """env_vars:
  RAY_TRAIN_HEALTH_CHECK_INTERVAL_S: "0.2"
  RAY_TRAIN_ENABLE_PREEMPTION_WATCHER: "0"
  RAY_TRAIN_METRICS_ENABLED: "0"
"""
SECONDS_AT_MOST = 240.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack"), workers=1, cpus=1) as started:
        yield started


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
    file.write_text(QUICK_ENVIRONMENT)
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
    import mlflow

    client = mlflow.MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    return run.info.status, run.data.tags


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


def test_jobs_end_as_their_commands_do(stack: LocalStack, tmp_path: Path) -> None:
    """Four at once: two that succeed, one that fails, one with a mistake that the cluster finds."""

    def arguments(name: str, *more: str) -> list[str]:
        return [*QUICK, f"storage.path=s3://amint/{name} ä", *more]

    mistaken = amint_submit(stack, tmp_path / "m", "--resume=nothing", *QUICK, name="mistaken")
    lost = amint_submit(stack, tmp_path / "l", *arguments("lost", "train.lr=1e30"), name="lost")
    by_amint = amint_submit(
        stack, tmp_path / "a", *arguments("by-amint", "train.epochs=1"), name="by-amint"
    )
    by_ray = ray_submit(
        stack, tmp_path / "r", *arguments("by-ray", "train.epochs=1"), name="by-ray"
    )

    mistaken.ends_with(2)
    assert "there is no such run" in mistaken.stderr
    assert mistaken.document()["exit_code"] == 2
    again = amint_submit(stack, tmp_path / "again", *QUICK, name="mistaken")
    again.ends_with(2)
    assert again.stderr == "amint: --name=mistaken: there is such a job already\n"

    lost.ends_with(1)
    assert "lower train.lr" in lost.stderr
    assert lost.document()["status"] == "FAILED"
    assert lost.document()["message"] == "Job entrypoint command failed with exit code 1"

    for name, job in (("by-amint", by_amint), ("by-ray", by_ray)):
        job.ends_with(0)
        log = job.stdout + job.stderr
        assert name in log
        assert "amint: scoring every sample" in log, log
        assert "models:/amint-digits/" in log
        assert kept_checkpoints(stack, f"{name} ä")
    assert by_amint.document() == {
        "job_id": "by-amint",
        "status": "SUCCEEDED",
        "exit_code": 0,
        "message": "Job finished successfully.",
    }


def test_stopped_jobs_leave_no_workers_and_whole_checkpoints(
    stack: LocalStack, tmp_path: Path
) -> None:
    def arguments(name: str) -> list[str]:
        places = [f"storage.path=s3://amint/{name}", f"tracking.experiment={name}"]
        return ["train.epochs=1000", "train.checkpoint_every=2", *places, *QUICK]

    interrupted = amint_submit(
        stack, tmp_path / "int", *arguments("interrupted"), name="interrupted"
    )
    stopped = ray_submit(stack, tmp_path / "stop", *arguments("stopped"), name="stopped")
    for name in ("interrupted", "stopped"):
        wait_until(lambda name=name: kept_checkpoints(stack, name), interrupted, stopped)
    assert len(train_processes(stack)) == 4
    interrupted.process.send_signal(signal.SIGINT)
    stop = subprocess.run(
        [*RAY, "stop", "--address", stack.environment["RAY_API_SERVER_ADDRESS"], "stopped"],
        env=laptop(stack),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert stop.returncode == 0, stop.stderr
    interrupted.ends_with(130)
    assert interrupted.document()["status"] == "STOPPED"
    stopped.ends_with(0)  # Ray's own client takes a job that was stopped for one that went well
    assert "Job 'stopped' was stopped" in stopped.stdout + stopped.stderr
    wait_until(lambda: not train_processes(stack))
    for name, job in (("interrupted", interrupted), ("stopped", stopped)):
        assert "is marked KILLED" in job.stdout + job.stderr
        status, tags = mlflow_run(stack, name)
        assert status == "KILLED"
        assert (tags["amint.ray_submission_id"], tags["amint.workers"]) == (name, "1")
        assert int(tags["amint.ray_nodes"]) == len(stack.nodes)
        (last,) = kept_checkpoints(stack, name)
        check_checkpoint(last)


# Nothing is sent


def refused(stack: LocalStack, tmp_path: Path, *options: str, **variables: str) -> str:
    started = time.monotonic()
    command = [*AMINT, "submit", *options, "--", "train", "digits"]
    running = Running(tmp_path / "refused", command, laptop(stack, **variables))
    running.ends_with(2)
    assert time.monotonic() - started < 60
    assert running.stdout == ""
    (line,) = running.stderr.splitlines()
    return line


def test_a_wrong_token_is_told_at_once(stack: LocalStack, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0123456789abcdef" * 2)
    line = refused(stack, tmp_path, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert "the cluster refuses the token" in line
    assert "0123456789abcdef" not in line


def test_no_token_is_told_at_once(stack: LocalStack, tmp_path: Path) -> None:
    assert "the cluster wants a token" in refused(stack, tmp_path, RAY_AUTH_MODE="disabled")


def test_another_server_is_told_at_once(stack: LocalStack, tmp_path: Path) -> None:
    other = stack.environment["MLFLOW_TRACKING_URI"]
    assert "it is not Ray's dashboard" in refused(stack, tmp_path, "--address", other)


# amint doctor


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


def test_doctor_finds_the_stack_well(stack: LocalStack, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])
    places = ["storage.path=s3://amint/doctor", "data.path=s3://mlflow"]
    client.log_text(client.create_run("0").info.run_id, "something to read", "note.txt")
    before = [run.info.run_id for run in client.search_runs(["0"])]
    wrong, running = doctor(tmp_path, on_cluster(stack), *places)
    assert wrong == []
    checks = running.document()["checks"]
    wheres = {check["where"] for check in checks}
    assert len([where for where in wheres if where.startswith("node ")]) == 2
    on_each = {"versions", "gpu", "shared memory", "disk", "storage", "data"}
    for where in wheres - {stack.environment["RAY_ADDRESS"]}:
        names = {check["name"] for check in checks if check["where"] == where}
        once = {"tracking", "working directory", "secrets"} if where == "driver" else {"clock"}
        assert names == on_each | once
    assert [run.info.run_id for run in client.search_runs(["0"])] == before
    assert not (stack.folder / "s3/buckets/amint/doctor").exists()


def test_doctor_tells_a_wrong_token(stack: LocalStack, tmp_path: Path) -> None:
    wrong_token = tmp_path / "token"
    wrong_token.write_text("0123456789abcdef" * 2)
    wrong, running = doctor(tmp_path, on_cluster(stack, RAY_AUTH_TOKEN_PATH=str(wrong_token)))
    assert [check["name"] for check in wrong] == ["cluster"]
    assert "the cluster refuses the token" in wrong[0]["said"]
    assert "0123456789abcdef" not in running.stdout


def test_doctor_tells_wrong_keys_a_dead_server_and_secrets(
    stack: LocalStack, tmp_path: Path
) -> None:
    """All in one go: one thing that is wrong does not hide another."""
    file = tmp_path / "runtime_env.yaml"
    file.write_text("env_vars: {HF_TOKEN: not-to-be-seen}")
    environment = on_cluster(
        stack, AWS_SECRET_ACCESS_KEY="quite-another-key", MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    wrong, running = doctor(
        tmp_path, environment, "storage.path=s3://amint/doctor", "--runtime-env", str(file)
    )
    found = {check["name"]: check for check in wrong}
    assert set(found) == {"storage", "tracking", "secrets"}
    assert len(wrong) == 3, "the nodes have keys of their own"
    assert "refused the credentials" in found["storage"]["said"]
    assert "no MLflow server answers" in found["tracking"]["said"]
    assert "env_vars.HF_TOKEN" in found["secrets"]["said"]
    assert "not-to-be-seen" not in running.stdout + running.stderr
