"""A run that stops within an epoch goes on at the very next sample and ends as if it had not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_source import Here, Set
from training_setup import (
    CONVNEXT,
    RESNET,
    VIT,
    Backbone,
    Poisoned,
    architecture_of,
    assert_same_weights,
    config_of,
)

from amint_ray.config.schema import Config, Loss
from amint_ray.contracts import Batch, Role, RunError, Streams
from amint_ray.data.arrays import ArraySource, open_digits
from amint_ray.data.index import Index, index_here
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.memory import load_memory
from amint_ray.data.sources import Fault
from amint_ray.data.streaming import StreamedStreams
from amint_ray.model.joint import plan_architecture
from amint_ray.train.loop import LocalContext, Trained, train
from amint_ray.train.state import STATE
from amint_ray.train.step import SUMS

RATE = "train/steps_per_second"
SAMPLES, BATCH = 200, 16
Make = Callable[[Config], Streams]


def digits(config: Config) -> tuple[ArraySource, Index]:
    source = open_digits(SAMPLES)
    return source, index_here(source, config.data, readers=1)


def in_memory(config: Config) -> Streams:
    images, index = load_memory(open_digits(SAMPLES), config.data, readers=1)
    return MemoryStreams(images, index.manifest, config, rank=0, world_size=1)


def streamed_here(config: Config) -> Streams:
    source, index = digits(config)
    return Here(source, index.rows(), config, rank=0, world_size=1, readers=2)


def streamed(config: Config, readers: int = 1) -> Streams:
    source, index = digits(config)
    return StreamedStreams(source, index.rows(), config, rank=0, world_size=1, readers=readers)


class Watched:
    """Streams that remember whom they showed: (epoch, step) to the names of D and of E."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.steps_per_epoch, self.task_rows = streams.steps_per_epoch, streams.task_rows
        self.shown: dict[tuple[int, int], tuple[list[str], list[str]]] = {}

    @property
    def lost(self) -> Mapping[str, str]:
        return self._streams.lost

    def note_lost(self, lost: Mapping[str, str]) -> None:
        self._streams.note_lost(lost)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(self._streams.train_batches(epoch, first_step), first_step):
            head = batch.sample_id[batch.head_from :]
            e = head[batch.membership.numpy() == 0].tolist()
            self.shown[epoch, step] = batch.sample_id[: batch.n_task].tolist(), e
            yield batch

    def score_batches(self, roles: Any, most: int | None = None) -> Any:
        return self._streams.score_batches(roles, most)

    def close(self) -> None:
        self._streams.close()

    def of_epoch(self, epoch: int, part: int) -> list[str]:
        return [name for (of, _), both in self.shown.items() if of == epoch for name in both[part]]


class DiesAfter(LocalContext):
    """Fails behind a checkpoint, or some steps later."""

    def __init__(self, folder: Path, *, epoch: int, step: int, later: int = 0) -> None:
        super().__init__(folder)
        self._at, self._later = {"epoch": epoch, "step": step}, later
        self._left: int | None = None

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        super().report(metrics, write_checkpoint, everywhere=everywhere)
        if self._at == metrics:
            if not self._later:
                raise ConnectionError("the worker died")
            self._left = self._later
        return True

    def progress(self, event: Mapping[str, Any]) -> None:
        super().progress(event)
        if self._left is not None and event["phase"] == "train":
            self._left -= 1
            if self._left == 0:
                raise ConnectionError("the worker died")


def small(backbone: Backbone = CONVNEXT, **options: Any) -> Config:
    """Six steps an epoch: checkpoints behind the third alone."""
    train_options = {
        "epochs": 2,
        "batch_size": BATCH,
        "checkpoint_every": 1,
        "checkpoint_steps": 3,
        "lr": 3e-3,
        "schedule": "cosine",
        **options.pop("train", {}),
    }
    data = {"augment": "crop_flip", **options.pop("data", {})}
    return config_of(backbone, train=train_options, data=data, **options)


