"""A run that was interrupted ends where the straight one does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_setup import (
    CONVNEXT,
    RESNET,
    VIT,
    Backbone,
    architecture_of,
    assert_same_weights,
    config_of,
    fresh_state,
    streams_of,
)

from amint_ray.config.load import training_fingerprint
from amint_ray.config.schema import Config, Loss
from amint_ray.evaluation.scores import read_scores
from amint_ray.train.loop import REFERENCE, SCORES, LocalContext, Trained, epoch_metrics, train
from amint_ray.train.state import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    DamagedCheckpointError,
    check_checkpoint,
    identity_of,
)

RATE = "train/steps_per_second"


class _Interrupted(LocalContext):
    """Dies in the middle of the third epoch."""

    def progress(self, event: Mapping[str, Any]) -> None:
        super().progress(event)
        if event.get("epoch") == 3 and event.get("step") == 8:
            raise ConnectionError("the worker died")


def _run(config: Config, context: LocalContext) -> Trained:
    return train(config, architecture_of(config), streams_of(config), context)


def _history(trained: Trained) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != RATE} for entry in trained.history]


@pytest.mark.parametrize(
    ("backbone", "loss", "options"),
    [
        (
            RESNET,
            {"weighting": "ema"},
            {"optimizer": "adamw", "schedule": "cosine", "accumulate": 2},
        ),
        (CONVNEXT, {"weighting": "initial"}, {"optimizer": "sgd", "schedule": "cosine"}),
        (CONVNEXT, {"weighting": "initial", "lambda_mint": 0.0}, {"optimizer": "adamw"}),
        (
            VIT,
            {"weighting": "gradnorm", "warmup_epochs": 3.0},
            {"optimizer": "lamb", "schedule": "tanh", "warmup_epochs": 2.5, "clip_grad": 0.5},
        ),
        (
            CONVNEXT,
            {"weighting": "uncertainty", "uncertainty_lr": 0.2},
            {"optimizer": "nadamw", "schedule": "step", "decay_epochs": 1, "precision": "float16"},
        ),
    ],
    ids=["resnet-ema-adamw", "convnext-initial-sgd", "plain", "vit-gradnorm-lamb", "float16"],
)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(
    backbone: Backbone, loss: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(
        backbone,
        loss=Loss.model_validate({"ema_decay": 0.7, **loss}),
        data={"augment": "crop_flip"},
        train={
            "epochs": 4,
            "checkpoint_every": 2,
            "schedule": "cosine",
            "lr": 3e-3,
            "weight_decay": 0.01,
            **options,
        },
        drop_rate=0.3,
    )
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    straight = _run(config, LocalContext(tmp_path / "straight"))

    broken = tmp_path / "broken"
    with pytest.raises(ConnectionError):
        _run(config, _Interrupted(broken))
    torch.rand(17)  # what else the process drew must not matter
    context = LocalContext(broken)
    resumed = _run(config, context)

    steps = [event["step"] for event in context.events if event["phase"] == "train"]
    assert steps == [7, 8, 9, 10, 11, 12]  # three steps an epoch, two epochs were done
    assert_same_weights(resumed.model.state_dict(), straight.model.state_dict())
    assert _history(resumed) == _history(straight)
    assert [entry["epoch"] for entry in resumed.history] == [1, 2, 3, 4]
    for name, column in straight.scores.columns.items():
        assert np.array_equal(getattr(resumed.scores, name), column), name


def test_the_last_checkpoint_is_the_trained_model_and_its_scores(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"epochs": 3, "checkpoint_every": 1})
    context = LocalContext(tmp_path)
    trained = _run(config, context)
    assert len(list(tmp_path.iterdir())) == 3
    with context.latest_checkpoint() as last:
        pass
    assert last is not None
    assert {p.name for p in last.iterdir()} == {WEIGHTS, OPTIMIZER, STATE, SCORES, REFERENCE}
    state = fresh_state(config)
    state.load(last, identity=identity_of(config, None))
    assert state.epoch == 3
    assert state.history == trained.history
    assert_same_weights(state.model.state_dict(), trained.model.state_dict())
    stored = read_scores(last / SCORES)
    for name, column in trained.scores.columns.items():
        assert np.array_equal(getattr(stored, name), column), name
    # A run that is already done only scores again.
    again = LocalContext(tmp_path)
    assert _history(_run(config, again)) == _history(trained)
    assert [event["phase"] for event in again.events] == ["evaluate"]


def test_long_training_is_not_risked_while_samples_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies then only scores; its best checkpoints are not pushed out by the same one."""

    class Dies(LocalContext):
        def progress(self, event: Mapping[str, Any]) -> None:
            super().progress(event)
            if event["phase"] == "evaluate":
                raise ConnectionError("the worker died")

        def report(
            self, metrics: Mapping[str, Any], write: Any, *, everywhere: bool = False
        ) -> bool:
            reported.append(dict(metrics))
            return super().report(metrics, write, everywhere=everywhere)

    reported: list[dict[str, Any]] = []
    config = config_of(CONVNEXT, train={"epochs": 3, "checkpoint_every": 2})
    for name in ("straight", "quick", "long"):
        (tmp_path / name).mkdir()
    straight = _run(config, LocalContext(tmp_path / "straight"))
    with pytest.raises(ConnectionError):
        _run(config, Dies(tmp_path / "quick"))
    assert [metrics["epoch"] for metrics in reported] == [2]

    reported.clear()
    monkeypatch.setattr("amint_ray.train.loop._SECONDS_WORTH_A_CHECKPOINT", 0.0)
    with pytest.raises(ConnectionError):
        _run(config, Dies(tmp_path / "long"))
    assert [metrics["epoch"] for metrics in reported] == [2, 3]
    assert reported[1] == {"epoch": 3}
    context = LocalContext(tmp_path / "long")
    resumed = _run(config, context)
    assert [event["phase"] for event in context.events] == ["evaluate"]
    assert_same_weights(resumed.model.state_dict(), straight.model.state_dict())
    assert _history(resumed) == _history(straight)
    for name, column in straight.scores.columns.items():
        assert np.array_equal(getattr(resumed.scores, name), column), name


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"cut"),
            f"{WEIGHTS} is not as it was written",
        ),
        (lambda folder: (folder / OPTIMIZER).unlink(), f"{OPTIMIZER} is missing"),
        (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing"),
        (lambda folder: (folder / STATE).write_text('{"epoch": 3'), f"{STATE} is damaged"),
        (lambda folder: flip_a_bit(folder / OPTIMIZER), f"{OPTIMIZER} is not as it was written"),
    ],
)
def test_a_damaged_checkpoint_is_known_as_such(
    spoil: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    context = LocalContext(tmp_path)
    _run(config_of(CONVNEXT, train={"epochs": 1}), context)
    with context.latest_checkpoint() as last:
        assert last is not None
        check_checkpoint(last)
        spoil(last)
        with pytest.raises(DamagedCheckpointError, match=reason):
            check_checkpoint(last)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """Whatever the libraries that write make of it."""
    code = (
        "import resource, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from training_setup import CONVNEXT, config_of, fresh_state\n"
        "state = fresh_state(config_of(CONVNEXT))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))\n"
        "try:\n"
        "    state.save(Path(sys.argv[2]), identity={}, architecture='{}')\n"
        "except OSError as error:\n"
        "    print('OSError:', error)\n"
    )
    said = []
    for size in (1_000, 126_000):  # in the beginning and the end of the weights
        folder = tmp_path / str(size)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, str(size), str(folder)], capture_output=True, text=True
        )
        assert done.stdout.startswith("OSError: "), done.stderr
        said.append(sorted(file.name for file in folder.iterdir()))
    assert STATE not in said[0] + said[1]


