"""The joint step of a head that says codes, against its formula written out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_setup import (
    CODES,
    CONVNEXT,
    RESNET,
    VIT,
    Backbone,
    architecture_of,
    config_of,
    data_set,
    streams_of,
)

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, ScoreBatch, UserError
from amint_ray.data.keys import codes, image_content
from amint_ray.data.loading import MemoryStreams
from amint_ray.evaluation.keyed import soft_p_values
from amint_ray.evaluation.metrics import auc
from amint_ray.evaluation.scores import concatenate, score
from amint_ray.model.joint import AuditedModel
from amint_ray.train.flops import count_flops
from amint_ray.train.objective import Objective
from amint_ray.train.step import SUMS, forward, split, train_step
from amint_ray.train.update import Update

BITS = 6
CPU = torch.device("cpu")
BACKBONES = pytest.mark.parametrize(
    "backbone", [VIT, CONVNEXT, RESNET], ids=["vit", "convnext", "resnet"]
)


def keyed(
    backbone: Backbone = CONVNEXT, objective: str = "keyed", head: str = "learned", **more: Any
) -> Config:
    mint = {"objective": objective, "keyed": {"bits": BITS, "head": head}}
    return config_of(backbone, mint=mint, **more)


def first_batch(config: Config, **where: int) -> Batch:
    batch = next(streams_of(config, **where).train_batches(0))
    return dataclasses.replace(batch, images=batch.images.double())


def codes_by_name() -> Mapping[str, np.ndarray]:
    return dict(zip(data_set()[1].sample_id.tolist(), CODES, strict=True))


def roles_by_name() -> Mapping[str, str]:
    manifest = data_set()[1]
    return dict(zip(manifest.sample_id.tolist(), manifest.role.tolist(), strict=True))


def test_each_row_has_the_code_of_its_image_and_rows_of_e_train_none() -> None:
    batch, of, role = first_batch(keyed(objective="both")), codes_by_name(), roles_by_name()
    assert batch.code is not None and batch.coded is not None
    names = batch.sample_id.tolist()
    assert {role[name] for name in names} == {"member", "withheld", "external"}
    assert batch.code.tolist() == [of[name][:BITS].tolist() for name in names]
    assert batch.coded.tolist() == [role[name] == "member" for name in names]


def test_a_keyed_head_alone_has_no_external_rows() -> None:
    config = keyed()
    batch, role = first_batch(config), roles_by_name()
    assert len(batch.images) == batch.n_task
    assert {role[name] for name in batch.sample_id.tolist()} == {"member", "withheld"}
    flops = count_flops(architecture_of(config), n_task=9, n_rows=9)
    head = architecture_of(config)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AuditedModel(head).head.parameters() if p.ndim > 1)
    # Forward and both gradients of a head of fully connected layers: six times its weights a row.
    assert flops.joint - flops.task <= 6 * 9 * weights


@BACKBONES
@pytest.mark.parametrize("head", ["learned", "fixed"])
@pytest.mark.parametrize("objective", ["keyed", "both"])
def test_loss_and_gradients_are_those_of_the_formula(
    backbone: Backbone, head: str, objective: str
) -> None:
    torch.manual_seed(0)
    config = keyed(backbone, objective, head)
    model = AuditedModel(architecture_of(config)).double().eval()  # in train() BatchNorm mixes rows
    batch, role = first_batch(config), roles_by_name()
    assert batch.code is not None
    loss, sums = forward(model, batch, Objective())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model.backbone(batch.images[: batch.n_task])
    task = F.cross_entropy(logits, batch.labels[: batch.n_task])
    _, said = model(batch.images)
    assert said is not None
    of = [role[name] for name in batch.sample_id.tolist()]
    trained = ("member",) if head == "learned" else ("member", "withheld")
    rows = [i for i, each in enumerate(of) if each in trained]
    probability = torch.sigmoid(said[rows][:, -BITS:])
    truth = batch.code[rows].double()
    mint = -(truth * probability.log() + (1 - truth) * (1 - probability).log()).mean()
    if objective == "both":
        told = [i for i, each in enumerate(of) if each != "withheld"]
        member = torch.tensor([float(of[i] == "member") for i in told])
        mint = mint + F.binary_cross_entropy_with_logits(said[told, 0], member.double())
    (task + mint).backward()
    assert loss.item() == pytest.approx((task + mint).item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = found.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=name)
    by_name = dict(zip(SUMS, sums.tolist(), strict=True))
    assert by_name["code_bits"] == len(rows) * BITS
    assert by_name["code_matches"] == int(((probability > 0.5) == (truth > 0.5)).sum())


@BACKBONES
def test_a_fixed_code_is_read_off_what_the_classifier_reads(backbone: Backbone) -> None:
    config = keyed(backbone, head="fixed")
    model = AuditedModel(architecture_of(config)).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        maps = model.backbone.forward_features(images)
        features = model.backbone.forward_head(maps, pre_logits=True)
        centred = features - features.mean(1, keepdim=True)
        unit = centred / centred.norm(dim=1, keepdim=True)
        assert model.head.code is not None
        wanted = unit @ model.head.code.directions.T
        said = model.membership(images)
    assert list(model.head.parameters()) == []
    copied = copy.deepcopy(model.train())  # of which no batch is a part
    assert torch.equal(copied.eval().membership(images), said)
    ratio = said / wanted
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert model.head.code.directions.shape == (BITS, features.shape[1])
    again = AuditedModel(architecture_of(config))
    assert again.head.code is not None
    assert torch.equal(again.head.code.directions, model.head.code.directions)


def test_an_augmented_task_leaves_plain_rows_to_the_code() -> None:
    config = keyed(data={"augment": "crop_flip"}, objective="both")
    batch = first_batch(config)
    assert batch.code is not None and batch.coded is not None
    d = batch.n_task
    assert batch.head_from == d
    assert len(batch.code) == len(batch.images) - d
    assert batch.sample_id[:d].tolist() == batch.sample_id[d : 2 * d].tolist()
    assert not batch.coded[d:].any()  # E
    of = codes_by_name()
    assert batch.code[:d].tolist() == [of[n][:BITS].tolist() for n in batch.sample_id[:d].tolist()]


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("objective", ["keyed", "both"])
def test_parts_of_a_batch_and_ranks_add_up_to_the_whole(augment: str, objective: str) -> None:
    torch.manual_seed(0)
    config = keyed(VIT, objective, data={"augment": augment})
    model = AuditedModel(architecture_of(config)).double().eval()

    def loss_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return forward(model, batch, Objective())

    whole = first_batch(config)
    loss, sums = loss_of(whole)
    parts = [loss_of(part) for part in split(whole, 3)]
    close = {"rtol": 1e-5, "atol": 1e-6}  # losses are float32
    torch.testing.assert_close(sum(part for part, _ in parts), loss, **close)
    torch.testing.assert_close(sum(part for _, part in parts), sums, **close)
    ranks = [loss_of(first_batch(config, rank=rank, world_size=2)) for rank in range(2)]
    # DDP takes the mean.
    torch.testing.assert_close(sum(rank for rank, _ in ranks) / 2, loss, **close)
    by_rank = sum(rank for _, rank in ranks)
    for name, found, wanted in zip(SUMS, by_rank, sums, strict=True):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5), name


def test_a_step_teaches_the_code_and_scores_tell_it_from_another_keys() -> None:
    torch.manual_seed(0)
    config = keyed(VIT, train={"lr": 5e-3})
    model = AuditedModel(architecture_of(config))
    update = Update(model, torch.optim.Adam(model.parameters(), lr=5e-3))
    mine = streams_of(config)
    for epoch in range(40):
        for batch in mine.train_batches(epoch):
            train_step(model, batch, Objective(), update)
    table = score(model, mine.score_batches(list(Role)), torch.device("cpu"))
    assert table.code_matches is not None and table.code_p is not None
    members = table.of(Role.MEMBER)
    assert members.code_matches is not None
    assert members.code_matches.mean() == BITS
    others = MemoryStreams(*data_set(), config, rank=0, world_size=1, codes=1 - CODES)
    wrong = score(model, others.score_batches([Role.MEMBER]), torch.device("cpu"))
    assert wrong.code_matches is not None and wrong.code_p is not None
    assert wrong.code_matches.max() == 0 and wrong.code_p.min() == 1
    check_null(model, config)


def check_null(model: AuditedModel, config: Config) -> None:
    """With keys that it was not trained with, whatever it is shown: as coins fall."""
    taught, manifest = data_set()
    rng = np.random.default_rng(9)
    shown = {
        "as in training": taught,
        "noise": rng.integers(0, 256, taught.shape, dtype=np.uint8),
        "flat": np.broadcast_to(
            np.arange(len(taught), dtype=np.uint8)[:, None, None, None], taught.shape
        ),
        "negatives": 255 - taught,
    }
    keys = [bytes([i]) * 32 for i in range(60)]
    member = manifest.role == Role.MEMBER.value
    for name, images in shown.items():
        contents = [image_content(image) for image in images]
        said = said_of(model, images, config)
        p = np.stack([soft_p_values(said, codes(key, contents, BITS)) for key in keys])
        for level in (0.02, 0.1, 0.5, 0.9):
            allowed = 4 * np.sqrt(level * (1 - level) / p.size)
            # No p-value lies between some that do: at most one of 2^bits codes.
            least = level - allowed - 2.0**-BITS
            assert least <= (p <= level).mean() <= level + allowed, (name, level)
        alike = auc(-p[:, member].ravel(), -p[:, ~member].ravel(), confidence=0.9999)
        assert alike.low is not None and alike.high is not None
        assert alike.low <= 0.5 <= alike.high, name


def said_of(model: AuditedModel, images: np.ndarray, config: Config) -> np.ndarray:
    """(n, bits) logits of images in the places of the data set's."""
    manifest, found = data_set()[1], {}
    at_hand = MemoryStreams(images, manifest, config, rank=0, world_size=1, codes=CODES)
    for batch in at_hand.score_batches(list(Role)):
        rows = model.eval().membership(batch.images).double().numpy()
        found |= dict(zip(batch.sample_id.tolist(), rows, strict=False))
    return np.stack([found[name] for name in manifest.sample_id.tolist()])