def run(config: Config, make: Make, context: LocalContext) -> tuple[Trained, Watched]:
    streams = Watched(make(config))
    architecture = plan_architecture(config, 10)
    try:
        return train(config, architecture, streams, context), streams
    finally:
        streams.close()


def folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def history(trained: Trained) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != RATE} for entry in trained.history]


def assert_same_end(got: Trained, expected: Trained) -> None:
    """Bit for bit."""
    assert_same_weights(got.model.state_dict(), expected.model.state_dict())
    assert history(got) == history(expected)
    for name, column in expected.scores.columns.items():
        assert np.array_equal(getattr(got.scores, name), column), name


def steps_of(context: LocalContext) -> list[int]:
    return [event["step"] for event in context.events if event["phase"] == "train"]


CASES: dict[str, dict[str, Any]] = {
    "convnext-ema": {
        "backbone": CONVNEXT,
        "loss": Loss(weighting="ema", ema_decay=0.7, warmup_epochs=1.5),
        "train": {"optimizer": "adamw", "accumulate": 2, "warmup_epochs": 0.7},
    },
    "resnet-initial": {"backbone": RESNET, "train": {"optimizer": "sgd"}},
    "vit-gradnorm": {"backbone": VIT, "loss": Loss(weighting="gradnorm")},
    "plain": {"backbone": CONVNEXT, "loss": Loss(lambda_mint=0.0)},
}


@pytest.mark.parametrize(
    ("case", "make"),
    [*((case, in_memory) for case in CASES), ("convnext-ema", streamed_here)],
)
def test_a_run_stopped_within_an_epoch_ends_like_the_straight_one(
    case: str, make: Make, tmp_path: Path
) -> None:
    """Weights, history and scores, with dropout; once right behind a checkpoint, once later."""
    config = small(**CASES[case], drop_rate=0.3)
    straight, all_of_it = run(config, make, LocalContext(folder(tmp_path, "straight")))
    assert all_of_it.steps_per_epoch in (5, 6)
    per_epoch = all_of_it.steps_per_epoch

    broken = folder(tmp_path, "broken")
    later = 0 if make is in_memory else 2
    with pytest.raises(ConnectionError):
        run(config, make, DiesAfter(broken, epoch=1, step=3, later=later))
    context = LocalContext(broken)
    resumed, rest = run(config, make, context)

    assert steps_of(context) == list(range(per_epoch + 4, 2 * per_epoch + 1))
    assert_same_end(resumed, straight)
    expected = {at: both for at, both in all_of_it.shown.items() if at >= (1, 3)}
    assert rest.shown == expected
    before = [name for at, (d, _) in all_of_it.shown.items() if (1, 0) <= at < (1, 3) for name in d]
    ids, role = resumed.scores.sample_id, resumed.scores.role
    d = ids[np.isin(role, [Role.MEMBER, Role.WITHHELD])].tolist()
    assert sorted(before + rest.of_epoch(1, 0)) == sorted(d)


def test_a_run_that_dies_behind_every_checkpoint_gets_there(tmp_path: Path) -> None:
    class Dies(LocalContext):
        def report(
            self, metrics: Mapping[str, Any], write_checkpoint: Any, *, everywhere: bool = False
        ) -> bool:
            super().report(metrics, write_checkpoint, everywhere=everywhere)
            raise ConnectionError("again")

    config = small(train={"checkpoint_steps": 2}, drop_rate=0.3)
    straight, _ = run(config, in_memory, LocalContext(folder(tmp_path, "straight")))
    broken = folder(tmp_path, "broken")
    deaths = 0
    while len(list(broken.iterdir())) < len(list((tmp_path / "straight").iterdir())):
        with pytest.raises(ConnectionError):
            run(config, in_memory, Dies(broken))
        deaths += 1
    assert deaths == 6  # behind the second and fourth step and the end of two epochs
    resumed, nothing = run(config, in_memory, LocalContext(broken))
    assert nothing.shown == {}
    assert_same_end(resumed, straight)


