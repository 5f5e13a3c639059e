"""Images that cannot be had when their turn comes: left out, named, and no more than allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_source import (
    CLASSES,
    Set,
    SmallSource,
    assert_same_batches,
    config_of,
    png,
    rows_of,
)

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, RunError
from amint_ray.data.sources import Fault, Raw
from amint_ray.data.streaming import StreamedStreams
from amint_ray.model.joint import plan_architecture
from amint_ray.train.loop import create_state
from amint_ray.train.objective import Objective
from amint_ray.train.state import TrainState
from amint_ray.train.step import SUMS, forward, train_step

SIZES = [6] * 20
COUNTS = {"member": 50, "withheld": 8, "external": 30, "calibration": 20}
WHOLE = Set(SIZES, COUNTS)
VIEWS: dict[str, dict[str, Any]] = {
    "none": {},
    "crop-flip": {"data": {"augment": "crop_flip"}},
    "timm": {"data": {"augment": "timm"}},
    "timm-alike": {"data": {"augment": "timm"}, "mint": {"views": "task"}},
}
CONVNEXT = {
    "backbone": "convnext_atto",
    "options": {"patch_size": 1, "depths": [1] * 4, "dims": [8, 16, 24, 32], "kernel_sizes": 3},
}
RESNET = {
    "backbone": "resnet18",
    "options": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
}


def of_role(*roles: Role, count: int) -> list[int]:
    """The first few pictures with these roles."""
    return sorted(int(name[1:]) for name in WHOLE.having(*roles))[:count]


def with_faults(instead: dict[int, Raw], **shards: Any) -> Set:
    """The same set when some of it can no longer be read."""
    return Set(SIZES, COUNTS, instead=instead, **shards)


def faults() -> tuple[Set, dict[str, str]]:
    """A set that lost some of each role, and why."""
    a, b = of_role(Role.MEMBER, Role.WITHHELD, count=2)
    c, d = of_role(Role.EXTERNAL, count=2)
    (e,) = of_role(Role.CALIBRATION, count=1)
    cut = png(b)[:150]
    instead: dict[int, Raw] = {a: Fault("is gone"), b: cut, c: b"no image", d: b"", e: b""}
    lost = {
        f"n{a:03d}": "is gone",
        f"n{b:03d}": "cannot be decoded: ",
        f"n{c:03d}": "is not an image: it begins with b'no image'",
        f"n{d:03d}": "is empty (0 bytes)",
        f"n{e:03d}": "is empty (0 bytes)",
    }
    assert not {n // 6 for n in instead} & {10, 12}
    lost |= {f"n{n:03d}": "the disk is on fire" for n in range(60, 66)}
    lost |= {f"n{n:03d}": "no such file" for n in range(72, 78)}
    found = with_faults(instead, broken={10: "the disk is on fire"}, gone={12: "no such file"})
    return found, lost


@pytest.mark.parametrize("views", VIEWS)
def test_lost_rows_are_left_out_and_the_others_stay_as_they_were(views: str) -> None:
    """Also in the draws of their augmentation."""
    config = config_of(**VIEWS[views], train={"external_ratio": 0.75})
    damaged, lost = faults()
    named: dict[str, str] = {}
    for rank in range(2):
        whole, less = (of.here(config, rank=rank, world=2, readers=3) for of in (WHOLE, damaged))
        for epoch in range(2):
            pairs = zip(whole.train_batches(epoch), less.train_batches(epoch), strict=True)
            for before, after in pairs:
                kept = [row for row in rows_of(before) if row[0] not in lost]
                assert rows_of(after) == kept
                assert after.n_task == sum(row[2] for row in kept)
                assert after.head_from == (after.n_task if before.head_from else 0)
                assert len(after.labels) == len(after.images)
                # Means stay those of the batch as it was planned, on all ranks alike.
                assert after.task_per_worker == before.task_per_worker
                assert after.told_per_worker == before.told_per_worker
        assert whole.lost == {}
        named |= less.lost
    assert set(named) == set(lost) & (WHOLE.d | WHOLE.having(Role.EXTERNAL))
    for name, reason in named.items():
        assert reason.startswith(lost[name]), name


def test_what_cannot_be_scored_is_left_out_and_named() -> None:
    damaged, lost = faults()
    streams = damaged.here(config_of(), readers=2)
    for _ in range(2):  # counted once
        seen = [n for b in streams.score_batches(list(Role)) for n in b.sample_id.tolist()]
        assert sorted(seen) == sorted(set(WHOLE.manifest.sample_id.tolist()) - set(lost))
        assert set(streams.lost) == set(lost)
    some = damaged.here(config_of())
    list(some.score_batches([Role.CALIBRATION]))
    assert set(some.lost) == set(lost) & WHOLE.having(Role.CALIBRATION)


def test_a_part_of_which_nothing_is_left_is_no_batch() -> None:
    calibration = of_role(Role.CALIBRATION, count=20)
    damaged = with_faults({n: Fault("is gone") for n in calibration})
    streams = damaged.here(config_of())
    assert list(streams.score_batches([Role.CALIBRATION])) == []
    assert len(streams.lost) == 20


@pytest.mark.parametrize("scoring", [False, True])
def test_more_than_is_allowed_stops_the_run_in_one_line(scoring: bool) -> None:
    numbers = of_role(Role.MEMBER, Role.WITHHELD, count=6)
    for allowed in (6, 5):  # of 120
        damaged = with_faults({n: Fault(f"{n} is gone") for n in numbers})
        config = config_of(data={"max_bad_fraction": allowed / 120})
        streams = damaged.here(config, readers=2)
        take = streams.score_batches(list(Role)) if scoring else streams.train_batches(0)
        if allowed == 6:
            list(take)
            assert len(streams.lost) == 6
            list(streams.train_batches(1))  # the same ones again
            continue
        with pytest.raises(RunError) as caught:
            list(take)
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        assert "6 of 120 images" in text
        assert "data.max_bad_fraction = 0.0416667" in text
        name = next(iter(streams.lost))
        assert f"the first: {name}: {int(name[1:])} is gone" in text


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the tries to read a shard, where it is read in this process."""
    monkeypatch.setattr("amint_ray.data.reading._PAUSES", (0.0, 0.0))


