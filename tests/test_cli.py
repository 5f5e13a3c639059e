"""The command line: what it prints where, and how it takes mistakes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

from amint_ray.cli import main
from amint_ray.config.load import load_config, recipe_names


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder, with Ray forbidden and this process's signal handlers restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refuse(*args: object, **options: object) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("amint_ray.launch.train_run.connect", refuse)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


PHASES = ("starting", "checking", "opening", "reading")


def complaint(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake ends with; nothing on stdout, nothing left in the folder."""
    before = sorted(Path.cwd().iterdir()) if os.access(Path.cwd(), os.W_OK) else None
    assert main(list(arguments)) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = [
        line
        for line in captured.err.splitlines()
        if not line.startswith(tuple(f"amint: {phase}" for phase in PHASES))
    ]
    assert len(lines) == 1, lines
    if before is not None:
        assert sorted(Path.cwd().iterdir()) == before
    return lines[0].removeprefix("amint: ")


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["digit"], ["'digit'", "did you mean 'digits'"]),
        (["nowhere.yaml"], ["'nowhere.yaml'"]),
        (["digits", "train.epochs=-1"], ["train.epochs = -1", "greater than or equal to 1"]),
        (["digits", "train.epoch=1"], ["'train.epoch'", "did you mean 'train.epochs'"]),
        (["digits", "mint.taps=[nope]"], ["mint.taps", "'nope'"]),
        (["digits", "mint.taps=[stage.1]"], ["mint.taps", "'stage.1'", "stages.1"]),
        (["digits", "mint.head=tokens", "mint.head=words"], ["mint.head = 'words'", "'tokens'"]),
        (["digits", "data.shares.withheld=1.2"], ["data.shares.withheld = 1.2", "equal to 1"]),
        *(
            (["digits", f"cluster.workers={value}"], ["cluster.workers = ", "[fewest, most]"])
            for value in ("[3, 1]", "zwei", "0", "[1, 2, 3]")
        ),
        (["digits", "cluster.workers=4096"], ["cluster.workers = 4096", "cores"]),
        (["digits", "model.backbone=resnet51"], ["'resnet51'", "resnet50"]),
        (["digits", "model.options.sides=3"], ["convnext_atto", "sides"]),
        (["digits", "train.batch_size=1500"], ["train.batch_size = 1500"]),
        (
            ["mnist_vit", "data.image_size=30", "model.options.img_size=28"],
            ["data.image_size = 30"],
        ),
        (["mnist_vit", "data.path=/nowhere"], ["data.path=/nowhere"]),
        (["mnist_vit", "mint.taps=head", "mint.head=conv"], ["'head'", "feature maps"]),
        (["digits", "storage.path=/proc/runs"], ["storage.path", "/proc/runs"]),
        (["digits", "storage.path=s3://bucket/runs"], ["storage.path", "s3://bucket/runs"]),
        (["digits", "storage.path=~no_such_user/runs"], ["storage.path", "~no_such_user"]),
        (["digits", f"storage.path=/tmp/{'x' * 300}"], ["storage.path", "too long"]),
        (["digits", f"data.source=parquet data.path=/{'x' * 300}"], ["data.source"]),
        (["digits", "model.options.patch_size=0"], ["data.image_size = 8"]),
        (["digits", "mint.channels=1000000000"], ["mint.channels = 1000000000"]),
        (["digits", "train.external_ratio=0.001"], ["train.external_ratio = 0.001"]),
        (["digits", "train.epochs=???"], ["train.epochs"]),
        (["digits", "mint.taps=["], ["mint.taps=["]),
        (["digits", "cluster.address=nonsense"], ["cluster.address", "nonsense"]),
        (["digits", "--jsn"], ["--json"]),
    ],
)
def test_a_mistake_gets_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    line = complaint(capfd, "train", *arguments)
    for part in parts:
        assert part in line


def test_yaml_that_does_not_parse_names_the_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("train:\n  epochs: [1\n")
    assert "bad.yaml, line 3" in complaint(capfd, "train", "bad.yaml")


@pytest.mark.parametrize("uri", ["garbage://x", "not a uri", "mlruns", "sqlite://"])
def test_a_tracking_address_that_is_none_is_noticed_first(
    uri: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert uri in complaint(capfd, "train", "digits")


def test_a_tracking_address_that_cannot_be_told_from_a_password_is_not_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunt[er2@host")
    line = complaint(capfd, "train", "digits")
    assert "MLFLOW_TRACKING_URI is no address" in line and "er2" not in line


def test_a_database_that_is_none_is_noticed_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    assert "mlflow.db" in complaint(capfd, "train", "digits")


def test_a_server_that_does_not_answer_is_noticed_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://someone:secret@127.0.0.1:{unused_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    line = complaint(capfd, "train", "digits")
    assert "MLFLOW_TRACKING_URI" in line and "127.0.0.1" in line
    assert "secret" not in line


def test_a_cluster_that_does_not_answer_is_noticed_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{unused_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert address in complaint(capfd, "train", "digits")


def test_a_working_directory_that_cannot_be_written_is_noticed_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")  # read-only to root too
    assert "/proc" in complaint(capfd, "train", "digits")
    storage = f"storage.path={Path(sys.executable).parent}"
    assert "working directory" in complaint(capfd, "train", "digits", storage)


def test_config_prints_what_would_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "digits", "train.epochs=7"]) == 0
    text = capfd.readouterr().out
    assert yaml.safe_load(text)["train"]["epochs"] == 7
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config("mine.yaml") == load_config("digits", ["train.epochs=7"])


def test_help_names_the_recipes_and_costs_no_heavy_import() -> None:
    program = (
        "import sys; from amint_ray.cli import main; main(['train', '--help']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'mlflow', 'timm')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    for name in recipe_names():
        assert name in done.stdout


def test_without_arguments_the_help_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "train" in capfd.readouterr().err