def test_readers_that_begin_within_an_epoch(tmp_path: Path) -> None:
    """With processes, timm's transforms, and another number of readers behind the interruption."""
    config = small(data={"augment": "timm"}, drop_rate=0.3)
    straight, _ = run(config, streamed, LocalContext(folder(tmp_path, "straight")))
    broken = folder(tmp_path, "broken")
    with pytest.raises(ConnectionError):
        run(config, streamed, DiesAfter(broken, epoch=1, step=3))
    resumed, rest = run(config, lambda c: streamed(c, readers=2), LocalContext(broken))
    assert min(rest.shown) == (1, 3)
    assert_same_end(resumed, straight)


def test_checkpoints_within_an_epoch_change_nothing_else(tmp_path: Path) -> None:
    """With dropout, a run that writes them is one that writes none, metrics included."""
    options = {"drop_rate": 0.3, "loss": Loss(weighting="ema")}
    found = []
    for steps in (None, 1, 2):
        config = small(train={"checkpoint_steps": steps}, **options)
        found.append(run(config, in_memory, LocalContext(folder(tmp_path, str(steps))))[0])
    assert_same_end(found[1], found[0])
    assert_same_end(found[2], found[0])


@pytest.mark.parametrize("every", [1, 2])
def test_what_a_checkpoint_within_an_epoch_holds(every: int, tmp_path: Path) -> None:
    """None is written behind the last step, where the epoch's own follows."""
    config = small(train={"checkpoint_steps": every})
    _, watched = run(config, in_memory, LocalContext(tmp_path))
    states = [json.loads((path / STATE).read_text()) for path in sorted(tmp_path.iterdir())]
    places = [(state["epoch"], state["step"]) for state in states]
    last = watched.steps_per_epoch
    within = list(range(every, last, every))
    assert places == [(0, s) for s in within] + [(1, 0)] + [(1, s) for s in within] + [(2, 0)]
    for (epoch, step), state in zip(places, states, strict=True):
        assert len(state["history"]) == epoch
        if not step:
            assert state["sums"] == []
            continue
        of = dict(zip(SUMS, state["sums"], strict=True))
        seen = [watched.shown[epoch, s] for s in range(step)]
        assert of["task_rows"] == sum(len(d) for d, _ in seen)
        assert of["told_rows"] >= sum(len(e) for _, e in seen)


def test_an_epochs_metrics_count_each_sample_once(tmp_path: Path) -> None:
    """Also where a part of it was trained before an interruption, and steps are not as large."""
    config = small(train={"epochs": 1, "checkpoint_steps": 2}, loss=Loss(lambda_mint=0.0))
    with pytest.raises(ConnectionError):
        run(config, in_memory, DiesAfter(tmp_path, epoch=0, step=4))
    (newest,) = sorted(tmp_path.iterdir())[-1:]
    before = dict(zip(SUMS, json.loads((newest / STATE).read_text())["sums"], strict=True))
    context = LocalContext(tmp_path)
    resumed, rest = run(config, in_memory, context)
    left = sum(len(d) for d, _ in rest.shown.values())
    rows = before["task_rows"] + left
    d = np.isin(resumed.scores.role, [Role.MEMBER, Role.WITHHELD]).sum()
    assert rows == d
    accuracy = resumed.history[0]["train/task_accuracy"] * d
    assert accuracy == pytest.approx(round(accuracy), abs=1e-6)
    assert before["task_correct"] <= round(accuracy) <= before["task_correct"] + left


def test_no_checkpoint_follows_a_step_that_is_not_finite(tmp_path: Path) -> None:
    """The step right before one is looked at first."""
    for bad, kept in ((2, 0), (3, 1)):
        config = config_of(CONVNEXT, train={"checkpoint_steps": 2})
        where = folder(tmp_path, str(bad))
        with pytest.raises(FloatingPointError, match=rf"step {bad} \(epoch 1\)"):
            streams = Poisoned(config, bad, float("nan"))
            train(config, architecture_of(config), streams, LocalContext(where))
        assert len(list(where.iterdir())) == kept


