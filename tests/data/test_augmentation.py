"""Augmentation: each image moved by its own draw, and never what is scored."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.roles import Manifest
from amint_ray.data.transforms import crop_and_flip
from amint_ray.train.step import split

SIZES = {"member": 31, "withheld": 6, "external": 19, "calibration": 5, "test": 7}
N, SIDE = sum(SIZES.values()), 16  # the reach is two pixels
ROLES = np.random.default_rng(1).permutation(np.repeat(list(SIZES), list(SIZES.values())))
IMAGES = np.random.default_rng(2).integers(1, 256, (N, 3, SIDE, SIDE), dtype=np.uint8)
IDS = np.array([f"s{i:02d}" for i in range(N)])
MANIFEST = Manifest(
    sample_id=IDS, content=IDS, label=(np.arange(N) * 3 % 7).astype(np.int64), role=ROLES
)
WORLDS = (1, 2, 3)
ROWS = {4: 6, 5: 7}  # of D and of E in a step
VIEWS = pytest.mark.parametrize("views", ["plain", "task"])


def streams(
    views: str = "plain",
    *,
    lambda_mint: float = 1.0,
    augment: str = "crop_flip",
    rank: int = 0,
    world: int = 1,
    **train: Any,
) -> MemoryStreams:
    config = Config.model_validate(
        {
            "data": {"image_size": SIDE, "augment": augment, "mean": 0.0, "std": 1.0},
            "mint": {"views": views},
            "loss": {"lambda_mint": lambda_mint},
            "train": {"batch_size": 5, "external_ratio": 1.4, "seed": 3} | train,
            "evaluation": {"batch_size": 9},
        }
    )
    return MemoryStreams(IMAGES, MANIFEST, config, rank=rank, world_size=world)


def moved(image: torch.Tensor, down: int, right: int, flip: bool) -> torch.Tensor:
    """By torchvision: mirrored, padded with black, and cut out again."""
    height, width = image.shape[-2:]
    reach = max(height, width)
    image = TF.pad(TF.hflip(image) if flip else image, [reach])
    return TF.crop(image, reach - down, reach - right, height, width)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_flip_is_torchvisions(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (40, 2, 7, 9), dtype=np.uint8)).to(dtype)
    shift = torch.from_numpy(rng.integers(-9, 10, (40, 2)))
    flip = torch.from_numpy(rng.random(40) < 0.5)
    before = images.clone()
    got = crop_and_flip(images, shift=shift, flip=flip)
    assert got.dtype == dtype
    for i in range(40):
        down, right = shift[i].tolist()
        assert torch.equal(got[i], moved(images[i], down, right, bool(flip[i]))), i
    assert torch.equal(images, before)


VARIANTS = [(dy, dx, flip) for dy in range(-2, 3) for dx in range(-2, 3) for flip in (False, True)]
PLAIN = (0, 0, False)


def moves(batch: Batch) -> list[tuple[int, int, bool]]:
    """How each row's image was moved, found by trying."""
    found = []
    for pixels, name in zip((batch.images * 255).round(), batch.sample_id, strict=True):
        image = torch.from_numpy(IMAGES[int(name[1:])]).float()
        fitting = [v for v in VARIANTS if torch.equal(moved(image, *v), pixels)]
        assert len(fitting) == 1, name
        found += fitting
    return found


def positions(batch: Batch) -> list[int]:
    return [int(name[1:]) for name in batch.sample_id]


def test_plain_views_are_rows_of_their_own() -> None:
    for batch in streams("plain").train_batches(0):
        at = positions(batch)
        d, e = batch.n_task, ROWS[batch.n_task]
        assert batch.head_from == d
        assert len(batch.images) == d + d + e
        assert at[:d] == at[d : 2 * d]
        assert set(ROLES[at[:d]]) <= {"member", "withheld"}
        assert set(ROLES[at[2 * d :]]) == {"external"}
        assert batch.labels.tolist() == MANIFEST.label[at].tolist()
        assert batch.membership.tolist() == [1.0] * d + [0.0] * e
        assert batch.told.tolist() == [ROLES[i] != "withheld" for i in at[d:]]
        assert batch.told_per_worker == int(batch.told.sum())
        assert batch.task_per_worker == d
        how = moves(batch)
        assert how[d:] == [PLAIN] * (d + e)
        assert len(set(how[:d])) > 1


