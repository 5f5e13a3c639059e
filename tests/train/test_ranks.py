"""Two workers give what one gives. Real processes, gloo on the loopback interface."""

from __future__ import annotations

import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_jobs
import torch
from rank_jobs import BAD_STEP, BATCH_NORM, POISONED, TRAININGS
from training_setup import (
    COUNTS,
    RankContext,
    architecture_of,
    data_set,
    fresh_state,
    ids_of_step,
    streams_of,
)

from amint_ray.contracts import Role
from amint_ray.evaluation.scores import score
from amint_ray.model.joint import AuditedModel
from amint_ray.train.state import identity_of

pytestmark = pytest.mark.slow
LIMIT_S = 240.0
NAMES = list(TRAININGS)
ID = "sample_id"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What both ranks found."""
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=rank_jobs.main, args=(rank, 2, folder)) for rank in range(2)]
    try:
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + LIMIT_S
        while any(w.is_alive() for w in workers) and time.monotonic() < deadline:
            if any(w.exitcode not in (None, 0) for w in workers):
                break  # the other one would wait for it for ever
            time.sleep(0.1)
        assert [w.exitcode for w in workers] == [0, 0]
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join(timeout=10)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def _alone(folder: Path) -> RankContext:
    return RankContext(folder / "alone", 0, 1)


def _same_table(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tol: float) -> None:
    assert got.keys() == expected.keys()
    for name in (ID, "role", "label"):
        assert np.array_equal(got[name], expected[name]), name
    for name in ("task_loss", "mint_logit"):
        np.testing.assert_allclose(got[name], expected[name], rtol=tol, atol=tol, err_msg=name)


def test_scores_and_monitor_are_those_of_one_worker(
    two: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = rank_jobs.untrained_scores(_alone(tmp_path))
    # Eleven calibration images: a mean of the ranks' means would be another number.
    assert COUNTS[Role.CALIBRATION] % 2 == 1
    for rank in two:
        assert rank["untrained"]["monitor"] == pytest.approx(alone["monitor"], rel=1e-5)
        assert rank["untrained"]["select"] == pytest.approx(alone["select"], rel=1e-5)
    # The watched values are there, too, and what is selected by is the same to the last bit.
    assert two[0]["untrained"]["select"] == two[1]["untrained"]["select"]
    assert alone["monitor"].items() <= alone["select"].items()
    assert {"selection.membership.member.auc", "selection.task.loss"} <= alone["select"].keys()
    _same_table(two[0]["untrained"]["scores"], alone["scores"], 1e-5)
    ids = alone["scores"][ID].tolist()
    assert ids == sorted(data_set()[1].sample_id.tolist())
    assert np.array_equal(
        two[0]["untrained"]["scores"]["prediction"], alone["scores"]["prediction"]
    )
    assert len(two[1]["untrained"]["scores"][ID]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_training_gives_the_losses_and_weights_of_one_worker(
    two: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    alone = rank_jobs.losses_of_every_step(TRAININGS[name], _alone(tmp_path))
    for rank in two:
        for got, expected in zip(rank[name]["history"], alone["history"], strict=True):
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for key, expected in alone["weights"].items():
        first, second = two[0][name]["weights"][key], two[1][name]["weights"][key]
        assert torch.equal(first, second), key
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=2e-6, msg=key)
    _same_table(two[0][name]["scores"], alone["scores"], 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_above_has_something_to_find(name: str) -> None:
    """Rows that train the head fall unevenly, and the weights move by more than the tolerance."""
    config = TRAININGS[name]
    told = [
        [int(batch.told[: batch.n_task].sum()) for batch in streams.train_batches(0)]
        for streams in (streams_of(config, rank=r, world_size=2) for r in range(2))
    ]
    rows = [
        [batch.n_task for batch in streams_of(config, rank=r, world_size=2).train_batches(0)]
        for r in range(2)
    ]
    assert rows == [[5, 5, 5], [4, 4, 5]]
    shares = [[t / r for t, r in zip(*of, strict=True)] for of in zip(told, rows, strict=True)]
    assert any(a != b for a, b in zip(*shares, strict=True))


def test_with_batch_norm_every_score_comes_from_the_model_that_is_kept(
    two: list[dict[str, Any]],
) -> None:
    """DDP lets the ranks' running statistics part in the last step; only rank 0's are stored."""
    model = AuditedModel(architecture_of(BATCH_NORM))
    model.load_state_dict(two[0]["batch_norm"]["weights"])
    table = score(model, streams_of(BATCH_NORM).score_batches(list(Role)), torch.device("cpu"))
    _same_table(two[0]["batch_norm"]["scores"], table.columns, 1e-4)


def test_gradients_go_round_once_a_step_however_it_is_computed(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["exchanges"] == [3, 3]


def test_a_bad_row_of_one_rank_stops_all_with_the_same_words(
    two: list[dict[str, Any]], folder: Path
) -> None:
    text = two[0]["message"]
    assert two[1]["message"] == text
    assert text.startswith(f"step {BAD_STEP} (epoch 2): task loss nan, MINT loss nan;")
    assert set(re.findall(r"s/\d+", text)) == ids_of_step(POISONED, BAD_STEP)
    # No checkpoint was written after the bad step, and the one before it can be read.
    state = fresh_state(POISONED)
    state.load(folder / "poisoned", identity=identity_of(POISONED, None))
    assert state.epoch == 1
    assert all(w.isfinite().all() for w in state.model.state_dict().values())
