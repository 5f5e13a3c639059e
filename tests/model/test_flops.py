"""Counted costs of a step against hand arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import CLASSES, CONV, RESNET, VIT, Small

from amint_ray.model.mint_head import HeadSpec
from amint_ray.train.flops import count_flops

OF_D, ROWS = 8, 20


def _conv(channels: tuple[int, int], kernel: int, side: int) -> int:
    """Forward FLOPs of one image; `side` of the output."""
    return 2 * channels[0] * channels[1] * kernel**2 * side**2


# RESNET on 16×16 images, module by module.
STEM = _conv((3, 64), 7, 8)
LAYERS = [
    _conv((64, 8), 3, 4) + _conv((8, 8), 3, 4) + _conv((64, 8), 1, 4),
    _conv((8, 16), 3, 2) + _conv((16, 16), 3, 2) + _conv((8, 16), 1, 2),
    _conv((16, 24), 3, 1) + _conv((24, 24), 3, 1) + _conv((16, 24), 1, 1),
    _conv((24, 32), 3, 1) + _conv((32, 32), 3, 1) + _conv((24, 32), 1, 1),
]
FC = 2 * 32 * CLASSES
TRUNK = STEM + LAYERS[0] + LAYERS[1] + LAYERS[2]
# Forward, gradient of the weights and, but for the first layer, of the input.
STEP_TRUNK, STEP_REST = 3 * TRUNK - STEM, 3 * (LAYERS[3] + FC)
FIRST = _conv((16, 6), 3, 2) + _conv((24, 6), 3, 1)  # the head's layers that read the taps
HEAD = FIRST + 2 * _conv((6, 6), 3, 1) + 2 * 12 * 10 + 2 * 10


def test_a_small_cnn_by_hand() -> None:
    """The taps lie after layers 2 and 3 of four."""
    architecture = RESNET.architecture()
    assert architecture.taps[-1].depth == pytest.approx(TRUNK / (TRUNK + LAYERS[3] + FC))
    flops = count_flops(architecture, n_task=OF_D, n_rows=ROWS)
    assert flops.task == OF_D * (STEP_TRUNK + STEP_REST)
    assert flops.joint == ROWS * (STEP_TRUNK + 3 * HEAD) + OF_D * STEP_REST
    assert flops.ratio == flops.joint / flops.task

    plain = count_flops(architecture, n_task=OF_D, n_rows=ROWS, mint=False)
    assert plain.joint == plain.task == flops.task

    # Plain views: D's augmented rows are not read by the head.
    views = count_flops(architecture, n_task=OF_D, n_rows=ROWS, head_from=OF_D)
    assert views.joint == ROWS * STEP_TRUNK + (ROWS - OF_D) * 3 * HEAD + OF_D * STEP_REST


def test_a_small_cnn_with_a_detached_head_by_hand() -> None:
    """BatchNorm tells the modes apart: D runs a second time, in evaluation mode."""
    flops = count_flops(replace(RESNET, detach=True).architecture(), n_task=OF_D, n_rows=ROWS)
    assert flops.task == OF_D * (STEP_TRUNK + STEP_REST)
    # The head's first layers need no gradient of what they read.
    assert flops.joint == flops.task + ROWS * (TRUNK + 3 * HEAD - FIRST)


def test_a_small_cnn_whose_head_reads_the_logits_by_hand() -> None:
    small = replace(RESNET, head=replace(CONV, inputs=("logits", "loss")))
    flops = count_flops(small.architecture(), n_task=OF_D, n_rows=ROWS)
    wider = HEAD + 2 * (CLASSES + 1) * 10
    # fc.0 gives the branches their gradient, and to the extra inputs' columns along with them.
    assert flops.joint == ROWS * (STEP_TRUNK + STEP_REST + 3 * wider)


SPEC = HeadSpec("attention", channels=16, queries=4, hidden=32)
WIDE = Small("vit_tiny_patch16_224", {**VIT.options, "embed_dim": 64}, head=SPEC)


def _vit_forward(small: Small) -> int:
    tokens, width, depth = 17, small.options["embed_dim"], small.options["depth"]
    block = 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    return 2 * 16 * 48 * width + depth * block + 2 * width * CLASSES


def _attention_head(taps: int) -> int:
    branch = 17 * 64 * 16 + 17 * 16 * 4 + 17 * 4 * 16
    return 2 * (taps * branch + taps * 4 * 16 * 32 + 32)


@pytest.mark.parametrize("word", ["entry", "middle", "output"])
def test_a_vits_ratio_is_one_plus_the_share_of_rows_times_the_depth(word: str) -> None:
    """1 + r·φ of the backbone, and a head that is read by all rows; a third of r·φ if detached."""
    architecture = WIDE.with_taps(word).architecture()
    phi = architecture.taps[-1].depth
    assert phi == pytest.approx({"entry": 0.5, "middle": 0.75, "output": 1}[word], abs=0.02)
    for r in (0.5, 1):
        rows = round((1 + r) * OF_D)
        head = (1 + r) * _attention_head(2) / _vit_forward(WIDE)
        joined = count_flops(architecture, n_task=OF_D, n_rows=rows)
        assert joined.ratio == pytest.approx(1 + r * phi + head, rel=0.01)
        apart = count_flops(replace(architecture, detach=True), n_task=OF_D, n_rows=rows)
        assert apart.ratio == pytest.approx(1 + r * phi / 3 + head, rel=0.01)
        assert apart.task == joined.task


def test_rows_that_cannot_leave_pass_the_whole_backbone() -> None:
    small = WIDE.with_taps("blocks.2.attn")
    flops = count_flops(small.architecture(), n_task=OF_D, n_rows=2 * OF_D)
    head = 2 * _attention_head(1) / _vit_forward(small)
    assert flops.ratio == pytest.approx(2 + head, rel=0.01)