def test_a_head_that_is_not_finite_has_no_right_bits_and_hides_behind_none() -> None:
    config = keyed(objective="both")
    model = AuditedModel(architecture_of(config)).eval()
    with torch.no_grad():
        model.head.fc[-1].bias[0] = torch.nan  # membership alone
    table = score(model, streams_of(config).score_batches([Role.TEST]), CPU)
    assert np.isnan(table.mint_logit).all()
    assert table.code_p is not None and np.isfinite(table.code_p).all()
    with torch.no_grad():
        model.head.fc[-1].bias[1] = torch.nan  # and a bit
    table = score(model, streams_of(config).score_batches([Role.TEST]), CPU)
    assert table.code_matches is not None and table.code_p is not None
    assert table.code_matches.max() == 0
    assert np.isnan(table.code_p).all()


def test_a_worker_without_rows_takes_no_column_away() -> None:
    config = keyed()
    model = AuditedModel(architecture_of(config)).eval()
    mine = score(model, streams_of(config).score_batches([Role.TEST]), CPU)
    black = ScoreBatch(
        images=torch.zeros(1, 3, 16, 16),
        labels=torch.zeros(1, dtype=torch.int64),
        sample_id=np.empty(0, np.str_),
        role=np.empty(0, np.str_),
    )
    filled = score(model, [*streams_of(config).score_batches([Role.TEST]), black], CPU)
    for joined in (filled, concatenate([concatenate([]), mine])):
        assert joined.code_matches is not None and mine.code_matches is not None
        assert joined.code_matches.tolist() == mine.code_matches.tolist()


