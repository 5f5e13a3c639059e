"""Memory and speed switches leave the training what it is, within the arithmetic's precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import nn
from training_setup import (
    CONVNEXT,
    RESNET,
    VIT,
    Backbone,
    Stepped,
    architecture_of,
    assert_same_weights,
    config_of,
    fresh_state,
    streams_of,
    take_steps,
)

from amint_ray.config.mint_schema import Keyed
from amint_ray.config.schema import Loss
from amint_ray.contracts import Batch
from amint_ray.train.loop import LocalContext, train
from amint_ray.train.objective import Objective
from amint_ray.train.state import TrainState
from amint_ray.train.step import forward, split

SGD = {"optimizer": "sgd", "lr": 0.02}
PLAIN_VIEWS = {"augment": "crop_flip"}  # a third kind of rows: D plain, for the head alone
DEEP_RESNET: Backbone = (
    RESNET[0].model_copy(update={"options": {"layers": [2, 2, 2, 2], "channels": [8, 16, 24, 32]}}),
    RESNET[1],
)


def run(
    backbone: Backbone,
    switch: dict[str, Any],
    *,
    weighting: str = "initial",
    prepare: Callable[[TrainState], object] | None = None,
    **options: Any,
) -> Stepped:
    train = {**SGD, **options.pop("train", {}), **switch}
    loss = Loss.model_validate({"weighting": weighting, **options.pop("loss", {})})
    return take_steps(config_of(backbone, loss=loss, train=train, **options), prepare)


def assert_close(got: Stepped, expected: Stepped, tol: float) -> None:
    """Relative for the losses; for a weight, against how far its tensor moved at most."""
    assert len(got.batches) == 3
    torch.testing.assert_close(got.losses, expected.losses, rtol=tol, atol=0.0)
    for name, value in expected.weights.items():
        moved = (value - expected.start[name]).abs().max()
        off = (got.weights[name] - value).abs().max()
        # The last bits of a float32 near 1 are noise.
        assert off <= 10 * tol * moved + 5e-7, (name, off, moved)


@pytest.mark.parametrize("accumulate", [2, 4, 9])
@pytest.mark.parametrize("data", [{}, PLAIN_VIEWS], ids=["same-rows", "plain-rows"])
@pytest.mark.parametrize("weighting", ["initial", "gradnorm"])
def test_accumulated_steps_are_whole_steps(
    accumulate: int, data: dict[str, Any], weighting: str
) -> None:
    """9, 9 and 10 rows of D, 6, 6 and 7 of E, in uneven parts, some without any of E."""
    ratio = {"external_ratio": 0.7}
    whole = run(CONVNEXT, ratio, data=data, weighting=weighting)
    rows: list[int] = []

    def count(state: TrainState) -> None:
        state.model.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))

    parts = run(
        CONVNEXT,
        {**ratio, "accumulate": accumulate},
        data=data,
        weighting=weighting,
        prepare=count,
    )
    all_rows = [9 + 6, 9 + 6, 10 + 7]
    if data:
        all_rows = [9 + 9 + 6, 9 + 9 + 6, 10 + 10 + 7]
    steps = [sum(rows[i : i + accumulate]) for i in range(0, len(rows), accumulate)]
    assert steps == all_rows[:1] + all_rows  # the first is measured before it is taken
    assert max(rows) <= -(-10 // accumulate) * (3 if data else 2)
    assert_close(parts, whole, 1e-5)
    assert torch.equal(parts.sums[:, 2], whole.sums[:, 2])
    assert torch.equal(parts.sums[:, 4], whole.sums[:, 4])


@pytest.mark.parametrize("backbone", [CONVNEXT, VIT], ids=["convnext", "vit"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_half_precision_is_near(backbone: Backbone, precision: str, dtype: torch.dtype) -> None:
    given: set[torch.dtype] = set()

    def prepare(state: TrainState) -> None:
        known_scale(state)
        state.model.register_forward_hook(lambda m, args, out: given.add(out[0].dtype))

    full = run(backbone, {})
    half = run(backbone, {"precision": precision}, prepare=prepare)
    # A bfloat16 has eight bits, and the second step starts from what the first made of them.
    torch.testing.assert_close(half.losses, full.losses, rtol=4e-2, atol=0.0)
    assert given == {dtype}
    assert {w.dtype for w in half.weights.values()} == {torch.float32}
    moved = {n: w - full.start[n] for n, w in full.weights.items()}
    off = {n: half.weights[n] - w for n, w in full.weights.items()}
    assert norm(off) < 0.1 * norm(moved)


def known_scale(state: TrainState) -> None:
    """As if float16's loss scale had been found already: the search leaves steps out."""
    found = state.update.state_dict()
    if found["scaler"]:
        state.update.load_state_dict({**found, "scaler": {**found["scaler"], "scale": 256.0}})


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(sum(t.square().sum() for t in tensors.values()) ** 0.5)


