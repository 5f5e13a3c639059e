"""timm's families, one by one: placements, a joint step, weights that come back, plain answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_models import CLASSES, Small, twin
from torch import nn
from zoo import ALL

from amint_ray.model.backbone import create_backbone
from amint_ray.model.joint import Architecture, AuditedModel
from amint_ray.model.placement import PLACEMENTS, resolve
from amint_ray.model.survey import survey
from amint_ray.train.state import save_weights

ROWS, OF_D = 5, 3
STEPS = [(small, list(PLACEMENTS)[i % 3]) for i, small in enumerate(ALL)]
OFTEN = {"resnet50", "densenet121", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"}
STEPS += [
    (small, word)
    for small in ALL
    for word in PLACEMENTS
    if small.backbone in OFTEN and (small, word) not in STEPS
]
STAY = ["hrnet_w18_small", "tnt_s_legacy_patch16_224"]
"""Rows cannot leave from their middle."""
DEPENDS = ["mvitv2_tiny", "twins_pcpvt_small"]
"""Whether rows can leave depends on the placement; from all others in the zoo they can."""


def _id(value: object) -> str:
    return value.backbone if isinstance(value, Small) else str(value)


def _finished(backbone: nn.Module, images: torch.Tensor) -> list[str]:
    """Names of the modules that a pass runs, as they finish."""
    names: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: names.append(name))
        for name, module in backbone.named_modules()
    ]
    with torch.no_grad():
        backbone.eval()(images)
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize("small", ALL, ids=_id)
def test_each_placement_is_two_modules_in_order_of_execution(small: Small) -> None:
    shape = (small.channels, small.size, small.size)
    with torch.device("meta"):
        backbone = create_backbone(
            small.backbone, num_classes=CLASSES, channels=3, options=small.options
        )
        sites = survey(backbone, shape)
        order = _finished(backbone, torch.zeros(2, *shape))
    pairs = {word: resolve(backbone, sites, [word]) for word in PLACEMENTS}
    for word, pair in pairs.items():
        assert len({site.name for site in pair}) == 2, word
        assert order.index(pair[0].name) < order.index(pair[1].name), word
        assert 0 < pair[0].depth <= pair[1].depth <= 1, word
    assert pairs["entry"][1].depth <= pairs["output"][1].depth
    assert pairs["entry"] != pairs["output"]


def _behind(
    backbone: nn.Module, last: str, run: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, list[tuple[str, tuple[int, ...]]]]:
    """What `run` gives, and each module that begins behind the last tap with its input's shape."""
    began: list[tuple[str, tuple[int, ...]]] = []
    behind = False

    def begin(name: str, args: tuple[object, ...]) -> None:
        if behind:
            began.extend((name, tuple(a.shape)) for a in args if isinstance(a, torch.Tensor))

    def reach() -> None:
        nonlocal behind
        behind = True

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: begin(name, args))
        for name, module in backbone.named_modules()
    ]
    handles.append(
        backbone.get_submodule(last).register_forward_hook(lambda module, args, output: reach())
    )
    result = run()
    for handle in handles:
        handle.remove()
    return result, began


def _trained(module: nn.Module) -> set[str]:
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    assert any(gradient.any() for gradient in gradients.values())
    module.zero_grad()
    return set(gradients)


@pytest.mark.parametrize(("small", "word"), STEPS, ids=_id)
def test_a_joint_step_and_the_way_to_disk_and_back(small: Small, word: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AuditedModel(small.with_taps(word).architecture()).train()
    images, labels = small.images(ROWS), torch.arange(ROWS) % CLASSES
    last = model.architecture.taps[-1].name
    assert model.architecture.early_exit or small.backbone in STAY + DEPENDS

    def task_loss(logits: torch.Tensor) -> torch.Tensor:
        assert logits.shape == (OF_D, CLASSES)
        return F.cross_entropy(logits, labels[:OF_D])

    # Of plain training: which weights get a gradient, and the work behind the last tap.
    rows = OF_D if model.architecture.early_exit else ROWS
    plain, expected = _behind(model.backbone, last, lambda: model(images[:rows], mint=False)[0])
    task_loss(plain[:OF_D]).backward()
    with_gradient = _trained(model.backbone)

    (logits, membership), began = _behind(model.backbone, last, lambda: model(images, n_task=OF_D))
    assert began == expected
    told = F.binary_cross_entropy_with_logits(membership, (torch.arange(ROWS) < OF_D).float())
    (task_loss(logits) + told).backward()
    assert _trained(model.backbone) == with_gradient
    assert _trained(model.head) == {name for name, _ in model.head.named_parameters()}

    save_weights(model, tmp_path / "weights")
    again = AuditedModel(Architecture.from_json(model.architecture.to_json())).eval()
    with torch.no_grad():
        task, mint = model.eval()(images)
        assert not torch.equal(again(images)[1], mint)
        again.load_state_dict(load_file(tmp_path / "weights"))
        assert torch.equal(again(images)[0], task)
        assert torch.equal(again(images)[1], mint)
        assert torch.equal(twin(small, model)(images), task)


def _middle(backbone: str) -> Small:
    return next(small for small in ALL if small.backbone == backbone).with_taps("middle")


def _tells_right(model: AuditedModel, small: Small) -> None:
    images = small.images(ROWS)
    with torch.no_grad():
        logits, _ = model.eval()(images, n_task=OF_D)
        torch.testing.assert_close(logits, twin(small, model)(images)[:OF_D])


@pytest.mark.parametrize("backbone", STAY)
def test_some_do_not_let_rows_leave_and_give_the_right_answer(backbone: str) -> None:
    """HRNet has branches side by side; TNT's inner tokens are more than images."""
    model = AuditedModel(_middle(backbone).architecture())
    assert not model.architecture.early_exit
    _tells_right(model, _middle(backbone))


@pytest.mark.parametrize("backbone", ["mvitv2_tiny", "pit_ti_distilled_224"])
def test_rows_leave_with_all_that_a_block_hands_on(backbone: str) -> None:
    """MViTv2's blocks give tokens and the size of their grid, PiT's a map and class tokens."""
    model = AuditedModel(_middle(backbone).architecture())
    assert model.architecture.early_exit
    _tells_right(model, _middle(backbone))


def test_a_placement_within_a_residual_block_gives_way_to_the_block() -> None:
    """timm counts Xception's stages by an activation that only one of two branches reads."""
    small = _middle("legacy_xception")
    architecture = small.architecture()
    assert [tap.name for tap in architecture.taps] == ["block3.rep.0", "block12"]
    assert architecture.early_exit
    _tells_right(AuditedModel(architecture), small)
    # Who names the activation gets it.
    small = small.with_taps("block3.rep.0", "block12.rep.0")
    architecture = small.architecture()
    assert [tap.name for tap in architecture.taps] == ["block3.rep.0", "block12.rep.0"]
    assert not architecture.early_exit
    _tells_right(AuditedModel(architecture), small)
