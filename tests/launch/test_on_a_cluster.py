"""A real cluster with a token: who is let in, who has to wait; jobs sent to it; `amint doctor`."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import boto3
import psutil
import pytest
from launch.commands import Command, on_own_disk, train_workers
from launch.jobs import (
    AMINT,
    GIVEN_UP,
    QUICK,
    RAY,
    Running,
    amint_submit,
    another_version,
    artifact,
    doctor,
    environment_of,
    kept_checkpoints,
    laptop,
    mlflow_run,
    on_cluster,
    on_the_cluster,
    ray_submit,
    train_processes,
    wait_until,
)
from launch.pictures import SMALL, confounded_digits

from amint_ray.cli import main
from amint_ray.train.state import check_checkpoint
from infra.local.stack import LocalStack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RUN = ["train", "digits", "train.epochs=1", "data.confounder_check=false"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack"), workers=1, cpus=1) as running:
        yield running


def turned_away(stack: LocalStack, folder: Path, *settings: str) -> str:
    """The line with which a run ends that could not join."""
    command = Command(folder, [*RUN, *settings], environment=environment_of(stack))
    assert command.wait() == 2, command.stderr
    assert command.stdout == ""
    assert "Traceback" not in command.stderr
    assert command.leftovers() == []
    return command.stderr.splitlines()[-1]


@pytest.fixture
def knocks(
    stack: LocalStack, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The line with which a run in this process ends that is not let in; Ray is not begun."""

    def run(**other: str) -> str:
        monkeypatch.setattr("amint_ray.launch.train_run.connect", lambda *_, **__: 1 / 0)
        monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
        for name, value in {**stack.environment, **other}.items():
            monkeypatch.setenv(name, value)
        children = {child.pid for child in psutil.Process().children(recursive=True)}
        assert main(RUN) == 2
        assert {child.pid for child in psutil.Process().children(recursive=True)} <= children
        shown = capfd.readouterr()
        assert shown.out == ""
        assert "Traceback" not in shown.err
        return shown.err.splitlines()[-1]

    return run


def test_what_does_not_let_us_in_is_told_in_seconds(
    knocks: Callable[..., str], tmp_path: Path
) -> None:
    started = time.monotonic()
    token = tmp_path / "token"
    token.write_text("0" * 32)
    line = knocks(RAY_AUTH_TOKEN_PATH=str(token))
    assert "the cluster refuses the token (the token shown is not its own)" in line
    line = knocks(RAY_AUTH_TOKEN_PATH=str(tmp_path / "nothing"))
    assert "RAY_AUTH_TOKEN_PATH is set but file cannot be opened" in line
    line = knocks(RAY_AUTH_MODE="disabled")
    assert "RAY_AUTH_MODE=disabled" in line
    assert time.monotonic() - started < 90


def test_a_cluster_of_another_ray_is_told_with_both_versions(
    stack: LocalStack, knocks: Callable[..., str]
) -> None:
    with another_version(stack, "2.9.3"):
        line = knocks()
    assert f"the cluster has Ray 2.9.3, this machine {version('ray')}" in line


def test_a_cluster_that_is_too_small_is_not_waited_for_in_vain(
    stack: LocalStack, tmp_path: Path
) -> None:
    """One that grows in time is waited for in test_faults.py."""
    line = turned_away(stack, tmp_path, "cluster.workers=3", "cluster.wait_seconds=2")
    assert "cluster.workers = 3: the cluster has 2 cores and 0 GPUs on 2 nodes, room for 2" in line
    assert line.endswith("waited 2 s (cluster.wait_seconds)")


def test_a_folder_that_only_the_driver_sees_is_told_before_training(
    stack: LocalStack, tmp_path: Path
) -> None:
    disk = tmp_path / "disk of my own"
    disk.mkdir()
    within = on_own_disk(disk)
    command = Command(
        tmp_path, [*RUN, f"storage.path={disk}"], environment=environment_of(stack), within=within
    )
    assert command.wait() == 2, command.stderr
    here = re.escape(socket.gethostname())
    assert re.search(
        rf"storage.path = .*: node {here} does not see what {here} keeps in {re.escape(str(disk))};"
        r" name a folder that all nodes share, or s3://BUCKET/PREFIX$",
        command.stderr.splitlines()[-1],
    )
    assert command.stderr.count("starting 2 workers") == 1
    assert "epoch 1 " not in command.stderr and "Traceback" not in command.stderr
    assert command.leftovers() == []


@pytest.fixture(scope="module")
def busy(
    stack: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Running]]:
    """Two jobs that hold two of three cores for Ray; halted, so that they need not use them up."""
    if "worker-2" not in stack.nodes:
        stack.add_node("worker-2")
    folder = tmp_path_factory.mktemp("busy")
    running = {}
    for name, submit in (("interrupted", amint_submit), ("stopped", ray_submit)):
        places = [f"storage.path=s3://amint/{name}", f"tracking.experiment={name}"]
        arguments = ["train.epochs=10000", "train.checkpoint_every=2", *places, *QUICK]
        arguments += ["cluster.cpus_per_worker=1"]
        running[name] = submit(stack, folder / name, *arguments, name=name)
    for name in running:
        wait_until(lambda name=name: kept_checkpoints(stack, name), *running.values())
    workers = train_workers(stack.folder)
    assert len(workers) == len(running)
    for worker in workers:
        worker.suspend()
    yield running
    for one in running.values():
        one.process.kill()