@pytest.mark.parametrize("backbone", [CONVNEXT, RESNET], ids=["convnext", "resnet"])
def test_channels_last_is_another_layout_of_the_same(backbone: Backbone) -> None:
    layouts: list[bool] = []

    def watch(state: TrainState) -> None:
        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            layouts.append(output.is_contiguous(memory_format=torch.channels_last))

        state.model.backbone.get_submodule(backbone[1].taps[0]).register_forward_hook(note)

    assert_close(run(backbone, {"channels_last": True}, prepare=watch), run(backbone, {}), 1e-4)
    assert all(layouts)
    assert len(layouts) == 4


@pytest.mark.parametrize(
    "backbone", [CONVNEXT, VIT, DEEP_RESNET], ids=["convnext", "vit", "batch-norm"]
)
@pytest.mark.parametrize("detach", [False, True])
def test_checkpointed_activations_are_computed_twice_and_alike(
    backbone: Backbone, detach: bool
) -> None:
    runs: list[int] = []

    def count(state: TrainState) -> None:
        inner = {
            CONVNEXT[0].backbone: "stages.3.blocks.0.conv_dw",
            VIT[0].backbone: "blocks.3.mlp.fc1",
            RESNET[0].backbone: "layer4.1.conv1",
        }[backbone[0].backbone]
        state.model.backbone.get_submodule(inner).register_forward_pre_hook(
            lambda m, args: runs.append(len(args[0]))
        )

    options: dict[str, Any] = {"weighting": "none", "mint": {"detach": detach}, "drop_rate": 0.3}
    plain = run(backbone, {}, **options)
    twice = run(backbone, {"checkpoint_activations": True}, prepare=count, **options)
    assert len(runs) == 6
    # BatchNorm's running statistics among them: the second pass must not move them again.
    assert torch.equal(twice.sums, plain.sums)
    assert_same_weights(twice.weights, plain.weights, 1e-7)


@pytest.mark.parametrize("weighting", ["initial", "gradnorm"])
def test_taps_inside_of_a_checkpointed_block(weighting: str) -> None:
    """Rows of E leave in the middle of what is computed again."""
    options: dict[str, Any] = {
        "weighting": weighting,
        "mint": {"taps": ["stages.1.downsample", "stages.2.downsample"]},
    }
    plain = run(CONVNEXT, {}, **options)
    assert plain.state.model.architecture.exits_early
    twice = run(CONVNEXT, {"checkpoint_activations": True}, **options)
    assert torch.equal(twice.sums, plain.sums)
    assert_same_weights(twice.weights, plain.weights, 1e-7)


@pytest.mark.slow
def test_a_compiled_model_with_checkpointed_blocks_trains_alike() -> None:
    """BatchNorm's statistics, too, move once a step."""
    model, mint = RESNET
    # Two stages compile in less time than four; timm wants four.
    stages = {"layers": [1, 1, 0, 0], "channels": [8, 16, 16, 16]}
    small = (
        model.model_copy(update={"options": stages}),
        mint.model_copy(update={"taps": ("layer1", "layer2")}),
    )
    switches = {"compile": True, "checkpoint_activations": True}
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        compiled = run(small, switches)
    plain = run(small, {})
    assert_close(compiled, plain, 1e-3)
    assert_same_weights(compiled.weights, plain.weights, 1e-3)


