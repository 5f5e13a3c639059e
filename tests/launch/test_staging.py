"""What a killed process had ready for upload is taken away by the next one, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
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
    assert {folder.name.startswith(PREFIX) for folder in folders} == {True}


def test_folders_that_were_uploaded_are_counted_no_more_and_leave_nothing(disk: Path) -> None:
    staging = Staging()
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    folders = [staging.new_folder() for _ in range(3)]
    assert staging.waiting == 3
    for left, folder in zip((2, 1, 0), folders, strict=True):
        folder.rmdir()
        assert staging.waiting == left
    assert list(disk.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_a_folder_taken_by_another_process_before_it_is_locked_is_made_again(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging()
    taken: list[str] = []

    def make(**options: str) -> str:
        folder = make_folder(**options)
        if not taken:
            Staging()
            taken.append(folder)
        return folder

    make_folder = tempfile.mkdtemp
    monkeypatch.setattr("tempfile.mkdtemp", make)
    folder = staging.new_folder()
    assert not Path(taken[0]).exists()
    assert list(disk.iterdir()) == [folder]
    assert staging.waiting == 1


def test_a_disk_that_takes_nothing_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging()
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(OSError):
        staging.new_folder()
