"""The processes that read: they give what reading here gives, go on through epochs, and end."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from small_source import Set, assert_same_batches, config_of

from amint_ray.contracts import Role, RunError
from amint_ray.data.sources import Fault
from amint_ray.data.streaming import StreamedStreams

SIZES = [6] * 20
COUNTS = {"member": 50, "withheld": 8, "external": 30, "calibration": 20}
SET = Set(SIZES, COUNTS)
PATIENCE_S = 60.0


def readers_of(process: psutil.Process) -> set[int]:
    """Reading processes: children of the one that forks them."""
    found = set()
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            parent = child.parent()
            forked = parent is not None and "forkserver" in " ".join(parent.cmdline())
            if forked and child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found


def mine() -> set[int]:
    return readers_of(psutil.Process())


def until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    gc.collect()
    assert until(lambda: not mine(), 10)


@pytest.mark.parametrize("world", [1, 2])
def test_processes_give_what_reading_here_gives_and_go_on(world: int) -> None:
    """The other tests may then read without processes."""
    config = config_of(
        data={"augment": "timm"}, train={"external_ratio": 1.4, "epochs": 9}, mint={"views": "task"}
    )
    where = {"rank": world - 1, "world": world, "readers": 2}
    here, streams = SET.here(config, **where), SET.streamed(config, **where)
    whole = [list(here.train_batches(epoch)) for epoch in range(3)]
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    used = []
    for epoch, first, last in ((0, 0, 4), (1, 0, 4), (2, 0, 4), (0, 2, 3), (0, 3, 4), (1, 0, 4)):
        batches = streams.train_batches(epoch, first)
        taken = [next(batches) for _ in range(first, last)]
        assert_same_batches(taken, whole[epoch][first:last])
        used.append(mine())
    assert [len(pids) for pids in used] == [2] * 6
    assert used[0] == used[1]
    assert not used[1] & used[3]  # another place: they begin anew
    assert used[3] == used[4] == used[5]  # the very next one, and the next epoch
    # The model draws the same whether or not anything was read.
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    seen = [n for b in streams.score_batches(list(Role)) for n in b.sample_id.tolist()]
    expected_ids = [n for b in here.score_batches(list(Role)) for n in b.sample_id.tolist()]
    assert sorted(seen) == sorted(expected_ids)
    assert mine() == used[5]  # those that scored have ended, those that train go on
    assert torch.equal(torch.get_rng_state(), before[0])
    streams.close()
    assert until(lambda: not mine(), 10)
    streams.close()


def test_streams_that_are_dropped_leave_no_process() -> None:
    streams = SET.streamed(config_of(), readers=2)
    batches = streams.train_batches(0)
    next(batches)
    scores = streams.score_batches(list(Role))
    next(scores)
    assert len(mine()) == 4
    del scores
    assert until(lambda: len(mine()) == 2, 10)
    del batches, streams
    assert until(lambda: not mine(), 10)


def test_closed_streams_can_be_read_again_and_a_rank_may_have_nothing_to_score() -> None:
    streams = SET.streamed(config_of(), rank=2, world=3, readers=1)
    first = list(streams.train_batches(0))
    streams.close()
    assert_same_batches(list(streams.train_batches(0)), first)
    streams.close()
    few = Set([3, 4], {"member": 6, "test": 1})
    alone = few.streamed(config_of(train={"batch_size": 2}), readers=2)
    assert [b.sample_id.tolist() for b in alone.score_batches([Role.TEST])] == [
        sorted(few.having(Role.TEST))
    ]


def test_what_is_lost_comes_through_and_too_much_ends_the_run() -> None:
    numbers = sorted(int(name[1:]) for name in SET.d)[:3]
    damaged = Set(SIZES, COUNTS, instead={n: Fault("is gone") for n in numbers}, gone={11: "hm"})
    for share in (1.0, 3 / 120):
        streams = damaged.streamed(config_of(data={"max_bad_fraction": share}), readers=2)
        if share == 1.0:
            here = damaged.here(config_of(), readers=2)
            assert_same_batches(list(streams.train_batches(0)), list(here.train_batches(0)))
            expected = {name for name in damaged.source.sample_ids(11) if name in SET.d}
            assert expected | {f"n{n:03d}" for n in numbers} <= set(streams.lost)
            assert set(streams.lost) <= set(here.lost)
        else:
            with pytest.raises(RunError, match=r"^data: [4-9] of 120 images"):
                list(streams.train_batches(0))
        streams.close()


PROGRAM = """
import os, sys, time
from small_source import Set, config_of
print("imported", flush=True)  # twice if a reader imported the program again
streams = Set({sizes}, {counts}).streamed(config_of(train={{"epochs": 500}}), readers=2)
next(streams.train_batches(0))
print("reading", flush=True)
time.sleep(600)
"""


def test_readers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Even if it is killed; and a program without a `__main__` guard is run once."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(sizes=SIZES, counts=COUNTS))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as started:
        assert started.stdout is not None
        try:
            assert started.stdout.readline() == "imported\n"
            assert started.stdout.readline() == "reading\n"
            process = psutil.Process(started.pid)
            readers = [psutil.Process(pid) for pid in readers_of(process)]
            family = process.children(recursive=True)
            assert len(readers) == 2
            started.kill()
            started.wait(PATIENCE_S)
            assert until(lambda: not any(map(alive, family)), 30), "they stay"
        finally:
            started.kill()
            for child in family if "family" in locals() else []:
                with contextlib.suppress(psutil.Error):
                    child.kill()


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_the_loader_is_told_of_no_more_than_it_needs() -> None:
    """Constructing streams starts no reader; the first batch does."""
    streams = SET.streamed(config_of(), readers=2)
    assert isinstance(streams, StreamedStreams)
    assert streams.steps_per_epoch == 4
    assert not mine()
