"""What a killed process had ready for upload is taken away by the next one, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from amint_ray.launch.staging import PREFIX, Staging

KEEPS_ONE = """
import time
from amint_ray.launch.staging import Staging
staging = Staging()
print(staging.new_folder(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_killed_process_leaves_nothing_for_long(disk: Path) -> None:
    (disk / "not-ours").mkdir()
    command = [sys.executable, "-c", KEEPS_ONE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            folder = Path(other.stdout.readline().strip())
            (folder / "weights").write_bytes(b"1")

            Staging()
            assert (folder / "weights").exists(), "swept while its process lives"
        finally:
            other.send_signal(signal.SIGKILL)
    assert folder.exists()

    Staging()
    assert [found.name for found in disk.iterdir()] == ["not-ours"]


def test_each_folder_is_new_and_empty_and_the_process_keeps_its_own(disk: Path) -> None:
    staging = Staging()
    folders = [staging.new_folder() for _ in range(3)]
    Staging()
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and not list(folder.iterdir()) for folder in folders)
    assert {folder.parent.name.startswith(PREFIX) for folder in folders} == {True}


def test_a_folder_taken_away_meanwhile_is_made_again(disk: Path) -> None:
    staging = Staging()
    first = staging.new_folder()
    first.rmdir()
    first.parent.rmdir()
    assert staging.new_folder().is_dir()


def test_a_disk_that_takes_nothing_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging()
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(OSError):
        staging.new_folder()
