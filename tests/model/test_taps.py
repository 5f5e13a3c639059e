"""Where rows can leave, and that the head never sees the difference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import (
    ATTENTION,
    CLASSES,
    CONVNEXT,
    DENSENET,
    RESNET,
    SWIN,
    VIT,
    Small,
    built,
    tapped,
    told_by,
    twin,
)
from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.survey import survey
from amint_ray.model.taps import Tap, allows_exit

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
    # The dense layers behind it read what came before it, too.
    (DENSENET.with_taps("features.denseblock2.denselayer1"), False),
]


@pytest.mark.parametrize(("small", "early"), EARLY, ids=lambda v: str(getattr(v, "taps", v)))
def test_early_exit_is_found_by_running_and_both_ways_give_plain_answers(
    small: Small, early: bool
) -> None:
    # Evaluation mode: BatchNorm behind the last tap would see other rows in training.
    model = built(replace(small, head=ATTENTION)).eval()
    assert model.architecture.early_exit is early
    images = small.images(5)
    with torch.no_grad():
        expected, maps = tapped(twin(small, model), model.architecture.taps, images)
        told = told_by(model, maps)
        for n_task, head_from in [(1, 0), (3, 0), (3, 2), (2, 3)]:
            logits, membership = model(images, n_task=n_task, head_from=head_from)
            assert logits.shape == (n_task, CLASSES)
            torch.testing.assert_close(logits, expected[:n_task], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(membership, told[head_from:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [("conv1",), ("layer1.0.act1",), ("layer1.0.conv2",)])
def test_a_tap_next_to_what_works_in_place_reads_what_it_gave(taps: tuple[str, ...]) -> None:
    """With early exit only D's rows would be overwritten: the head could tell D by that alone."""
    small = replace(RESNET, taps=taps, head=ATTENTION)
    model = built(small).eval()
    images = small.images(6)
    with torch.no_grad():
        _, maps = tapped(twin(small, model), model.architecture.taps, images)
        for n_task in (None, 3):
            torch.testing.assert_close(model(images, n_task=n_task)[1], told_by(model, maps))


@pytest.mark.parametrize("name", ["bn1", "layer1.0.bn1", "layer1.0.bn2"])
def test_an_output_that_is_overwritten_in_place_never_reaches_the_head(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' gives what a later module overwrites"):
        RESNET.with_taps(name).architecture()


class _Aside(nn.Module):
    """A module beside the way to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.aside = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.trunk(images)
        self.aside(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("name", "early"), [("trunk", True), ("aside", False)])
def test_rows_do_not_leave_where_that_leaves_the_logits_as_they_are(name: str, early: bool) -> None:
    backbone = _Aside()
    (site,) = [site for site in survey(backbone, (3, 8, 8)) if site.name == name]
    assert allows_exit(backbone, [Tap.at(site)], (3, 8, 8)) is early


@pytest.mark.parametrize("names", [["layer2"], ["layer2.0.conv1"], ["layer2.0", "layer2"]])
def test_looking_for_the_exit_leaves_the_backbone_as_it_was(names: list[str]) -> None:
    with torch.device("meta"):
        backbone = RESNET.plain().eval()
        sites = {site.name: site for site in survey(backbone, (3, 16, 16))}
        early = allows_exit(backbone, [Tap.at(sites[name]) for name in names], (3, 16, 16))
    assert early is (names != ["layer2.0.conv1"])
    assert not backbone.training
    assert not any(module._forward_hooks for module in backbone.modules())


WATCHED = [
    (VIT, True),
    (replace(CONVNEXT, head=ATTENTION), True),
    (VIT.with_taps("blocks.1.attn"), False),
    # BatchNorm behind the tap sees all rows here.
    (RESNET.with_taps("layer1", "layer2.0.conv1"), False),
    (replace(VIT, head=replace(VIT.head, inputs=("logits", "loss"))), True),
]


@pytest.mark.parametrize(("small", "early"), WATCHED, ids=lambda v: str(getattr(v, "taps", v)))
def test_watched_gradients_are_those_at_the_last_taps_output(small: Small, early: bool) -> None:
    model = built(small).train()
    assert model.architecture.early_exit is early
    images, labels = small.images(5), torch.arange(5)

    plain = twin(small, model)
    logits, maps = tapped(plain, model.architecture.taps, images)
    extra = []
    if model.architecture.head.inputs:
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        extra = [logits.detach(), losses.detach()[:, None]]
    losses = logits[:3].exp().sum(), told_by(model, maps, *extra).square().sum()
    of_task, of_mint = (torch.autograd.grad(x, maps[-1], retain_graph=True)[0] for x in losses)

    seen: list[tuple[int, torch.Tensor]] = []
    model.watch_gradients(lambda which, gradient: seen.append((which, gradient.clone())))
    logits, membership = model(images, labels=labels, n_task=3)
    assert seen == []
    (2 * logits.exp().sum() + 3 * membership.square().sum()).backward()
    got = dict(seen)
    assert sorted(which for which, _ in seen) == [0, 1]
    leave = early and not extra
    torch.testing.assert_close(got[0], 2 * of_task[: 3 if leave else 5], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[1], 3 * of_mint, rtol=1e-4, atol=1e-6)
    assert got[0].any()
    assert got[1].any()


def test_watching_changes_neither_answers_nor_gradients() -> None:
    for small in (VIT, RESNET):
        watched, free = built(small).train(), built(small).train()
        watched.watch_gradients(lambda which, gradient: None)
        for model in (watched, free):
            logits, membership = model(small.images(5), n_task=3)
            (logits.exp().sum() + membership.square().sum()).backward()
        for (name, p), q in zip(watched.named_parameters(), free.parameters(), strict=True):
            assert (p.grad is None) is (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
        # Nothing is recorded where nothing is differentiated.
        watched.watch_gradients(lambda which, gradient: pytest.fail("recorded"))
        with torch.no_grad():
            watched(small.images(5), n_task=3)