def test_all_workers_together_lose_no_more_than_is_allowed() -> None:
    numbers = of_role(Role.TEST, count=8)
    damaged = with_faults({n: Fault("is gone") for n in numbers})

    def scored(allowed: int, rank: int) -> StreamedStreams:
        config = config_of(data={"max_bad_fraction": allowed / 120})
        streams = damaged.here(config, rank=rank, world=2)
        for _ in streams.score_batches([Role.TEST]):
            pass
        return streams

    # Test images are dealt out in halves: the first six, the last six.
    assert [len(scored(8, rank).lost) for rank in range(2)] == [6, 2]
    with pytest.raises(RunError):
        scored(5, 0)
    first, second = scored(7, 0), scored(7, 1)
    with pytest.raises(RunError, match=f"8 of 120 images can no longer be read.*n{numbers[0]:03d}"):
        first.note_lost(second.lost)


@pytest.mark.parametrize("scoring", [False, True])
def test_storage_that_is_down_stops_the_run(scoring: bool) -> None:
    """Else an outage would cost images, or all of them where `data.max_bad_fraction` is 1."""
    damaged = with_faults({}, broken=dict.fromkeys(range(20), "connection refused"))
    streams = damaged.here(config_of(data={"timeout_seconds": 1e-6}), readers=2)
    with pytest.raises(RunError, match="connection refused") as caught:
        list(streams.score_batches(list(Role)) if scoring else streams.train_batches(0))
    assert len(str(caught.value).splitlines()) == 1


def test_single_shards_that_fail_are_no_outage() -> None:
    damaged = with_faults({}, broken=dict.fromkeys((4, 6), "connection refused"))
    streams = damaged.here(config_of(data={"timeout_seconds": 1e-6}))
    list(streams.score_batches(list(Role)))
    assert sorted(streams.lost) == [f"n{n:03d}" for n in (*range(24, 30), *range(36, 42))]


def test_shards_that_fail_one_after_the_other_for_a_moment_are_no_outage() -> None:
    damaged = with_faults({}, broken=dict.fromkeys(range(4, 9), "connection refused"))
    streams = damaged.here(config_of(data={"timeout_seconds": 30}))
    list(streams.score_batches(list(Role)))
    assert sorted(streams.lost) == [f"n{n:03d}" for n in range(24, 54)]


def test_what_comes_when_it_is_asked_for_again_is_not_lost() -> None:
    class Flaky(SmallSource):
        """Each shard fails twice."""

        def read(self, shard: int, rows: Sequence[int]) -> list[Raw]:
            if sum(of == shard for of, _ in self.reads) < 2:
                self.reads.append((shard, tuple(rows)))
                raise ConnectionResetError("reset by peer")
            return super().read(shard, rows)

    flaky, config = Set(SIZES, COUNTS), config_of(train={"epochs": 1})
    flaky.source = Flaky(SIZES)
    streams = flaky.here(config)
    assert_same_batches(list(streams.train_batches(0)), list(WHOLE.here(config).train_batches(0)))
    assert streams.lost == {}


def test_shards_that_are_gone_are_no_outage() -> None:
    damaged = with_faults({}, gone=dict.fromkeys(range(19), "deleted"))
    streams = damaged.here(config_of(data={"timeout_seconds": 1e-6}))
    seen = [n for b in streams.score_batches(list(Role)) for n in b.sample_id.tolist()]
    assert sorted(seen) == [f"n{n:03d}" for n in range(114, 120)]
    assert len(streams.lost) == 114


