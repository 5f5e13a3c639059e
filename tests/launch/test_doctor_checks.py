"""Each check of `amint doctor` on what it is there for, without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amint_ray.config.load import load_config
from amint_ray.launch import doctor, doctor_driver, doctor_node
from amint_ray.launch.doctor_node import Wrong, run_checks
from amint_ray.launch.knock import other_versions

GIB = 2**30


def wrong(check: Any, *arguments: Any) -> str:
    with pytest.raises(Wrong) as raised:
        check(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_check_that_fails_or_hangs_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "not-to-be-seen")

    def fails() -> str:
        raise ValueError("not-to-be-seen is wrong\nand more")

    def finds() -> str:
        raise Wrong("do this")

    def hangs() -> str:
        time.sleep(20)
        return "late"

    started = time.monotonic()
    checks = {"hangs": hangs, "also": hangs, "fails": fails, "finds": finds, "is": lambda: "well"}
    found = run_checks(checks, 0.3)
    assert time.monotonic() - started < 15
    assert found == [
        {"name": "hangs", "ok": False, "said": "no answer within 0.3 s"},
        {"name": "also", "ok": False, "said": "no answer within 0.3 s"},
        {"name": "fails", "ok": False, "said": "ValueError: *** is wrong"},
        {"name": "finds", "ok": False, "said": "do this"},
        {"name": "is", "ok": True, "said": "well"},
    ]


def test_other_versions_are_told() -> None:
    ours = doctor_node.versions()
    assert doctor_node._versions(ours) == doctor_node._versions(None)
    text = wrong(doctor_node._versions, {**ours, "torch": "1.0"})
    assert f"torch {ours['torch']} (driver: 1.0)" in text
    assert "ray" not in text.replace("amint_ray", "")
    same = {"ray_version": ours["ray"], "python_version": ours["Python"]}
    assert other_versions(same) is None
    text = other_versions({**same, "ray_version": "2.9.0"})
    assert text is not None
    assert text.startswith(f"the cluster has Ray 2.9.0, this machine {ours['ray']}")
    assert "Python 3.1.1" in (other_versions({**same, "python_version": "3.1.1"}) or "")


def test_the_sum_of_the_files_sees_a_stale_installation(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.py").write_text("x = 1")
        (tmp_path / name / f"cache{name}.pyc").write_text(name)
    first, second = (doctor_node._sum_of(tmp_path / name) for name in ("a", "b"))
    assert first == second
    (tmp_path / "b/code.py").write_text("x = 2")
    assert doctor_node._sum_of(tmp_path / "b") != first


@pytest.mark.parametrize(
    ("seen", "ray_has", "said"),
    [
        (0, 0.0, "no GPU; gloo"),
        (0, None, "no GPU; gloo"),
        (2, 2.0, "2 × Big, NCCL 2.27.3"),
        (2, 1.0, "2 × Big, NCCL 2.27.3; Ray has 1 of them"),
        (0, 1.0, "WRONG Ray has 1 GPUs here, torch sees none"),
        (1, 2.0, "WRONG 1 × Big, NCCL 2.27.3, but Ray counts 2"),
    ],
)
def test_gpus(seen: int, ray_has: float | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Big")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    if said.startswith("WRONG"):
        assert wrong(doctor_node._gpu, ray_has).startswith(said.removeprefix("WRONG "))
    else:
        assert doctor_node._gpu(ray_has) == said
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    if seen:
        assert "no NCCL" in wrong(doctor_node._gpu, ray_has)


def disk(monkeypatch: pytest.MonkeyPatch, *, total: float, free: float) -> None:
    usage = SimpleNamespace(total=total * GIB, used=(total - free) * GIB, free=free * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, total=16, free=12)
    assert "12.0 of 16.0 GiB free, Ray's object store 8.0" in doctor_node._shared_memory(8 * GIB)
    assert "Ray" not in doctor_node._shared_memory(None)
    assert "--shm-size" in wrong(doctor_node._shared_memory, 20 * GIB)
    disk(monkeypatch, total=0.0625, free=0.0625)  # Docker's default
    assert "--shm-size" in wrong(doctor_node._shared_memory, None)


def test_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, total=100, free=50)
    assert "50.0 of 100.0 GiB free" in doctor_node._disk()
    disk(monkeypatch, total=100, free=1)
    assert "set TMPDIR" in wrong(doctor_node._disk)
    disk(monkeypatch, total=1000, free=40)
    assert "so full" in wrong(doctor_node._disk)


@pytest.mark.parametrize(
    ("ahead", "ok", "said"),
    [(0.5, True, "0.50 s ahead of"), (-0.5, True, "0.50 s behind"), (-9, False, "9.00 s behind")],
)
def test_clocks(ahead: float, ok: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda value: value)
    clock = SimpleNamespace(remote=lambda: time.time() + ahead)
    assert said in (doctor._skew(clock) if ok else wrong(doctor._skew, clock))


def large_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(101 * 2**20)


@pytest.mark.parametrize("with_git", [True, False])
def test_the_size_of_what_is_uploaded(
    with_git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("x = 1")
    given = {"working_dir": str(tmp_path), "excludes": ["/data/", "*.bin"]}
    if with_git:
        subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
        (tmp_path / ".gitignore").write_text("ignored/\n")
        large_file(tmp_path / "ignored/x")
    large_file(tmp_path / ".venv/x" if not with_git else tmp_path / "ignored/y")
    large_file(tmp_path / "data/deep/x")
    large_file(tmp_path / "more/x.bin")
    assert doctor_driver._upload_size(given) == "working_dir has 0.0 MiB"
    text = wrong(doctor_driver._upload_size, {"working_dir": str(tmp_path)})
    assert "more than 100 MiB" in text
    text = doctor_driver._upload_size({})
    assert "nothing is uploaded" in text
    assert "more than 100 MiB" in text
    assert "not there" in wrong(doctor_driver._upload_size, {"working_dir": "nowhere"})


def test_secrets_that_a_job_was_sent_with(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"env_vars": {"HF_TOKEN": "not-to-be-seen"}}
    monkeypatch.delenv("RAY_RUNTIME_ENV", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)

    def secrets(given: dict[str, Any] | None) -> Any:
        return doctor_driver.checks_of_driver(load_config(None, []), given, 5)["secrets"]

    assert secrets(None)() == "none in the runtime environment"
    assert "env_vars.HF_TOKEN" in wrong(secrets(environment))
    monkeypatch.setenv("RAY_RUNTIME_ENV", json.dumps(environment))
    assert "env_vars.HF_TOKEN" in wrong(secrets(None))
    monkeypatch.delenv("RAY_RUNTIME_ENV")
    job = {"runtime_env": environment, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert "not-to-be-seen" not in wrong(secrets(None))
    assert secrets({})() == "none in the runtime environment"


def test_an_address_at_which_nobody_or_somebody_else_listens() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "no Ray cluster answers" in wrong(doctor._reach, address, 5.0)
        silent.listen()
        started = time.monotonic()
        assert "not as a Ray cluster does" in wrong(doctor._reach, address, 3.0)
        assert time.monotonic() - started < 30


def test_a_token_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client aborts its process there."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        text = wrong(doctor._reach, address, 20.0)
    assert "RAY_AUTH_TOKEN_PATH is set but file cannot be opened" in text


def test_without_a_cluster_this_machine_is_checked(tmp_path: Path) -> None:
    dropped = ("RAY_", "AWS_", "MLFLOW_TRACKING")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    done = subprocess.run(
        [sys.executable, "-m", "amint_ray.cli", "doctor", "--seconds=60"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 9
    assert all(line.startswith("ok ") and " driver " in line for line in lines)
    assert list(tmp_path.iterdir()) == []
