"""Batches: the same global batch on any number of workers, told and counted as the loss needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, UserError
from amint_ray.data.loading import MemoryStreams, Schedule, check_roles, smallest_step
from amint_ray.data.orders import Positions, shuffled
from amint_ray.data.roles import Manifest
from amint_ray.data.transforms import to_model_input

SIZES = {"member": 41, "withheld": 9, "external": 23, "calibration": 12, "test": 15}
N = sum(SIZES.values())
MEAN, STD = 0.25, 0.5
WORLDS = (1, 2, 3, 4)  # neither 5 nor 6 rows can be dealt evenly to 4
# 50 images of D in batches of at most 6.
STEPS, ROWS = 9, (5, 6)


def make_manifest(**sizes: int) -> Manifest:
    roles = np.repeat(list(sizes), list(sizes.values()))
    n = len(roles)
    order = np.random.default_rng(0).permutation(n)
    return Manifest(
        sample_id=np.array([f"s{i}" for i in range(n)], dtype=np.str_),
        content=np.array([f"c{i}" for i in range(n)], dtype=np.str_),
        label=(np.arange(n) * 7 % 10).astype(np.int64),
        role=roles[order].astype(np.str_),
    )


MANIFEST = make_manifest(**SIZES)
# Each image says which one it is.
IMAGES = np.zeros((N, 1, 4, 4), dtype=np.uint8)
IMAGES[:, 0, 1, 2] = np.arange(N)


def make_config(**train: Any) -> Config:
    mint = train.pop("lambda_mint", 1.0)
    values = {
        "data": {"image_size": 4, "channels": 1, "mean": MEAN, "std": STD},
        "train": {"batch_size": 6, "external_ratio": 1.5, "seed": 3} | train,
        "evaluation": {"batch_size": 7},
        "loss": {"lambda_mint": mint},
    }
    return Config.model_validate(values)


def streams(config: Config, rank: int = 0, world: int = 1) -> MemoryStreams:
    return MemoryStreams(IMAGES, MANIFEST, config, rank=rank, world_size=world)


def numbers(images: torch.Tensor) -> list[int]:
    """Which images these are."""
    return [round((x * STD + MEAN) * 255) for x in images[:, 0, 1, 2].tolist()]


def epoch_ids(config: Config, epoch: int) -> tuple[list[int], list[int]]:
    """Positions of D and of E in the order in which one epoch shows them."""
    d: list[int] = []
    e: list[int] = []
    for batch in streams(config).train_batches(epoch):
        ids = numbers(batch.images)
        d += ids[: batch.n_task]
        e += ids[batch.n_task :]
    return d, e


def having(*roles: str) -> set[int]:
    return set(np.flatnonzero(np.isin(MANIFEST.role, roles)).tolist())


def rows(batches: Sequence[Batch]) -> Counter[tuple[int, int, float, bool, str, bool]]:
    """The rows of one global batch, whichever rank has them."""
    found: Counter[tuple[int, int, float, bool, str, bool]] = Counter()
    for batch in batches:
        found.update(
            zip(
                numbers(batch.images),
                batch.labels.tolist(),
                batch.membership.tolist(),
                batch.told.tolist(),
                batch.sample_id.tolist(),
                [row < batch.n_task for row in range(len(batch.images))],
                strict=True,
            )
        )
    return found


@pytest.mark.parametrize("lambda_mint", [0.0, 1.0])
@pytest.mark.parametrize("ratio", [0.25, 1.5, 4.0])
def test_global_batch_is_the_same_on_any_number_of_workers(
    ratio: float, lambda_mint: float
) -> None:
    config = make_config(external_ratio=ratio, lambda_mint=lambda_mint)
    for epoch in (0, 3):
        alone = list(streams(config).train_batches(epoch))
        assert len(alone) == streams(config).steps_per_epoch == STEPS
        assert {batch.n_task for batch in alone} == set(ROWS)
        for world in WORLDS:
            ranks = [list(streams(config, r, world).train_batches(epoch)) for r in range(world)]
            for step, together in enumerate(zip(*ranks, strict=True)):
                assert rows(together) == rows([alone[step]])
                d = alone[step].n_task
                for batch in together:
                    assert batch.n_task in (d // world, math.ceil(d / world))
                    assert batch.task_per_worker == d / world
                    told = sum(int(b.told.sum()) for b in together) if lambda_mint else 0
                    assert batch.told_per_worker * world == pytest.approx(told)


def test_rows_of_a_batch_say_who_they_are() -> None:
    for batch in streams(make_config()).train_batches(0):
        ids = numbers(batch.images)
        d, e = batch.n_task, {5: 8, 6: 9}[batch.n_task]
        assert batch.images.dtype == batch.membership.dtype == torch.float32
        assert len(ids) == d + e
        assert batch.head_from == 0
        assert batch.labels.tolist() == MANIFEST.label[ids].tolist()
        assert batch.sample_id.tolist() == [f"s{i}" for i in ids]
        assert batch.membership.tolist() == [1.0] * d + [0.0] * e
        assert batch.told.tolist() == [MANIFEST.role[i] != "withheld" for i in ids]
        assert set(ids[:d]) <= having("member", "withheld")
        assert set(ids[d:]) <= having("external")


@pytest.mark.parametrize("batch_size", [2, 6, 7, 25, 49, 50])
def test_an_epoch_shows_each_of_d_exactly_once(batch_size: int) -> None:
    config = make_config(batch_size=batch_size)
    for epoch in range(3):
        assert sorted(epoch_ids(config, epoch)[0]) == sorted(having("member", "withheld"))


@pytest.mark.parametrize(
    ("d", "batch_size"), [(2, 2), (3, 2), (50, 6), (50, 49), (1000, 64), (1281, 128), (65, 64)]
)
def test_steps_are_as_few_and_as_even_as_they_can_be(d: int, batch_size: int) -> None:
    def order(positions: Positions, stream: str, number: int) -> Positions:
        return shuffled(positions, 0, stream, number)

    config = make_config(batch_size=batch_size, epochs=2)
    schedule = Schedule(np.arange(d), np.arange(d, d + 20), config, order)
    assert schedule.steps_per_epoch == math.ceil(d / batch_size)
    assert schedule.total_steps == 2 * schedule.steps_per_epoch
    steps = [schedule.step(number) for number in range(schedule.total_steps)]
    sizes = [len(step.d) for step in steps]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert np.concatenate([step.d_place for step in steps]).tolist() == list(range(2 * d))
    places = np.concatenate([step.e_place for step in steps])
    assert places.tolist() == list(range(len(places)))
    assert [len(step.e) for step in steps] == [int(np.rint(size * 1.5)) for size in sizes]
    manifest = make_manifest(**(SIZES | {"member": d - 1, "withheld": 1}))
    assert smallest_step(manifest, config) == min(sizes)


@pytest.mark.parametrize("ratio", [0.25, 4.0])
@pytest.mark.parametrize("first", [1, 4, STEPS - 1, STEPS])
def test_an_epoch_can_be_entered_at_any_step(first: int, ratio: float) -> None:
    config = make_config(external_ratio=ratio)
    for epoch in (0, 2):
        whole = list(streams(config).train_batches(epoch))
        rest = list(streams(config).train_batches(epoch, first_step=first))
        assert [rows([batch]) for batch in rest] == [rows([batch]) for batch in whole[first:]]
        assert [batch.sample_id.tolist() for batch in rest] == [
            batch.sample_id.tolist() for batch in whole[first:]
        ]


def test_images_in_memory_are_not_lost() -> None:
    held = MemoryStreams(
        IMAGES, MANIFEST, make_config(), rank=0, world_size=1, device=torch.device("cpu")
    )
    list(held.train_batches(0))
    held.close()
    assert dict(held.lost) == {}
    assert len(list(held.train_batches(0))) == STEPS


@pytest.mark.parametrize("ratio", [0.25, 1.5, 4.0])
def test_e_is_seen_in_full_before_any_is_seen_again(ratio: float) -> None:
    config = make_config(external_ratio=ratio)
    chain = [i for epoch in range(12) for i in epoch_ids(config, epoch)[1]]
    rounds = [chain[i : i + 23] for i in range(0, len(chain) - 22, 23)]
    assert len(rounds) >= 6
    for one in rounds:
        assert set(one) == having("external")
    assert len({tuple(one) for one in rounds}) == len(rounds)


def test_without_mint_there_is_no_e_and_the_same_d() -> None:
    plain, joint = make_config(lambda_mint=0.0), make_config(lambda_mint=1.0)
    assert epoch_ids(plain, 2) == (epoch_ids(joint, 2)[0], [])


def test_order_is_a_function_of_seed_and_epoch() -> None:
    config = make_config()
    used = streams(config)
    for epoch in range(3):
        list(used.train_batches(epoch))
    again = [i for batch in used.train_batches(2) for i in numbers(batch.images)]
    fresh = [i for batch in streams(config).train_batches(2) for i in numbers(batch.images)]
    assert again == fresh
    for part in (0, 1):  # D, E
        orders = {
            tuple(epoch_ids(make_config(seed=seed), epoch)[part])
            for seed in (3, 4)
            for epoch in (0, 1)
        }
        assert len(orders) == 4


@pytest.mark.parametrize("world", WORLDS)
def test_scoring_covers_each_sample_once(world: int) -> None:
    for roles in (list(Role), [Role.TEST, Role.WITHHELD], [Role.CALIBRATION]):
        seen: list[str] = []
        for rank in range(world):
            for batch in streams(make_config(), rank, world).score_batches(roles):
                ids = numbers(batch.images)
                assert len(ids) <= 7
                assert batch.sample_id.tolist() == [f"s{i}" for i in ids]
                assert batch.role.tolist() == MANIFEST.role[ids].tolist()
                assert batch.labels.tolist() == MANIFEST.label[ids].tolist()
                seen += batch.sample_id.tolist()
        assert sorted(seen) == sorted(f"s{i}" for i in having(*(r.value for r in roles)))


def test_training_and_scoring_see_the_same_pixels() -> None:
    """Else the transform, not the membership, would be what the head finds."""
    images = np.random.default_rng(0).integers(0, 256, (N, 1, 4, 4), dtype=np.uint8)
    images[:, 0, 1, 2] = np.arange(N)
    both = MemoryStreams(images, MANIFEST, make_config(), rank=0, world_size=1)
    expected = torch.from_numpy((images.astype(np.float64) / 255 - MEAN) / STD).float()
    for batch in [*both.train_batches(0), *both.score_batches(list(Role))]:
        torch.testing.assert_close(batch.images, expected[numbers(batch.images)])


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.1307, 0.3081), (0.0, 1.0)])
def test_transform_is_the_equation(mean: float, std: float) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    config = make_config().data.model_copy(update={"mean": mean, "std": std})
    got = to_model_input([pixels], config)
    expected = (np.arange(256).reshape(4, 1, 8, 8) / 255 - mean) / std
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert pixels.flatten().tolist() == list(range(256))  # left as it was


@pytest.mark.parametrize("role", ["member", "external", "calibration", "test"])
def test_an_empty_role_is_refused_by_name(role: str) -> None:
    manifest = make_manifest(**(SIZES | {role: 0}))
    with pytest.raises(UserError, match=f"data.shares.{role}") as caught:
        check_roles(manifest, make_config())
    assert len(str(caught.value).splitlines()) == 1


def test_a_set_without_withheld_or_without_need_of_e_is_good() -> None:
    check_roles(make_manifest(**(SIZES | {"withheld": 0})), make_config())
    check_roles(make_manifest(**(SIZES | {"external": 0})), make_config(lambda_mint=0.0))


def test_d_must_fill_one_batch() -> None:
    check_roles(MANIFEST, make_config(batch_size=50))
    with pytest.raises(UserError, match=r"50 images.*train\.batch_size = 51"):
        check_roles(MANIFEST, make_config(batch_size=51))


@pytest.mark.parametrize(
    ("ratio", "of_five", "of_six"), [(0.25, 1, 2), (0.3, 2, 2), (1.5, 8, 9), (4.0, 20, 24)]
)
def test_rows_of_e_are_rounded_in_each_step(ratio: float, of_five: int, of_six: int) -> None:
    for batch in streams(make_config(external_ratio=ratio)).train_batches(0):
        assert len(batch.images) - batch.n_task == {5: of_five, 6: of_six}[batch.n_task]


def test_less_than_one_row_of_e_is_refused() -> None:
    check_roles(MANIFEST, make_config(external_ratio=0.1))
    with pytest.raises(UserError, match=r"train\.external_ratio = 0\.05"):
        check_roles(MANIFEST, make_config(external_ratio=0.05))
    check_roles(MANIFEST, make_config(external_ratio=0.05, lambda_mint=0.0))


def test_a_run_whose_steps_are_too_small_for_any_of_e_is_refused() -> None:
    """Seven images of D make steps of three and four, however large a batch may be."""
    manifest = make_manifest(member=7, external=20, calibration=3, test=3)
    with pytest.raises(UserError, match=r"train\.external_ratio = 0\.1"):
        check_roles(manifest, make_config(batch_size=6, external_ratio=0.1))
    check_roles(manifest, make_config(batch_size=6, external_ratio=0.3))