def test_a_full_disk_is_told_from_other_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser's file is torch's, which has one error for all."""
    config = config_of(CONVNEXT, train={"optimizer": "adam", "epochs": 1})
    state = fresh_state(config)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.update.step()
    (tmp_path / OPTIMIZER).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        state.save(tmp_path, identity={}, architecture="{}")

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.save", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        state.save(tmp_path, identity={}, architecture="{}")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / WEIGHTS).touch()
        raise OSError("No space left on device")

    context = LocalContext(tmp_path)
    context.report({}, lambda folder: (folder / STATE).touch())
    with pytest.raises(OSError, match="No space left"):
        context.report({}, fail)
    (only,) = tmp_path.iterdir()
    with context.latest_checkpoint() as last:
        assert last == only


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"epochs": 1})
    _run(config, LocalContext(tmp_path))
    other = config_of(CONVNEXT, train={"epochs": 1, "lr": 2e-2})
    with pytest.raises(ValueError, match=training_fingerprint(config)) as raised:
        _run(other, LocalContext(tmp_path))
    assert training_fingerprint(other) in str(raised.value)


def test_epoch_metrics_are_means_over_the_rows() -> None:
    sums = torch.tensor([7.0, 4.0, 9.0, 9.0, 14.0, 0.0, 0.0], dtype=torch.float64)
    joint = {"train/task_loss": 7 / 9, "train/task_accuracy": 4 / 9, "train/mint_loss": 9 / 14}
    assert epoch_metrics(sums) == pytest.approx(joint, rel=1e-12)
    sums[5:] = torch.tensor([30.0, 40.0])
    assert epoch_metrics(sums) == pytest.approx(joint | {"train/code_match_rate": 0.75})
    sums[3:] = 0
    assert set(epoch_metrics(sums)) == {"train/task_loss", "train/task_accuracy"}