@pytest.mark.slow
def test_a_compiled_model_trains_alike() -> None:
    """Codes read off what the classifier reads, too."""
    model, mint = VIT
    coded = {"objective": "both", "keyed": Keyed(bits=6, head="fixed")}
    small = (
        model.model_copy(update={"options": {**model.options, "depth": 2}}),
        mint.model_copy(update={"taps": ("blocks.0", "blocks.1"), **coded}),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Loops without vectors compile in half the time.
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        compiled = run(small, {"compile": True})
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert_close(compiled, run(small, {}), 1e-4)


def test_gradnorm_gets_over_steps_that_float16_leaves_out() -> None:
    """A loss scale of 65536 is too much for the first steps here."""
    loss = {"lambda_task": 100.0, "lambda_mint": 100.0}
    stepped = run(CONVNEXT, {"precision": "float16"}, weighting="gradnorm", loss=loss)
    assert stepped.state.update.state_dict()["scaler"]["scale"] < 65536
    assert stepped.state.objective.weights().isfinite().all()
    assert all(w.isfinite().all() for w in stepped.weights.values())


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_whole_gradient_is_clipped(precision: str, accumulate: int) -> None:
    limit, rate = 0.1, 0.02
    config = config_of(
        CONVNEXT,
        loss=Loss(weighting="none", lambda_mint=2.0),
        train={
            "optimizer": "momentum",
            "optimizer_options": {"momentum": 0.0},
            "lr": rate,
            "clip_grad": limit,
            "precision": precision,
            "accumulate": accumulate,
        },
    )
    # By hand: torch's clipping and torch's SGD.
    model = fresh_state(config).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    norms = []
    for batch in streams_of(config).train_batches(0):
        optimizer.zero_grad()
        forward(model, batch, Objective(lambda_mint=2.0))[0].backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
    assert min(norms) > 2 * limit
    stepped = take_steps(config, known_scale)
    half = precision == "float16"
    assert_same_weights(stepped.weights, model.state_dict(), 1e-4 if half else 1e-6)


def test_a_short_gradient_is_not_clipped() -> None:
    free, clipped = (run(CONVNEXT, {"clip_grad": limit}) for limit in (None, 1e4))
    assert_same_weights(clipped.weights, free.weights)


def test_no_micro_batch_is_a_single_row_where_steps_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 images in batches of 27 are two steps of 14."""
    config = config_of(CONVNEXT, train={"batch_size": 27, "micro_batch": 2, "epochs": 1})
    rows = []

    def watched(batch: Batch, parts: int) -> list[Batch]:
        found = split(batch, parts)
        rows.append([part.n_task for part in found])
        return found

    monkeypatch.setattr("amint_ray.train.step.split", watched)
    train(config, architecture_of(config), streams_of(config), LocalContext(tmp_path))
    assert rows == [[2] * 7] * 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_measuring_the_first_losses_leaves_no_trace(accumulate: int) -> None:
    """Neither in BatchNorm's statistics nor in what dropout draws next."""
    switch = {"accumulate": accumulate}
    measured = run(RESNET, switch, drop_rate=0.3)
    scales = measured.state.objective.weights().tolist()
    loss = {"lambda_task": scales[0], "lambda_mint": scales[1]}
    given = run(RESNET, switch, weighting="none", loss=loss, drop_rate=0.3)
    assert torch.equal(measured.sums, given.sums)
    assert_same_weights(measured.weights, given.weights)
    # What was measured is what the first step then saw.
    first = [1 / s for s in scales]
    assert measured.losses[0].tolist() == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize(("ratio", "of_e"), [(0.25, (2, 2, 2)), (4.0, (36, 36, 40))])
def test_external_rows_may_be_few_or_many(ratio: float, of_e: tuple[int, ...]) -> None:
    stepped = run(CONVNEXT, {"external_ratio": ratio})
    of_d = (9, 9, 10)
    for batch, sums, d, e in zip(stepped.batches, stepped.sums, of_d, of_e, strict=True):
        assert len(batch.images) == d + e
        assert sums[2] == d
        assert sums[4] == e + int(batch.told[:d].sum())
    assert stepped.losses.isfinite().all()
