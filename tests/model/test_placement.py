"""What `mint.taps` may say, what it means, and what is refused in one line."""

from __future__ import annotations

import pytest
import torch
from small_models import CLASSES, CONVNEXT, DENSENET, RESNET, SWIN, VIT, Small
from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.mint_head import HeadSpec, MintHead
from amint_ray.model.placement import resolve
from amint_ray.model.survey import survey
from amint_ray.model.taps import Tap

FOUR_BLOCKS = {
    "entry": ["blocks.0", "blocks.1"],
    "middle": ["blocks.1", "blocks.2"],
    "output": ["blocks.2", "blocks.3"],
}


def _names(small: Small, *wanted: str) -> list[str]:
    with torch.device("meta"):
        backbone = small.plain()
        sites = survey(backbone, (small.channels, small.size, small.size))
        return [site.name for site in resolve(backbone, sites, wanted)]


def _line(small: Small) -> str:
    with pytest.raises(UserError) as raised:
        small.architecture()
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("word", FOUR_BLOCKS)
def test_words_mean_stages_or_blocks_by_rank(word: str) -> None:
    assert _names(VIT, word) == FOUR_BLOCKS[word]
    stage = {"entry": 1, "middle": 2, "output": 3}[word]
    assert _names(RESNET, word) == [f"layer{stage}", f"layer{stage + 1}"]
    assert _names(CONVNEXT, word) == [f"stages.{stage - 1}", f"stages.{stage}"]
    twelve = VIT.with_options(depth=12)
    assert _names(twelve, word) == [f"blocks.{3 * stage - 1}", f"blocks.{3 * stage + 2}"]


class _Plain(nn.Module):
    """No feature info: four equal blocks in a row, or a single one."""

    def __init__(self, *, repeated: bool) -> None:
        super().__init__()
        four = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(4)]
        self.blocks = nn.Sequential(*four) if repeated else four[0]
        self.head = nn.Linear(3, CLASSES, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(images).mean((2, 3)))


def test_without_feature_info_words_mean_depths_among_blocks_or_else_all_modules() -> None:
    backbone = _Plain(repeated=True)
    sites = survey(backbone, (3, 16, 16))
    for word, expected in FOUR_BLOCKS.items():
        assert [site.name for site in resolve(backbone, sites, [word])] == expected
    backbone = _Plain(repeated=False)
    sites = survey(backbone, (3, 16, 16))
    # All three modules end where the one convolution does; of such the outermost are taken.
    for word in FOUR_BLOCKS:
        names = [site.name for site in resolve(backbone, sites, [word])]
        assert names == ["blocks.1", "blocks"], word


def test_a_backbone_without_two_modules_to_tap_is_told() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, CLASSES, 4), nn.Flatten())
    sites = survey(backbone, (3, 4, 4))
    with pytest.raises(UserError, match=r"mint\.taps = entry: the backbone has no two modules"):
        resolve(backbone, sites, ["entry"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("layer3", "layer1", "layer2"), ["layer1", "layer2", "layer3"]),
        (("layer[1-3]",), ["layer1", "layer2", "layer3"]),
        (("layer?",), ["layer1", "layer2", "layer3", "layer4"]),
        (("output", "layer1"), ["layer1", "layer3", "layer4"]),
        (("layer3.*.conv1", "entry"), ["layer1", "layer2", "layer3.0.conv1"]),
        (("entry", "output"), ["layer1", "layer2", "layer3", "layer4"]),
        (("*4",), ["layer4"]),
    ],
)
def test_names_globs_and_words_mix_in_any_order(
    wanted: tuple[str, ...], expected: list[str]
) -> None:
    assert _names(RESNET, *wanted) == expected
    assert _names(RESNET, *reversed(wanted)) == expected


def test_a_glob_passes_over_what_cannot_be_tapped() -> None:
    assert _names(VIT, "blocks.1.norm?") == ["blocks.1.norm1", "blocks.1.norm2"]
    # Both norms are overwritten in place, as is fc's input, which is no map either.
    assert _names(RESNET, "layer1.0.[bc]*") == ["layer1.0.conv1", "layer1.0.conv2"]
    assert _names(RESNET, "*[4c]") == ["layer4"]


def test_taps_of_the_architecture_are_in_order_of_execution() -> None:
    architecture = RESNET.with_taps("layer3", "layer1", "layer2").architecture()
    assert [(t.name, t.shape, t.layout) for t in architecture.taps] == [
        ("layer1", (8, 4, 4), "NCHW"),
        ("layer2", (16, 2, 2), "NCHW"),
        ("layer3", (24, 1, 1), "NCHW"),
    ]
    assert architecture == RESNET.with_taps("layer[1-3]").architecture()