def test_with_the_tasks_views_d_and_e_are_moved_alike() -> None:
    of_d: Counter[tuple[int, int, bool]] = Counter()
    of_e: Counter[tuple[int, int, bool]] = Counter()
    stream = streams("task")
    for epoch in range(12):
        for batch in stream.train_batches(epoch):
            at = positions(batch)
            d, e = batch.n_task, ROWS[batch.n_task]
            assert (batch.head_from, len(at)) == (0, d + e)
            assert batch.labels.tolist() == MANIFEST.label[at].tolist()
            assert batch.membership.tolist() == [1.0] * d + [0.0] * e
            assert batch.told.tolist() == [ROLES[i] != "withheld" for i in at]
            how = moves(batch)
            of_d.update(how[:d])
            of_e.update(how[d:])
            assert set(ROLES[at[d:]]) == {"external"}
    for seen in (of_d, of_e):
        assert set(seen) == set(VARIANTS)
        total = sum(seen.values())
        flipped = sum(n for (_, _, flip), n in seen.items() if flip)
        assert flipped / total == pytest.approx(0.5, abs=0.05)
        assert max(seen.values()) < 3 * total / len(VARIANTS)


@VIEWS
@pytest.mark.parametrize("ratio", [0.6, 1.4])
def test_the_view_of_d_does_not_depend_on_e(views: str, ratio: float) -> None:
    plain = streams(views, lambda_mint=0.0)
    joint = streams(views, external_ratio=ratio)
    for a, b in zip(plain.train_batches(2), joint.train_batches(2), strict=True):
        assert len(a.images) == a.n_task == b.n_task
        assert torch.equal(a.images, b.images[: b.n_task])


@VIEWS
@pytest.mark.parametrize("world", WORLDS)
def test_augmented_batches_are_the_same_on_any_number_of_workers(views: str, world: int) -> None:
    alone = list(streams(views).train_batches(1))
    for rank in range(world):
        mine = slice(rank, None, world)
        parts = streams(views, rank=rank, world=world).train_batches(1)
        for whole, part in zip(alone, parts, strict=True):
            d, n = whole.n_task, len(whole.images)
            kinds = [slice(0, d), slice(d, 2 * d), slice(2 * d, n)]
            if views == "task":
                kinds = [slice(0, d), slice(d, n)]
            for name in ("images", "labels"):
                values = [getattr(whole, name)[kind][mine] for kind in kinds]
                assert torch.equal(getattr(part, name), torch.cat(values)), name
            ids = np.concatenate([whole.sample_id[kind][mine] for kind in kinds])
            assert part.sample_id.tolist() == ids.tolist()
            for name in ("membership", "told"):
                value = getattr(whole, name)
                assert torch.equal(
                    getattr(part, name), torch.cat([value[:d][mine], value[d:][mine]])
                )
            assert part.n_task == len(range(d)[mine])
            assert part.head_from == (part.n_task if views == "plain" else 0)
            assert part.task_per_worker * world == pytest.approx(whole.task_per_worker)
            assert part.told_per_worker * world == pytest.approx(whole.told_per_worker)


def test_draws_are_a_function_of_seed_and_step() -> None:
    def views(seed: int, epoch: int) -> torch.Tensor:
        batches = streams(seed=seed).train_batches(epoch)
        return torch.cat([batch.images[: batch.n_task] for batch in batches])

    assert torch.equal(views(3, 1), views(3, 1))
    draws = {
        tuple(how)
        for seed in (3, 4)
        for epoch in (0, 1)
        for how in [moves(next(iter(streams(seed=seed).train_batches(epoch))))[:4]]
    }
    assert len(draws) == 4