def test_a_cluster_that_others_use_is_waited_for_and_ctrl_c_ends_the_waiting(
    stack: LocalStack, busy: dict[str, Running], tmp_path: Path
) -> None:
    """Ray itself would wait without end and a word, for what it was told to start by default."""
    command = Command(tmp_path, RUN, environment=environment_of(stack))
    command.wait_until(lambda: "waiting up to 60 s for it" in command.stderr)
    assert "cluster.workers = 2 (by default): others use the cluster: of its " in command.stderr
    assert "only 1 cores and 0 GPUs are free, room for 1 worker of 1 cores" in command.stderr
    command.interrupt(signal.SIGINT)
    assert command.wait() == 130
    assert command.leftovers() == []


def test_stopped_jobs_leave_no_workers_and_whole_checkpoints(
    stack: LocalStack, busy: dict[str, Running]
) -> None:
    interrupted, stopped = busy["interrupted"], busy["stopped"]
    assert len(train_processes(stack)) == 4
    runs = [kept_checkpoints(stack, name)[0].parent.name for name in busy]
    on_the_cluster(stack, GIVEN_UP, *runs, "put")
    for worker in train_workers(stack.folder):
        worker.resume()
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
    # Else the same commands would end at once with this word of an earlier try.
    assert on_the_cluster(stack, GIVEN_UP, *runs) == "[None, None]"


def test_jobs_end_as_their_commands_do(stack: LocalStack, tmp_path: Path) -> None:
    """Four at once: two that succeed, one that fails, one with a mistake that the cluster finds.

    One of those that succeed has no head, the other trains on a split that is confounded.
    """

    def arguments(name: str, *more: str) -> list[str]:
        return [*QUICK, f"storage.path=s3://amint/{name} ä", f"tracking.experiment={name}", *more]

    mistaken = amint_submit(stack, tmp_path / "m", "--resume=nothing", *QUICK, name="mistaken")
    lost = amint_submit(stack, tmp_path / "l", *arguments("lost", "train.lr=1e30"), name="lost")
    by_amint = amint_submit(
        stack,
        tmp_path / "a",
        *arguments("by-amint", "train.epochs=1", "loss.lambda_mint=0"),
        name="by-amint",
    )
    confounded_digits(tmp_path / "train-0.parquet")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.environment.items():
            patch.setenv(name, value)
        boto3.session.Session().client("s3").upload_file(
            str(tmp_path / "train-0.parquet"), "amint", "confounded/train-0.parquet"
        )
    confounded = ["data.source=parquet", "data.path=s3://amint/confounded", *SMALL]
    confounded += ["data.confounder_check=true", "train.epochs=1"]
    by_ray = ray_submit(stack, tmp_path / "r", *arguments("by-ray", *confounded), name="by-ray")

    mistaken.ends_with(2)
    assert "there is no such run" in mistaken.stderr
    assert mistaken.document()["exit_code"] == 2
    again = amint_submit(stack, tmp_path / "again", *QUICK, name="mistaken")
    again.ends_with(2)
    assert again.stderr == "amint: --name=mistaken: there is such a job already\n"

    lost.ends_with(1)
    diverges_once_and_for_all(stack, lost.stderr)
    assert lost.document()["status"] == "FAILED"
    assert lost.document()["message"] == "Job entrypoint command failed with exit code 1"

    for name, job in (("by-amint", by_amint), ("by-ray", by_ray)):
        job.ends_with(0)
        log = job.stdout + job.stderr
        assert name in log
        assert "amint: scoring every sample" in log, log
        assert f"models:/amint-digits{'-plain' if job is by_amint else ''}/" in log
        assert kept_checkpoints(stack, f"{name} ä")
        assert ("confounded" in log.casefold()) == (job is by_ray)
    assert by_amint.document() == {
        "job_id": "by-amint",
        "status": "SUCCEEDED",
        "exit_code": 0,
        "message": "Job finished successfully.",
    }
    figures = json.loads(artifact(stack, "by-amint", "figures.json"))
    member = figures["membership"]["member"]
    assert member["auc"]["value"] is None
    assert "lambda_mint" in member["auc"]["note"]
    assert figures["loss_threshold"]["member"]["auc"]["value"] is not None
    told = by_ray.stdout + by_ray.stderr
    (warning,) = re.findall("^amint: WARNING: the split is confounded.*", told, re.MULTILINE)
    assert "member from test" in warning
    assert "CONFOUNDED, trust no membership figure" in told
    assert mlflow_run(stack, "by-ray")[1]["amint.confounded"] == "true"
    wait_until(lambda: not train_processes(stack))


def diverges_once_and_for_all(stack: LocalStack, log: str) -> None:
    """It says why in one line, is marked failed, and would not be taken up again."""
    said = [line for line in log.splitlines() if line.startswith("amint: ")]
    (why,) = (line for line in said if "training failed" in line)
    assert re.search(r"training failed: step \d+ \(epoch 1\): task loss .*, MINT loss ", why)
    assert "lower train.lr" in why and "digits/" in why
    assert log.count("starting 1 worker") == 1  # trying again would end the same way
    assert "Traceback" not in log
    assert "models:/" not in log
    assert mlflow_run(stack, "lost")[0] == "FAILED"
    bucket = stack.folder / "s3/buckets/amint/lost ä"
    assert list(bucket.glob("digits-*"))
    assert not list((bucket / "unfinished").rglob("*.json"))  # or the same command took it up


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
    assert len([where for where in wheres if where.startswith("node ")]) == len(stack.nodes)
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
