"""Streamed batches: the same for any number of workers and readers, and each sample in its turn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_source import Row, Set, assert_same_batches, config_of, rows_of

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, Streams
from amint_ray.data.streaming import _TrainReader
from amint_ray.data.transforms import to_model_input

SIZES = [7, 1, 12, 5, 9, 3, 8, 8, 2, 11, 6, 10, 4, 9, 13, 5, 7, 6]
# 58 of D in steps of 14 or 15 (at most 16); with half as many of E, an epoch takes E once.
COUNTS = {"member": 50, "withheld": 8, "external": 30, "calibration": 20}
HALF = {"external_ratio": 0.5}
WORLDS = (1, 2, 3)
VIEWS: dict[str, dict[str, Any]] = {
    "none": {},
    "crop-flip": {"data": {"augment": "crop_flip"}},
    "crop-flip-alike": {"data": {"augment": "crop_flip"}, "mint": {"views": "task"}},
    "timm": {"data": {"augment": "timm"}},
    "timm-alike": {"data": {"augment": "timm"}, "mint": {"views": "task"}},
    "timm-without-mint": {"data": {"augment": "timm"}, "loss": {"lambda_mint": 0.0}},
}
SET = Set(SIZES, COUNTS)


def epochs_of(
    config: Config, epochs: Sequence[int] = (0,), of: Set = SET, **where: int
) -> list[list[Batch]]:
    """The batches of some epochs, one epoch after the other."""
    streams = of.here(config, **where)
    return [list(streams.train_batches(epoch)) for epoch in epochs]


def counted(batches: Sequence[Batch]) -> Counter[Row]:
    return Counter(row for batch in batches for row in rows_of(batch))


def d_and_e(batch: Batch) -> tuple[list[str], list[str]]:
    """Names of the task's rows, and of E's."""
    head = batch.sample_id[batch.head_from :]
    return batch.sample_id[: batch.n_task].tolist(), head[batch.membership.numpy() == 0].tolist()


@pytest.mark.parametrize("views", VIEWS)
def test_the_global_batch_is_the_same_for_all_workers_and_readers(views: str) -> None:
    config = config_of(**VIEWS[views], train={"external_ratio": 1.4})
    (alone,) = epochs_of(config)
    for world, readers in ((1, 3), (2, 1), (2, 2), (3, 1), (3, 3)):
        ranks = [epochs_of(config, rank=r, world=world, readers=readers)[0] for r in range(world)]
        for whole, *together in zip(alone, *ranks, strict=True):
            assert counted(together) == counted([whole])
            for batch in together:
                d = whole.n_task
                assert batch.n_task in (d // world, math.ceil(d / world))
                assert batch.task_per_worker == d / world
                assert batch.told_per_worker == whole.told_per_worker / world
            told = sum(int(b.told.sum()) for b in together)
            if config.loss.lambda_mint:
                assert told == whole.told_per_worker


@pytest.mark.parametrize("views", VIEWS)
def test_a_workers_batches_do_not_depend_on_its_readers(views: str) -> None:
    """Not the order of the rows either; nor does it matter that readers are many."""
    config = config_of(**VIEWS[views], train={"external_ratio": 1.4})
    alone = epochs_of(config, (0, 1), rank=1, world=2, readers=1)
    for readers in (2, 3, 13):
        found = epochs_of(config, (0, 1), rank=1, world=2, readers=readers)
        for got, expected in zip(found, alone, strict=True):
            assert_same_batches(got, expected)


@pytest.mark.parametrize("world", [5, 7])
def test_worlds_that_do_not_divide_24_see_each_sample_once_too(world: int) -> None:
    ranks = [
        epochs_of(config_of(train=HALF), rank=r, world=world, readers=2)[0] for r in range(world)
    ]
    assert {len(batches) for batches in ranks} == {4}
    d = [name for batches in ranks for batch in batches for name in d_and_e(batch)[0]]
    e = [name for batches in ranks for batch in batches for name in d_and_e(batch)[1]]
    assert sorted(d) == sorted(SET.d)
    assert sorted(e) == sorted(SET.having(Role.EXTERNAL))


def test_rows_say_who_they_are() -> None:
    config = config_of(train=HALF)
    pixels = to_model_input([SET.plain(config)], config.data)
    at = {name: i for i, name in enumerate(SET.manifest.sample_id.tolist())}
    for batch in epochs_of(config, readers=2)[0]:
        d, e = d_and_e(batch)
        assert (len(d), len(e)) in ((14, 7), (15, 8))
        assert batch.sample_id.tolist() == d + e
        assert set(d) <= SET.d
        assert set(e) <= SET.having(Role.EXTERNAL)
        rows = [at[name] for name in d + e]
        assert batch.labels.tolist() == SET.manifest.label[rows].tolist()
        assert batch.membership.tolist() == [1.0] * len(d) + [0.0] * len(e)
        assert batch.told.tolist() == [SET.role[i] != "withheld" for i in rows]
        assert torch.equal(batch.images, pixels[rows])


def test_each_sample_of_d_is_seen_once_an_epoch_and_another_way_each_time() -> None:
    orders = []
    for batches in epochs_of(config_of(train={"external_ratio": 1.4}), (0, 1, 2)):
        d = [name for batch in batches for name in d_and_e(batch)[0]]
        assert sorted(d) == sorted(SET.d)
        orders.append(tuple(d))
    (other,) = epochs_of(config_of(train={"seed": 6}))
    orders.append(tuple(name for batch in other for name in d_and_e(batch)[0]))
    assert len(set(orders)) == 4


@pytest.mark.parametrize("ratio", [0.25, 1.4, 4.0])
@pytest.mark.parametrize("external", [2, 30])
def test_e_is_seen_in_full_before_any_is_seen_again(ratio: float, external: int) -> None:
    """With two images of E, a step takes them many times over."""
    few = Set(SIZES, COUNTS | {"external": external})
    config = config_of(train={"external_ratio": ratio, "epochs": 6})
    chain = []
    for batches in epochs_of(config, range(6), few, readers=2):
        for batch in batches:
            d, e = d_and_e(batch)
            assert len(e) == int(np.rint(len(d) * ratio))
            chain += e
    # In a step's rows, passes stand one behind the other; within a pass the order is any.
    for start in range(0, len(chain) - external + 1, external):
        assert sorted(chain[start : start + external]) == sorted(few.having(Role.EXTERNAL))


def test_memory_and_streaming_show_the_same_samples_alike() -> None:
    """In another order, so that their steps differ."""
    config = config_of(train=HALF)
    memory, streamed = SET.memory(config), SET.here(config, readers=2)
    assert memory.steps_per_epoch == streamed.steps_per_epoch
    for epoch in range(3):
        a, b = list(memory.train_batches(epoch)), list(streamed.train_batches(epoch))
        assert counted(a) == counted(b)
        assert [batch.n_task for batch in a] == [batch.n_task for batch in b]
        assert [d_and_e(batch) for batch in a] != [d_and_e(batch) for batch in b]


@pytest.mark.parametrize("views", ["none", "crop-flip", "timm"])
@pytest.mark.parametrize(
    "roles", [list(Role), [Role.CALIBRATION], [Role.EXTERNAL, Role.TEST]], ids=str
)
def test_scoring_covers_each_sample_once_as_memory_does(views: str, roles: list[Role]) -> None:
    config, memory = config_of(**VIEWS[views]), SET.memory(config_of())
    expected = {
        name: (image.numpy().tobytes(), label, role)
        for batch in memory.score_batches(roles)
        for name, image, label, role in zip(
            batch.sample_id.tolist(), batch.images, batch.labels.tolist(), batch.role, strict=True
        )
    }
    assert set(expected) == SET.having(*roles)
    for world in WORLDS:
        for readers in (1, 3):
            seen: list[str] = []
            for rank in range(world):
                streams = SET.here(config, rank=rank, world=world, readers=readers)
                for batch in streams.score_batches(roles):
                    assert 1 <= len(batch.images) <= 7
                    assert batch.labels.dtype == torch.int64
                    for name, image, label, role in zip(
                        batch.sample_id.tolist(),
                        batch.images,
                        batch.labels.tolist(),
                        batch.role,
                        strict=True,
                    ):
                        assert (image.numpy().tobytes(), label, role) == expected[name]
                        seen.append(name)
            assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("most", [1, 7, 49, 50])
def test_a_part_is_scored_alike_in_memory_and_streamed_by_any_number_of_workers(most: int) -> None:
    """And is a part of any larger one; a role with fewer is scored whole."""
    config, roles = config_of(), [Role.WITHHELD, Role.MEMBER]

    def scored(streams: Streams, most: int | None) -> list[str]:
        batches = streams.score_batches(roles, most)
        return [name for batch in batches for name in batch.sample_id.tolist()]

    expected = set(scored(SET.memory(config), most))
    for role in roles:
        assert len(expected & SET.having(role)) == min(most, COUNTS[role.value])
    assert expected <= set(scored(SET.memory(config), most + 1)) <= SET.having(*roles)
    for world, readers in ((1, 3), (3, 1)):
        where = [{"rank": rank, "world": world} for rank in range(world)]
        memory = [name for w in where for name in scored(SET.memory(config, **w), most)]
        streamed = [
            name for w in where for name in scored(SET.here(config, readers=readers, **w), most)
        ]
        assert sorted(memory) == sorted(streamed) == sorted(expected)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_scoring_when_ranks_or_readers_have_none(count: int) -> None:
    few = Set([3, 4, 5], {"member": 12 - count, "test": count})
    for world, readers in ((1, 3), (3, 1), (3, 2)):
        found = [
            name
            for rank in range(world)
            for batch in few.here(
                config_of(), rank=rank, world=world, readers=readers
            ).score_batches([Role.TEST])
            for name in batch.sample_id.tolist()
        ]
        assert sorted(found) == sorted(few.having(Role.TEST))


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_on_at_the_very_next_sample(views: str, world: int) -> None:
    """From any step of any epoch, the batches are those of a pass that was not interrupted."""
    config = config_of(**VIEWS[views], train={"external_ratio": 1.4})
    where = {"rank": world - 1, "world": world}
    whole = epochs_of(config, (0, 1, 2), readers=2, **where)
    for epoch, first, readers in ((0, 1, 2), (0, 3, 3), (1, 0, 1), (1, 2, 2), (2, 3, 1), (2, 4, 2)):
        streams = SET.here(config, readers=readers, **where)
        rest = list(streams.train_batches(epoch, first_step=first))
        assert_same_batches(rest, whole[epoch][first:])
        if epoch < 2:
            assert_same_batches(list(streams.train_batches(epoch + 1)), whole[epoch + 1])


def test_an_epoch_can_be_taken_again_or_left_early() -> None:
    config = config_of(train={"external_ratio": 1.4})
    whole = epochs_of(config, (0, 1, 2))
    streams = SET.here(config, readers=2)
    for epoch, steps in ((2, 4), (0, 2), (0, 4), (1, 1), (1, 4)):
        batches = streams.train_batches(epoch)
        taken = [next(batches) for _ in range(steps)]
        assert_same_batches(taken, whole[epoch][:steps])


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, 1000])
@pytest.mark.parametrize("readers", [1, 3])
def test_a_pass_reads_each_image_once_and_few_shards(window: int, readers: int) -> None:
    """Only rows that are wanted, and of each shard all that a stream wants in one go."""
    sizes = [20] * 40
    large = Set(sizes, {"member": 360, "withheld": 40, "external": 300})
    config = config_of(
        data={"window": window},
        train={"batch_size": 40, "external_ratio": 0.75, "epochs": 1},  # nothing to read ahead for
    )
    wanted = np.isin(large.role, ["member", "withheld", "external"])
    for world in (1, 2):
        reads: list[tuple[int, tuple[int, ...]]] = []
        for rank in range(world):
            streams = large.here(config, rank=rank, world=world, readers=readers)
            list(streams.train_batches(0))
            reads += large.source.reads
        images = Counter((shard, row) for shard, rows in reads for row in rows)
        places = zip(large.rows.shard[wanted], large.rows.row[wanted], strict=True)
        assert images == Counter((int(shard), int(row)) for shard, row in places)
        assert len(reads) <= 2 * (40 + 24 - 1)  # D and E apart


@pytest.mark.parametrize("world", [2, 3])
def test_a_worker_keeps_to_its_shards_in_every_pass(world: int) -> None:
    """Also where a pass is as long as no multiple of the workers."""
    large = Set([20] * 40, {"member": 361, "withheld": 40, "external": 300})
    config = config_of(train={"epochs": 3}, loss={"lambda_mint": 0.0})
    reads: list[tuple[int, tuple[int, ...]]] = []
    for rank in range(world):
        streams = large.here(config, rank=rank, world=world, readers=2)
        for epoch in range(3):
            list(streams.train_batches(epoch))
        reads += large.source.reads
    images = Counter((shard, row) for shard, rows in reads for row in rows)
    assert len(images) == len(large.d)
    assert set(images.values()) == {3}
    assert len(reads) <= 3 * (40 + 24 - 1)


@pytest.mark.parametrize(
    ("world", "readers"), [(1, 2), (1, 5), (2, 3), (3, 4), (1, 16), (8, 8), (16, 8), (32, 8)]
)
def test_readers_share_the_work(world: int, readers: int) -> None:
    """Each of them, of every worker, has about as much to do in each step."""
    large = Set([20] * 400, {"member": 3000, "external": 3000})
    config = config_of(data={"streams": None}, train={"batch_size": 1024, "epochs": 1})
    for rank in range(0, world, 5):
        reader = _TrainReader(large.here(config, rank, world, readers)._plan, 0)
        counts = [
            sum(len(list(wanted)) for wanted in reader._batches(number, readers))
            for number in range(readers)
        ]
        assert sum(counts) == pytest.approx(6000 / world, rel=0.05)
        assert min(counts) >= 0.8 * np.mean(counts)


SHAPES = {
    "two of D": ([3, 2], {"member": 2, "external": 1}, 2),
    "fewer of D than streams": ([5, 6, 4], {"member": 7, "withheld": 2, "external": 3}, 4),
    "one sample per shard": ([1] * 40, {"member": 20, "external": 12}, 6),
    "one shard for all": ([60], {"member": 30, "withheld": 5, "external": 20}, 8),
    "shards without use": ([10] * 30, {"member": 5, "external": 3}, 4),
    "no rest": ([8] * 12, {"member": 48, "external": 48}, 12),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 128])
def test_sets_of_odd_shapes(shape: str, window: int) -> None:
    sizes, counts, batch_size = SHAPES[shape]
    odd = Set(sizes, counts)
    config = config_of(data={"window": window}, train={"batch_size": batch_size, "epochs": 3})
    memory = odd.memory(config)
    for world, readers in ((1, 1), (1, 3), (2, 2), (3, 1)):
        streams = [odd.here(config, r, world, readers) for r in range(world)]
        for epoch in range(3):
            ranks = [list(of.train_batches(epoch)) for of in streams]
            steps = list(zip(*ranks, strict=True))
            expected = list(memory.train_batches(epoch))
            assert len(steps) == len(expected)
            for step, whole in zip(steps, expected, strict=True):
                assert sum(batch.n_task for batch in step) == whole.n_task
                assert sum(len(batch.images) for batch in step) == len(whole.images)
            d = [n for step in steps for batch in step for n in d_and_e(batch)[0]]
            assert sorted(d) == sorted(odd.d)
            assert all(of.lost == {} for of in streams)