# --- training on what is left ---------------------------------------------------------------------


def config_for(backbone: dict[str, Any], weighting: str = "initial", **sections: Any) -> Config:
    return config_of(model=backbone, loss={"weighting": weighting}, **sections)


def fresh(config: Config) -> TrainState:
    state = create_state(config, plan_architecture(config, CLASSES), 4, torch.device("cpu"))
    state.model.train()
    return state


def finite(state: TrainState, sums: Sequence[torch.Tensor]) -> bool:
    kept = state.objective.state_dict()["weighting"].values()
    values = [*sums, *state.model.state_dict().values(), *map(torch.tensor, kept)]
    return all(bool(value.isfinite().all()) for value in values)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("backbone", [CONVNEXT, RESNET], ids=["convnext", "resnet"])
def test_training_goes_on_with_what_is_left(backbone: dict[str, Any], views: str) -> None:
    damaged, lost = faults()
    config = config_for(backbone, **VIEWS[views])
    state = fresh(config)
    batches = list(damaged.here(config).train_batches(0))
    sums = [train_step(state.model, batch, state.objective, state.update) for batch in batches]
    assert finite(state, sums)
    rows = sum(float(step[SUMS.index("task_rows")]) for step in sums)
    assert rows == len(WHOLE.d) - len(set(lost) & WHOLE.d)


def batches_without(role: str, config: Config, world: int = 2) -> list[list[Batch]]:
    """A step's batch on each of two ranks; the second has lost its rows of D or of E."""
    whole = [list(WHOLE.here(config, rank, world).train_batches(0)) for rank in range(world)]
    second = whole[1][1]
    first_e = len(second.images) - int((second.membership == 0).sum())
    rows = slice(0, second.n_task) if role == "d" else slice(first_e, None)
    numbers = [int(name[1:]) for name in second.sample_id[rows].tolist()]
    damaged = with_faults({n: Fault("is gone") for n in numbers})
    less = [list(damaged.here(config, rank, world).train_batches(0)) for rank in range(world)]
    return [less[rank] for rank in range(world)]


@pytest.mark.parametrize("role", ["d", "e"])
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("backbone", [CONVNEXT, RESNET], ids=["convnext", "resnet"])
def test_a_rank_may_lose_all_its_rows_of_d_or_of_e(
    backbone: dict[str, Any], views: str, role: str
) -> None:
    """It must come through forward and backward, or the other ranks would wait for it."""
    config = config_for(backbone, **VIEWS[views])
    _, second = batches_without(role, config)
    batch = second[1]
    if role == "d":
        assert batch.n_task == batch.head_from == 0
        assert batch.membership.tolist() == [0.0] * len(batch.images)
    else:
        assert batch.n_task > 0
        assert batch.membership.tolist() == [1.0] * batch.n_task
    state = fresh(config)
    loss, sums = forward(state.model, batch, Objective())
    loss.backward()
    assert loss.isfinite()
    assert sums.isfinite().all()
    assert float(sums[SUMS.index("task_rows")]) == batch.n_task
    assert float(sums[SUMS.index("told_rows")]) == int(batch.told.sum())
    for name, parameter in state.model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert finite(state, [])


@pytest.mark.parametrize("weighting", ["initial", "ema", "none", "uncertainty", "gradnorm"])
def test_a_step_whose_rows_of_d_are_all_lost_does_no_harm(weighting: str) -> None:
    config = config_for(CONVNEXT, weighting)
    whole = list(WHOLE.here(config).train_batches(0))
    numbers = [int(name[1:]) for name in whole[1].sample_id[: whole[1].n_task].tolist()]
    damaged = with_faults({n: Fault("is gone") for n in numbers})
    batches = list(damaged.here(config).train_batches(0))
    assert [batch.n_task == 0 for batch in batches] == [False, True, False, False]
    state = fresh(config)
    sums = [train_step(state.model, batch, state.objective, state.update) for batch in batches]
    assert finite(state, sums)


def test_a_batch_of_which_nothing_is_left_can_be_made() -> None:
    whole = next(iter(WHOLE.here(config_of()).train_batches(0)))
    numbers = [int(name[1:]) for name in whole.sample_id.tolist()]
    damaged = with_faults({n: Fault("is gone") for n in numbers})
    batch = next(iter(damaged.here(config_of()).train_batches(0)))
    assert batch.images.shape == (0, *whole.images.shape[1:])
    assert (batch.n_task, batch.head_from, len(batch.labels)) == (0, 0, 0)
    assert batch.sample_id.dtype.kind == "U"
    assert np.array_equal(batch.membership, [])
