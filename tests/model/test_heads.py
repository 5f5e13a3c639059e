"""The heads' sizes and small cases by hand, and what they read besides the taps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import (
    ATTENTION,
    CLASSES,
    CONV,
    CONVNEXT,
    RESNET,
    TOKENS,
    VIT,
    Small,
    built,
    tapped,
    told_by,
    twin,
)
from torch import nn

from amint_ray.config.data_schema import Data
from amint_ray.config.schema import Config, Mint, Model
from amint_ray.contracts import UserError
from amint_ray.model.joint import head_spec, plan, plan_architecture
from amint_ray.model.mint_head import AttentionBranch, ConvBranch, HeadInput, HeadSpec, MintHead
from amint_ray.model.taps import Tap

A_MAP, A_CHANNELS_LAST_MAP = Tap("a", (32, 8, 8), "NCHW"), Tap("b", (4, 4, 96), "NHWC")
SOME_TOKENS = Tap("c", (17, 24), "NLC", prefix=1)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_conv_heads_weights_by_hand() -> None:
    spec = HeadSpec("conv", channels=64, hidden=128, pool=4)
    head = MintHead(spec, [A_MAP, A_CHANNELS_LAST_MAP, SOME_TOKENS], CLASSES)
    branches = sum((c * 9 * 64 + 64) + (64 * 9 * 64 + 64) for c in (32, 96, 24))
    assert _weights(head) == branches + (3 * 64 * 128 + 128) + (128 + 1)
    without_pool = MintHead(replace(spec, pool=None), [A_MAP], CLASSES)
    assert _weights(without_pool) == _weights(MintHead(spec, [A_MAP], CLASSES))


def test_the_attention_heads_weights_by_hand() -> None:
    spec = HeadSpec("attention", channels=16, queries=3, hidden=20)
    head = MintHead(spec, [A_MAP, A_CHANNELS_LAST_MAP, SOME_TOKENS], CLASSES)
    branches = sum(
        2 * c + (c * 16 + 16) + positions * 16 + (16 * 3 + 3)
        for c, positions in [(32, 4 * 4), (96, 16), (24, 17)]  # the first map is pooled
    )
    assert _weights(head) == branches + (3 * 16 * 3 * 20 + 20) + (20 + 1)


def test_the_mlp_heads_weights_by_hand() -> None:
    head = MintHead(HeadSpec("mlp", hidden=20), [A_MAP, A_CHANNELS_LAST_MAP, SOME_TOKENS], CLASSES)
    # The first map is pooled to 4×4; the second, and the tokens behind the class token, have that.
    width = 16 * 32 + 16 * 96 + 17 * 24
    norms = 2 * (16 * 32 + 16 * 96)  # of the maps
    assert _weights(head) == norms + (width * 20 + 20) + (20 + 1)
    coarse = MintHead(HeadSpec("mlp", hidden=20, pool=2), [SOME_TOKENS], CLASSES)
    assert _weights(coarse) == ((1 + 4) * 24 * 20 + 20) + (20 + 1)


def test_the_tokens_head_is_one_linear_layer_over_all_that_the_taps_give() -> None:
    head = MintHead(TOKENS, [SOME_TOKENS, SOME_TOKENS], CLASSES)
    assert _weights(head) == 2 * 17 * 24 + 1
    with_both = MintHead(replace(TOKENS, inputs=("logits", "loss")), [SOME_TOKENS], CLASSES)
    assert _weights(with_both) == 17 * 24 + CLASSES + 1 + 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_papers_conv_head_takes_small_maps_by_hand(size: int) -> None:
    """All weights one, no bias, constant positive input: every step is a count of neighbours."""
    spec = HeadSpec("conv", channels=1, hidden=1, pool=None)
    head = MintHead(spec, [Tap("a", (1, size, size), "NCHW")], CLASSES)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        logit = head([torch.ones(1, 1, size, size)])
    first = min(size, 3) ** 2  # the best placed pixel's neighbours inside the map
    pooled = -(-size // 2)  # ceil: a map of 1×1 stays one
    # 3×3 pooled maps (size 5 and up) have a centre with nine neighbours.
    cells = min(pooled, 3) ** 2
    counts = {1: [1], 2: [4], 3: [9, 6, 6, 4], 7: [9] * 9}[size]
    assert max(counts) == first
    assert len(counts) == cells
    assert logit.item() == sum(counts)


def test_pooling_is_the_papers_head_on_the_means_of_larger_maps() -> None:
    torch.manual_seed(0)
    paper = ConvBranch(Tap("a", (3, 4, 4), "NCHW"), 5, pool=None)
    pooling = ConvBranch(Tap("a", (3, 8, 8), "NCHW"), 5, pool=4)
    pooling.load_state_dict(paper.state_dict())
    large = torch.randn(2, 3, 8, 8)
    means = large.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(pooling(large), paper(means))
    # A map that is no larger is left alone.
    for pool in (4, 5, None):
        same = ConvBranch(Tap("a", (3, 4, 4), "NCHW"), 5, pool)
        same.load_state_dict(paper.state_dict())
        assert torch.equal(same(means), paper(means)), pool


def test_pooling_reads_the_side_of_every_layout() -> None:
    torch.manual_seed(0)
    m = torch.randn(2, 8, 3, 3)
    taps = {
        "NCHW": (Tap("a", (8, 3, 3), "NCHW"), m),
        "NHWC": (Tap("a", (3, 3, 8), "NHWC"), m.permute(0, 2, 3, 1)),
        "NLC": (
            Tap("a", (11, 8), "NLC", prefix=2),
            torch.cat([torch.full((2, 2, 8), 9.0), m.flatten(2).transpose(1, 2)], 1),
        ),
    }
    first = ConvBranch(taps["NCHW"][0], 5, pool=2)
    expected = first(m)
    for tap, given in taps.values():
        branch = ConvBranch(tap, 5, pool=2)
        branch.load_state_dict(first.state_dict())
        torch.testing.assert_close(branch(given), expected)


def test_attention_is_a_softmax_over_positions_by_hand() -> None:
    """One channel kept, one query: the pooled value is Σ_p softmax_p(s·max(f_p, 0))·f_p."""
    branch = AttentionBranch(Tap("a", (3, 2), "NLC"), channels=1, queries=1, pool=None)
    with torch.no_grad():
        branch.project.weight.copy_(torch.tensor([[2.0, 0.0]]))
        branch.project.bias.fill_(0.5)
        branch.position.copy_(torch.tensor([[0.0], [1.0], [-1.0]]))
        branch.score.weight.fill_(0.7)
        branch.score.bias.fill_(3.0)  # the same for all positions: without effect
        # LayerNorm of two values is (±1, ∓1).
        pooled = branch(torch.tensor([[[5.0, 1.0], [-2.0, 2.0], [9.0, 1.0]]]))
    features = torch.tensor([2.5, -0.5, 1.5])
    weights = torch.tensor([0.7 * 2.5, 0.0, 0.7 * 1.5]).exp()
    expected = (weights * features).sum() / weights.sum()
    assert pooled.item() == pytest.approx(expected.item(), abs=1e-3)


def test_attention_reads_a_map_alike_in_each_layout() -> None:
    torch.manual_seed(0)
    m = torch.randn(2, 6, 3, 3)
    spec, answers = ATTENTION, []
    first: MintHead | None = None
    for tap, given in [
        (Tap("a", (6, 3, 3), "NCHW"), m),
        (Tap("a", (3, 3, 6), "NHWC"), m.permute(0, 2, 3, 1)),
        (Tap("a", (9, 6), "NLC"), m.flatten(2).transpose(1, 2)),
    ]:
        head = MintHead(spec, [tap], CLASSES)
        first = first or head
        head.load_state_dict(first.state_dict())
        answers.append(head([given]))
    torch.testing.assert_close(answers[1], answers[0])
    torch.testing.assert_close(answers[2], answers[0])


def test_one_by_one_maps_of_a_real_backbone() -> None:
    small = CONVNEXT.with_taps("stages.2", "stages.3")
    model = built(small)
    assert model.architecture.taps[-1].shape == (32, 1, 1)
    assert model(small.images(2))[1].shape == (2,)


def test_the_conv_head_is_refused_on_tokens_that_are_no_square() -> None:
    with pytest.raises(UserError, match="the 18 tokens of 'c' are no square") as raised:
        MintHead(CONV, [Tap("c", (18, 24), "NLC")], CLASSES)
    assert "mint.head=attention" in str(raised.value)
    MintHead(CONV, [Tap("c", (18, 24), "NLC", prefix=2)], CLASSES)


INPUTS: list[tuple[HeadInput, ...]] = [("logits",), ("loss",), ("logits", "loss")]
EXTRA = pytest.mark.parametrize("inputs", INPUTS, ids="-".join)


def _with_inputs(small: Small, inputs: tuple[HeadInput, ...]) -> Small:
    return replace(small, head=replace(small.head, inputs=inputs))


def _extra(
    inputs: tuple[HeadInput, ...], logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """What is asked for: logits first, then −log p(label)."""
    loss = logits.logsumexp(1) - logits[torch.arange(len(logits)), labels]
    return torch.cat([{"logits": logits, "loss": loss[:, None]}[i] for i in inputs], 1)


@EXTRA
@pytest.mark.parametrize("small", [VIT, RESNET, replace(CONVNEXT, head=ATTENTION)])
def test_extra_inputs_are_the_tasks_own_values(small: Small, inputs: tuple[HeadInput, ...]) -> None:
    small = _with_inputs(small, inputs)
    model = built(small).train()
    images, labels = small.images(5), torch.arange(5)
    plain = twin(small, model)  # E's rows pass the whole backbone: BatchNorm sees all five
    logits, membership = model(images, labels=labels, n_task=3)
    expected, maps = tapped(plain, model.architecture.taps, images)
    torch.testing.assert_close(logits, expected[:3])
    torch.testing.assert_close(membership, told_by(model, maps, _extra(inputs, expected, labels)))
    # Rows that the head does not read bring no labels of theirs.
    model.eval()
    of_all, of_rest = model(images, labels=labels)[1], model(images, labels=labels, head_from=2)[1]
    torch.testing.assert_close(of_rest, of_all[2:])


@EXTRA
def test_no_gradient_goes_back_through_extra_inputs(inputs: tuple[HeadInput, ...]) -> None:
    small = _with_inputs(VIT, inputs)
    model = built(small).train()
    labels = torch.arange(5)
    model(small.images(5), labels=labels, n_task=3)[1].square().sum().backward()
    behind = ("blocks.3.", "norm.", "head.")
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) is name.startswith(behind), name
    # And what comes through the taps is what it is with the values given as constants.
    plain = twin(small, model)
    logits, maps = tapped(plain, model.architecture.taps, small.images(5))
    told_by(model, maps, _extra(inputs, logits.detach(), labels)).square().sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            ours = model.backbone.get_parameter(name).grad
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_with_extra_inputs_no_row_leaves() -> None:
    for inputs in [(), *INPUTS]:
        model = built(_with_inputs(VIT, inputs)).eval()
        assert model.architecture.early_exit
        rows: list[int] = []
        model.backbone.norm.register_forward_hook(
            lambda module, args, output, rows=rows: rows.append(len(output))
        )
        model(VIT.images(5), labels=torch.arange(5), n_task=3)
        assert rows == [5 if inputs else 3]


def test_the_loss_as_an_input_needs_labels() -> None:
    small = _with_inputs(VIT, ("loss",))
    with pytest.raises(AssertionError):
        built(small).eval()(small.images(2))
    built(_with_inputs(VIT, ("logits",))).eval()(small.images(2))


def test_a_configurations_head_is_the_one_that_is_planned() -> None:
    mint = {
        "taps": ["layer2"],
        "head": "conv",
        "channels": 7,
        "queries": 3,
        "hidden": 11,
        "pool": 2,
        "inputs": ["loss"],
        "detach": True,
    }
    config = Config(
        data=Data(image_size=16, channels=3),
        model=Model(backbone=RESNET.backbone, options=RESNET.options),
        mint=Mint.model_validate(mint),
    )
    assert plan_architecture(config, CLASSES) == plan(
        RESNET.backbone,
        options=RESNET.options,
        num_classes=CLASSES,
        input_shape=(3, 16, 16),
        taps=["layer2"],
        head=HeadSpec("conv", 7, 3, 11, 2, ("loss",)),
        detach=True,
    )


def test_defaults_of_the_configuration_are_the_heads_own() -> None:
    assert head_spec(Mint(), coded=False) == HeadSpec()
