"""A loss that is not finite stops the run at its step, and names the samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from training_setup import (
    CONVNEXT,
    RESNET,
    Poisoned,
    architecture_of,
    config_of,
    fresh_state,
    ids_of_step,
    streams_of,
)

from amint_ray.config.schema import Config, Loss
from amint_ray.data.loading import MemoryStreams
from amint_ray.train.loop import LocalContext, identity_of, train


def message_of(config: Config, streams: MemoryStreams, context: LocalContext) -> str:
    with pytest.raises(FloatingPointError) as caught:
        train(config, architecture_of(config), streams, context)
    return str(caught.value)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 9])  # three an epoch; 9 is the last of all
@pytest.mark.parametrize(
    ("value", "lambda_mint", "options"),
    [
        (float("nan"), 1.0, {}),
        (float("inf"), 0.0, {}),
        (float("nan"), 1.0, {"accumulate": 2, "precision": "bfloat16"}),
    ],
    ids=["nan", "plain-inf", "accumulate"],
)
def test_the_step_its_losses_and_its_samples_are_named(
    step: int, value: float, lambda_mint: float, options: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(
        CONVNEXT,
        loss=Loss(lambda_mint=lambda_mint),
        train={"epochs": 3, "checkpoint_every": 1, **options},
    )
    context = LocalContext(tmp_path)
    text = message_of(config, Poisoned(config, step, value), context)
    epoch = (step - 1) // 3 + 1
    assert text.startswith(f"step {step} (epoch {epoch}): task loss nan, MINT loss ")
    assert text.startswith("MINT loss nan" if lambda_mint else "MINT loss 0", text.index("MINT"))
    assert set(re.findall(r"s/\d+", text)) == ids_of_step(config, step)
    assert len(text.splitlines()) == 1
    told = [event for event in context.events if event["phase"] == "steps"]
    assert sum(len(event["sums"]) for event in told) == step - 1  # those that led there
    # The checkpoints before it are all there are, and whole.
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [f"checkpoint_{i:06d}" for i in range(1, epoch)]
    if epoch > 1:
        state = fresh_state(config)
        state.load(tmp_path / files[-1], identity=identity_of(config, None))
        assert state.epoch == epoch - 1
        assert all(w.isfinite().all() for w in state.model.state_dict().values())
        assert state.update.done == 3 * state.epoch


def test_a_bad_image_of_e_is_found_by_the_mint_loss(tmp_path: Path) -> None:
    """Without BatchNorm nothing of E reaches the task in that step."""
    config = config_of(CONVNEXT)
    text = message_of(config, Poisoned(config, 2, float("nan"), row=12), LocalContext(tmp_path))
    assert re.match(r"step 2 \(epoch 1\): task loss \d\.\d+, MINT loss nan;", text)


def test_long_batches_are_named_in_part(tmp_path: Path) -> None:
    config = config_of(RESNET, train={"batch_size": 28, "external_ratio": 0.5, "epochs": 1})
    text = message_of(config, Poisoned(config, 1, float("nan")), LocalContext(tmp_path))
    assert len(set(re.findall(r"s/\d+", text))) == 32
    assert text.endswith("and 10 more")


def test_rows_that_stand_twice_in_a_batch_are_named_once(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, data={"augment": "crop_flip"})
    text = message_of(config, Poisoned(config, 2, float("nan")), LocalContext(tmp_path))
    assert len(re.findall(r"s/\d+", text)) == len(ids_of_step(config, 2)) == 18


def test_a_run_goes_on_from_before_the_bad_step(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"epochs": 3, "checkpoint_every": 1})
    message_of(config, Poisoned(config, 5, float("nan")), LocalContext(tmp_path))
    resumed = train(config, architecture_of(config), streams_of(config), LocalContext(tmp_path))
    assert [entry["epoch"] for entry in resumed.history] == [1, 2, 3]


def test_a_learning_rate_that_blows_up_stops_the_run(tmp_path: Path) -> None:
    config = config_of(CONVNEXT, train={"optimizer": "sgd", "lr": 1e30})
    text = message_of(config, streams_of(config), LocalContext(tmp_path))
    assert text.startswith("step 2 (epoch 1): task loss nan")
    assert "train.lr" in text


def test_float16_that_never_fits_stops_the_run(tmp_path: Path) -> None:
    """Finite losses whose gradients overflow at any loss scale: the scale is the one to blame."""
    config = config_of(
        CONVNEXT,
        loss=Loss(weighting="none", lambda_task=1e37),
        train={"precision": "float16", "epochs": 40},
    )
    text = message_of(config, streams_of(config), LocalContext(tmp_path))
    assert "float16 overflow" in text
    assert "train.precision=bfloat16" in text
