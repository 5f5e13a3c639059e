"""Placements: what is refused, in which order taps run, where rows can leave."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    CLASSES,
    CONVNEXT,
    DENSENET,
    RESNET,
    SWIN,
    VIT,
    Small,
    built,
    plain_head,
    tapped,
    twin,
)
from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.taps import probe_taps


def _line(small: Small) -> str:
    with pytest.raises(UserError) as raised:
        small.architecture()
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_an_unknown_module_is_told_with_near_names() -> None:
    line = _line(RESNET.with_taps("layer2", "layer33"))
    assert "mint.taps" in line
    assert "'layer33'" in line
    assert "layer3" in line.split("near names:")[1]


def test_a_name_like_nothing_is_told_with_the_backbones_modules() -> None:
    line = _line(VIT.with_taps("~~~~"))
    assert "its modules begin with: patch_embed, pos_drop, " in line
    assert line.endswith(", head")


class _Odd(nn.Module):
    """One module runs twice, one never, one gives a tuple, one a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.never = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.pair = nn.LSTM(8, 8, batch_first=True)
        self.vector = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.once(images)))
        self.pair(x[:, 0])
        return self.vector(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        ("twice", "'twice' runs 2 times"),
        ("never", "'never' runs 0 times"),
        ("pair", "'pair' gives tuple for 3 images"),
        ("vector", r"'vector' gives \(3, 2\) for 3 images"),
    ],
)
def test_a_module_that_cannot_be_tapped_is_told(tap: str, words: str) -> None:
    with pytest.raises(UserError, match=f"mint.taps: module {words}"):
        probe_taps(_Odd(), [tap], (3, 8, 8))
    assert [t.name for t in probe_taps(_Odd(), ["once"], (3, 8, 8))[0]] == ["once"]


def test_swin_windows_are_not_mistaken_for_images() -> None:
    line = _line(SWIN.with_taps("layers.0.blocks.0.attn"))
    assert "'layers.0.blocks.0.attn' gives (" in line


def test_an_image_size_that_a_vit_cannot_take_is_told() -> None:
    line = _line(Small(**{**vars(VIT), "size": 20}))
    assert line.startswith("data.image_size = 20: the backbone cannot take such images: ")
    assert "20" in line.split("images: ")[1]


def test_an_unknown_backbone_and_an_unknown_option_are_told() -> None:
    assert "near names: " in _line(Small("resnet19", {}, ("layer2",)))
    line = _line(Small("resnet18", {"depht": 3}, ("layer2",)))
    assert "resnet18" in line
    assert "depht" in line.split("}: ")[1]


def test_a_conv_head_on_tokens_is_refused_with_the_way_out() -> None:
    line = _line(Small(**{**vars(VIT), "head": "conv"}))
    assert "mint.head = 'conv'" in line
    assert "mint.head=tokens" in line


@pytest.mark.parametrize("given", [("layer3", "layer1", "layer2"), ("layer1", "layer2", "layer3")])
def test_taps_are_ordered_by_execution(given: tuple[str, ...]) -> None:
    architecture = RESNET.with_taps(*given).architecture()
    assert [(t.name, t.shape, t.layout) for t in architecture.taps] == [
        ("layer1", (8, 4, 4), "NCHW"),
        ("layer2", (16, 2, 2), "NCHW"),
        ("layer3", (24, 1, 1), "NCHW"),
    ]
    model = built(RESNET.with_taps(*given))
    assert len(model(RESNET.images(4), n_task=3)[0]) == 3


EARLY = [
    (RESNET, True),
    (CONVNEXT, True),
    (VIT, True),
    (SWIN, True),
    (DENSENET, True),
    (DENSENET.with_taps("features.transition1", "features.transition2"), True),
    (RESNET.with_taps("layer1", "layer2.0.conv2"), False),
    (RESNET.with_taps("layer2.0.conv1"), False),
    (VIT.with_taps("blocks.1.attn"), False),
    (CONVNEXT.with_taps("stages.1", "stages.2.blocks.0.conv_dw"), False),
    (DENSENET.with_taps("features.denseblock2.denselayer1"), False),
]


@pytest.mark.parametrize(("small", "early"), EARLY, ids=lambda v: str(getattr(v, "taps", v)))
@pytest.mark.parametrize("n_task", [1, 3])
def test_early_exit_is_found_by_running_and_both_ways_give_plain_answers(
    small: Small, early: bool, n_task: int
) -> None:
    architecture = small.architecture()
    assert architecture.early_exit is early
    # Evaluation mode: BatchNorm behind the last tap would see other rows in training.
    model = built(small).eval()
    images = small.images(5)
    with torch.no_grad():
        logits, membership = model(images, n_task=n_task)
        expected, maps = tapped(twin(small, model), architecture.taps, images)
        told = plain_head(model.head, architecture.taps, maps)
    assert logits.shape == (n_task, CLASSES)
    torch.testing.assert_close(logits, expected[:n_task], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(membership, told, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [("bn1",), ("layer1.0.bn1",), ("layer1.0.bn2",)])
def test_an_output_that_is_overwritten_in_place_never_reaches_the_head(
    taps: tuple[str, ...],
) -> None:
    """timm's ResNets follow these with an in-place ReLU or sum.

    With early exit only D's rows would be overwritten, and the head could tell D by that alone.
    """
    small = RESNET.with_taps(*taps)
    try:
        architecture = small.architecture()
    except UserError as error:
        assert taps[0] in str(error)
        return
    model = built(small).eval()
    images = small.images(6)
    with torch.no_grad():
        _, maps = tapped(twin(small, model), architecture.taps, images)
        told = plain_head(model.head, architecture.taps, maps)
        for n_task in (None, 3):
            torch.testing.assert_close(model(images, n_task=n_task)[1], told, rtol=1e-5, atol=1e-5)


def test_probing_leaves_the_backbone_as_it_was() -> None:
    for taps in (["layer2"], ["layer2.0.conv1"], ["layer2", "layer2.0"]):
        backbone = RESNET.plain().train()
        reference = RESNET.plain()
        reference.load_state_dict(backbone.state_dict())
        probe_taps(backbone, taps, (3, 16, 16))
        assert backbone.training
        images = RESNET.images(5)
        assert torch.equal(backbone.eval()(images), reference.eval()(images))