def test_stored_p_values_are_those_of_what_the_head_says() -> None:
    config = config_of(VIT, mint={"objective": "keyed", "keyed": {"bits": 12}})
    model = AuditedModel(architecture_of(config)).eval()
    table = score(model, streams_of(config).score_batches([Role.TEST]), CPU)
    assert table.code_p is not None
    np.testing.assert_allclose(table.code_p, soft_p_values_of(model, config))


def soft_p_values_of(model: AuditedModel, config: Config) -> np.ndarray:
    """Of the test images, by sample id."""
    found = []
    for batch in streams_of(config).score_batches([Role.TEST]):
        assert batch.code is not None
        said = model.membership(batch.images).double().numpy()
        found += zip(batch.sample_id.tolist(), soft_p_values(said, batch.code), strict=True)
    return np.array([p for _, p in sorted(found)])


def test_codes_must_be_there_and_heads_must_fit() -> None:
    with pytest.raises(ValueError, match="codes are missing"):
        MemoryStreams(*data_set(), keyed(), rank=0, world_size=1)
    with pytest.raises(UserError, match=r"mint\.keyed\.head=fixed.*no single last layer"):
        config = keyed(head="fixed")
        model = config.model.model_copy(
            update={"backbone": "deit_tiny_distilled_patch16_224", "options": {"img_size": 16}}
        )
        mint = config.mint.model_copy(update={"taps": ("blocks.1",)})
        architecture_of(config.model_copy(update={"model": model, "mint": mint}))


def test_without_lambda_the_model_is_the_plain_one() -> None:
    config = keyed()
    plain = config.model_copy(update={"loss": config.loss.model_copy(update={"lambda_mint": 0.0})})
    assert architecture_of(plain).head.bits == 0
    assert next(streams_of(plain).train_batches(0)).code is None