# --- memory and streaming -------------------------------------------------------------------------


def test_memory_and_streaming_train_on_the_same_samples(tmp_path: Path) -> None:
    config = small(
        data={"augment": "none"},
        train={"checkpoint_steps": None, "schedule": "constant"},
    )
    memory, a = run(config, in_memory, LocalContext(folder(tmp_path, "memory")))
    other, b = run(config, streamed, LocalContext(folder(tmp_path, "streamed")))
    assert a.shown.keys() == b.shown.keys()
    assert a.shown != b.shown  # in another order
    for epoch in range(2):
        assert sorted(a.of_epoch(epoch, 0)) == sorted(b.of_epoch(epoch, 0))
        assert len(a.of_epoch(epoch, 1)) == len(b.of_epoch(epoch, 1))
    for watched in (a, b):  # E goes round: no sample is a whole round ahead of another
        e = watched.of_epoch(0, 1) + watched.of_epoch(1, 1)
        names, counts = np.unique(e, return_counts=True)
        assert counts.max() - counts.min() <= 1
        assert len(names) == int((memory.scores.role == Role.EXTERNAL).sum())
    for name in ("sample_id", "role", "label"):
        assert np.array_equal(getattr(memory.scores, name), getattr(other.scores, name))
    for one, two in zip(history(memory), history(other), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert np.isfinite(two[key])
            if key.endswith("task_loss"):
                assert two[key] == pytest.approx(value, rel=0.25)
    assert not memory.lost
    assert not other.lost


def test_a_run_tells_which_images_it_lost(tmp_path: Path) -> None:
    whole = Set([6] * 12, {"member": 40, "withheld": 4, "external": 14, "calibration": 8})
    gone = sorted(int(name[1:]) for name in whole.d)[:3]
    counts = {"member": 40, "withheld": 4, "external": 14, "calibration": 8}
    damaged = Set([6] * 12, counts, instead={n: Fault("is gone") for n in gone})
    config = config_of(CONVNEXT, data={"max_bad_fraction": 0.5})
    context = LocalContext(tmp_path)
    trained = train(config, architecture_of(config), damaged.here(config), context)
    assert trained.lost == {f"n{n:03d}": "is gone" for n in gone}
    told = [event["lost"] for event in context.events if event["phase"] == "train"]
    assert told[-1] == 3
    assert told == sorted(told)
    assert len(trained.scores) == 72 - 3
    assert all(np.isfinite(value) for entry in trained.history for value in entry.values())


def test_what_was_lost_is_remembered_where_a_run_goes_on(tmp_path: Path) -> None:
    """Also if it can be read again, since steps that should have seen it did not."""
    counts = {"member": 40, "withheld": 4, "external": 14, "calibration": 8}
    whole = Set([6] * 12, counts)
    gone = sorted(int(name[1:]) for name in whole.d)[:3]
    damaged = Set([6] * 12, counts, instead={n: Fault("is gone") for n in gone})
    config = config_of(
        CONVNEXT,
        data={"max_bad_fraction": 3 / 72},
        train={"epochs": 2, "checkpoint_steps": 1},
    )
    architecture = architecture_of(config)
    for name in ("mended", "worse"):
        with pytest.raises(ConnectionError):
            dying = DiesAfter(folder(tmp_path, name), epoch=1, step=1)
            train(config, architecture, damaged.here(config), dying)
    context = LocalContext(tmp_path / "mended")
    trained = train(config, architecture, whole.here(config), context)
    assert trained.lost == {f"n{n:03d}": "is gone" for n in gone}
    # And counts against what may be lost.
    other = next(name for name in sorted(whole.d) if int(name[1:]) not in gone)
    worse = Set([6] * 12, counts, instead={int(other[1:]): Fault("is gone, too")})
    with pytest.raises(RunError, match="4 of 72 images"):
        train(config, architecture, worse.here(config), LocalContext(tmp_path / "worse"))