@VIEWS
def test_scoring_is_never_augmented(views: str) -> None:
    expected = torch.from_numpy(IMAGES).float() / 255
    seen = 0
    for batch in streams(views).score_batches(list(Role)):
        at = [int(name[1:]) for name in batch.sample_id]
        torch.testing.assert_close(batch.images, expected[at])
        seen += len(at)
    assert seen == N


def test_without_augmentation_there_are_no_rows_apart() -> None:
    for batch in streams("plain", augment="none").train_batches(0):
        rows = batch.n_task + ROWS[batch.n_task]
        assert (batch.head_from, len(batch.images)) == (0, rows)
        assert moves(batch) == [PLAIN] * rows


@VIEWS
def test_a_resumed_epoch_is_augmented_alike(views: str) -> None:
    whole = list(streams(views).train_batches(1))
    for got, expected in zip(streams(views).train_batches(1, 3), whole[3:], strict=True):
        assert torch.equal(got.images, expected.images)


# --- micro-batches --------------------------------------------------------------------------------


def kinds_of(batch: Batch) -> list[int]:
    """Rows of each kind: D for the task, D for the head alone, E."""
    head = batch.membership.tolist()
    apart = int(sum(head)) if batch.head_from else 0
    return [batch.n_task, apart, len(head) - int(sum(head))]


def described(batch: Batch) -> Counter[tuple[Any, ...]]:
    """What is said of each row, with the images themselves."""
    head: list[Any] = list(zip(batch.membership.tolist(), batch.told.tolist(), strict=True))
    head = [None] * batch.head_from + head
    images = [image.numpy().tobytes() for image in batch.images]
    task = [row < batch.n_task for row in range(len(images))]
    told = batch.sample_id.tolist()
    return Counter(zip(images, task, batch.labels.tolist(), told, head, strict=True))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("views", "lambda_mint"), [("plain", 1.0), ("task", 1.0), ("plain", 0.0)])
def test_micro_batches_hold_every_row_once_and_evenly(
    parts: int, views: str, lambda_mint: float
) -> None:
    for batch in streams(views, lambda_mint=lambda_mint).train_batches(0):
        micro = split(batch, parts)
        assert len(micro) == parts
        together: Counter[tuple[Any, ...]] = Counter()
        for part in micro:
            together += described(part)
            assert part.head_from == (part.n_task if batch.head_from else 0)
            assert len(part.membership) == len(part.images) - part.head_from
            assert (part.task_per_worker, part.told_per_worker) == (
                batch.task_per_worker,
                batch.told_per_worker,
            )
        assert together == described(batch)
        for whole, *each in zip(kinds_of(batch), *map(kinds_of, micro), strict=True):
            assert sum(each) == whole
            assert max(each) - min(each) <= 1


@pytest.mark.parametrize("views", ["plain", "task"])
def test_the_losses_of_micro_batches_add_up(views: str) -> None:
    """With any function of one row in the model's place."""

    def losses(batch: Batch) -> torch.Tensor:
        features = batch.images.double().flatten(1)
        logits = torch.stack([features[:, i::7].mean(1) for i in range(7)], dim=1) * 5
        labels = batch.labels[: batch.n_task]
        task = F.cross_entropy(logits[: batch.n_task], labels, reduction="sum")
        mint = F.binary_cross_entropy_with_logits(
            features[batch.head_from :].mean(1),
            batch.membership.double(),
            weight=batch.told.double(),
            reduction="sum",
        )
        return torch.stack([task / batch.task_per_worker, mint / batch.told_per_worker])

    for batch in streams(views).train_batches(0):
        whole = losses(batch)
        for parts in (2, 3, 4):
            micro = split(batch, parts)
            torch.testing.assert_close(sum(losses(part) for part in micro), whole)
