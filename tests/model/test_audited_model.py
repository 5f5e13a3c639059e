"""The model as one: hooks that change nothing in evaluation and keep nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from small_models import ATTENTION, CONVNEXT, RESNET, SWIN, VIT, Small, built, tapped, told_by, twin

from amint_ray.model.joint import Architecture, AuditedModel

ALL = pytest.mark.parametrize(
    "small",
    [VIT, CONVNEXT, RESNET, SWIN, *(replace(s, head=ATTENTION) for s in (VIT, RESNET, SWIN))],
    ids=lambda s: f"{s.backbone}-{s.head.kind}",
)


@ALL
def test_evaluation_equals_the_untapped_backbone_bit_for_bit(small: Small) -> None:
    model = built(small).eval()
    images = small.images(5)
    with torch.no_grad():
        logits, membership = model(images)
        expected, maps = tapped(twin(small, model), model.architecture.taps, images)
        told = told_by(model, maps)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(membership, told, rtol=1e-5, atol=1e-6)
    assert membership.std() > 0


@ALL
def test_a_training_pass_leaves_no_state_behind(small: Small) -> None:
    model = built(small)
    images = small.images(6)
    model.train()(images, n_task=2)
    model.eval()
    assert model._taps._keep is None
    assert not model._taps._read
    with torch.no_grad():
        logits, membership = model(images)
        assert torch.equal(logits, twin(small, model)(images))
    assert len(logits) == len(membership) == 6


def test_without_mint_the_head_is_not_run() -> None:
    model = built(VIT).eval()
    model.head.register_forward_pre_hook(lambda module, args: pytest.fail("the head ran"))
    logits, membership = model(VIT.images(3), n_task=3, mint=False)
    assert membership is None
    assert torch.equal(logits, twin(VIT, model)(VIT.images(3)))


def _fails(module: torch.nn.Module, args: object) -> None:
    raise RuntimeError("on purpose")


def test_a_pass_that_raises_leaves_no_state_behind() -> None:
    model = built(VIT).eval()
    seen: list[weakref.ref[torch.Tensor]] = []
    model.backbone.get_submodule("blocks.2").register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(output))
    )
    broken = model.backbone.get_submodule("blocks.3").register_forward_pre_hook(_fails)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="on purpose"):
            model(VIT.images(4), n_task=2)
        broken.remove()
        gc.collect()
        assert model._taps._keep is None
        assert not model._taps._read
        assert [alive() for alive in seen] == [None]
        assert torch.equal(model(VIT.images(4))[0], twin(VIT, model)(VIT.images(4)))


def test_activations_do_not_outlive_a_pass() -> None:
    model = built(CONVNEXT).eval()
    seen: list[weakref.ref[torch.Tensor]] = []
    for tap in model.architecture.taps:
        model.backbone.get_submodule(tap.name).register_forward_hook(
            lambda module, args, output: seen.append(weakref.ref(output))
        )
    with torch.no_grad():
        model(CONVNEXT.images(3))
    gc.collect()
    assert [alive() for alive in seen] == [None, None]


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_a_copy_is_independent(by: str) -> None:
    model = built(CONVNEXT).eval()
    images = CONVNEXT.images(4)
    before = [t.detach().clone() for t in model(images)]
    other = copy.deepcopy(model) if by == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert all(torch.equal(a, b) for a, b in zip(other(images), before, strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # Hooks that still wrote into the first model's reader would give the copy the wrong taps.
    assert all(torch.equal(a, b) for a, b in zip(other(images), before, strict=True))
    assert len(other.train()(images, n_task=1)[0]) == 1
    assert float(model(images)[0].detach().abs().max()) == 0


@pytest.mark.parametrize(
    "small",
    [VIT, replace(VIT, head=ATTENTION), CONVNEXT, replace(SWIN, head=ATTENTION), RESNET],
    ids=lambda s: f"{s.backbone}-{s.head.kind}",
)
def test_export_with_a_dynamic_batch_equals_eager(small: Small) -> None:
    model = built(small).eval()
    program = torch.export.export(
        model, (small.images(2),), dynamic_shapes=({0: torch.export.Dim("n")},)
    ).module()
    for n in (1, 7):
        images = small.images(n, seed=n)
        with torch.no_grad():
            for exported, eager in zip(program(images), model(images), strict=True):
                assert exported.shape == eager.shape
                torch.testing.assert_close(exported, eager, rtol=1e-5, atol=1e-6)


@ALL
def test_json_and_weights_rebuild_the_model(small: Small) -> None:
    model = built(small).eval()
    architecture = Architecture.from_json(model.architecture.to_json())
    assert architecture == model.architecture
    torch.manual_seed(99)
    again = AuditedModel(architecture).eval()
    images = small.images(3)
    assert not torch.equal(again(images)[0], model(images)[0])
    again.load_state_dict(model.state_dict())
    for a, b in zip(again(images), model(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"taps": []}', "3"])
def test_json_that_is_no_architecture_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not an architecture"):
        Architecture.from_json(text)


def test_an_unknown_field_in_the_json_is_a_value_error() -> None:
    text = VIT.architecture().to_json().replace('"early_exit"', '"exit_early"')
    with pytest.raises(ValueError, match="exit_early"):
        Architecture.from_json(text)


def test_the_head_does_not_advance_the_random_state() -> None:
    torch.manual_seed(3)
    model = built(RESNET, seed=3)
    del model
    torch.manual_seed(3)
    model = AuditedModel(RESNET.architecture())
    after = torch.rand(4)
    torch.manual_seed(3)
    plain = RESNET.plain()
    assert torch.equal(after, torch.rand(4))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[name]), name


def test_planning_draws_nothing_at_random() -> None:
    state = torch.get_rng_state()
    VIT.architecture()
    assert torch.equal(state, torch.get_rng_state())