@pytest.mark.parametrize(
    ("wanted", "both"),
    [
        (("middle", "layer3"), ("'layer3'", "'middle'")),
        (("layer?", "layer2"), ("'layer2'", "'layer?'")),
        (("entry", "middle"), ("'middle'", "'entry'")),
        (("layer3", "layer3"), ("'layer3'", "'layer3'")),
    ],
)
def test_one_module_meant_twice_is_told_with_both_words(
    wanted: tuple[str, ...], both: tuple[str, str]
) -> None:
    assert f"mint.taps: {both[0]} and {both[1]} both mean module 'layer" in _line(
        RESNET.with_taps(*wanted)
    )


def test_an_unknown_module_is_told_with_near_names() -> None:
    line = _line(RESNET.with_taps("layer2", "layer33"))
    assert "mint.taps: the backbone has no module 'layer33'" in line
    assert "layer3" in line.split("near names: ")[1].split(", ")


def test_a_misspelt_placement_is_told_with_the_word() -> None:
    assert _line(VIT.with_taps("middel")).split("near names: ")[1].split(", ")[0] == "middle"


def test_a_name_like_nothing_is_told_with_the_backbones_modules() -> None:
    line = _line(VIT.with_taps("~~~~"))
    assert "its modules begin with: patch_embed, pos_drop, " in line
    assert line.endswith(", head")


@pytest.mark.parametrize("glob", ["blocks.9*", "head*", "[xyz]"])
def test_a_glob_that_matches_nothing_is_told(glob: str) -> None:
    line = _line(VIT.with_taps("blocks.1", glob))
    assert line == f"mint.taps: no module that can be tapped matches {glob!r}"


class _Several(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, x]


class _Odd(nn.Module):
    """A shared activation, a module that never runs, others that give a pair, a list, a vector, a
    number, or something that is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.shared, self.hasty = nn.GELU(), nn.ReLU(inplace=True)
        self.pair, self.several = nn.LSTM(8, 8, batch_first=True), _Several()
        self.whole, self.vector = nn.Flatten(0, 2), nn.Linear(3, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.hasty(self.second(self.shared(self.first(images))))
        self.pair(x[:, 0])
        self.several(x)
        self.whole(x)
        return self.vector(self.shared(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        ("shared", "'shared' runs 2 times"),
        ("never", "'never' runs 0 times"),
        ("several", "'several' gives list for 3 images"),
        ("vector", r"'vector' gives \(3, 5\) for 3 images"),
        ("whole", r"'whole' gives \(72, 8\) for 3 images"),
        ("second", "'second' gives what a later module overwrites in place"),
    ],
)
def test_a_module_that_cannot_be_tapped_is_told(tap: str, words: str) -> None:
    backbone = _Odd()
    sites = survey(backbone, (3, 8, 8))
    with pytest.raises(UserError, match=f"mint.taps: module {words}"):
        resolve(backbone, sites, [tap])
    assert [site.name for site in resolve(backbone, sites, ["*"])] == ["first", "hasty", "pair"]


def test_modules_of_real_backbones_that_cannot_be_tapped_are_told() -> None:
    assert "'bn1' gives what a later module overwrites" in _line(RESNET.with_taps("bn1"))
    assert "'fc' gives (3, 5) for 3 images" in _line(RESNET.with_taps("fc"))
    assert _names(RESNET, "act1") == ["act1"]  # which does the overwriting
    # Windows are not mistaken for images.
    assert "gives (" in _line(SWIN.with_taps("layers.0.blocks.0.attn"))
    denselayer = "features.denseblock2.denselayer1"
    assert _names(DENSENET, denselayer) == [denselayer]


def test_an_unknown_backbone_and_an_unknown_option_are_told() -> None:
    line = _line(Small("resnet19", {}))
    assert "model.backbone = 'resnet19': timm has no such model" in line
    assert "resnet18" in line.split("near names: ")[1].split(", ")
    assert "near names" not in _line(Small("~~~~", {}))
    line = _line(RESNET.with_options(depht=3))
    assert "resnet18" in line
    assert "depht" in line.split("}: ")[1]
    assert "model.options: checkpoint_path must not be set" in _line(
        RESNET.with_options(checkpoint_path="x")
    )


def test_a_conv_head_on_tokens_that_are_no_square_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        UserError, match=r"the 8 tokens of .a. are no square; use mint\.head=attention"
    ):
        MintHead(HeadSpec(kind="conv"), [Tap("a", (8, 6), "NLC", prefix=1)], CLASSES)
