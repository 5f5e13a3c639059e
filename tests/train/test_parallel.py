"""One, two and three workers, whole or sharded models: the same losses. Real processes, gloo."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import parallel_jobs
import pytest
import torch
from parallel_jobs import CONFIGS, NORMS, SHARDED, STEPS, Rows, in_parallel, latest, several_steps
from safetensors.torch import load_file
from torch import nn
from training_setup import architecture_of, fresh_state, streams_of

from amint_ray.evaluation.reference import read_reference
from amint_ray.evaluation.scores import read_scores
from amint_ray.model.joint import AuditedModel
from amint_ray.train.loop import REFERENCE, SCORES, LocalContext
from amint_ray.train.reference import take_reference
from amint_ray.train.shards import load_shards, save_shards
from amint_ray.train.state import STATE, WEIGHTS, check_checkpoint, identity_of
from amint_ray.train.update import micro_batches

pytestmark = pytest.mark.slow
LIMIT_S = 400.0
# Overflowing gradients are scaled per worker, so that one worker may skip a step that two do.
AGAINST_ONE = [name for name in CONFIGS if "float16" not in name]


def processes(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of several workers found."""
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=parallel_jobs.main, args=(rank, world_size, folder))
        for rank in range(world_size)
    ]
    try:
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + LIMIT_S
        while any(w.is_alive() for w in workers) and time.monotonic() < deadline:
            if any(w.exitcode not in (None, 0) for w in workers):
                break  # the others would wait for it for ever
            time.sleep(0.1)
        assert [w.exitcode for w in workers] == [0] * world_size
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join(timeout=10)
    files = [folder / f"{world_size}-{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def several(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return {world_size: processes(world_size, folder) for world_size in (3, 2)}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: several_steps(config, 0, 1) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", AGAINST_ONE)
def test_losses_are_those_of_one_worker(
    several: dict[int, list[dict[str, Any]]],
    alone: dict[str, dict[str, Any]],
    name: str,
    world_size: int,
    parallel: str,
) -> None:
    expected = alone[name]
    assert expected["losses"].shape == (STEPS, 2)
    assert (expected["losses"][0] - expected["losses"][-1]).abs().max() > 0.02
    for rank in several[world_size]:
        got = rank[f"{name}-{parallel}"]
        torch.testing.assert_close(got["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
        for key, value in expected["weights"].items():
            torch.testing.assert_close(got["weights"][key], value, rtol=1e-3, atol=5e-5, msg=key)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", NORMS)
def test_synchronised_norms_are_one_norm_over_all_rows(
    several: dict[int, list[dict[str, Any]]], name: str, world_size: int
) -> None:
    """Against torch's in float64; as exact as the precision of input and output allows."""
    rows = NORMS[name]
    x, weight = rows.make()
    exact = Rows(rows.mean, rows.spread).through(
        nn.BatchNorm2d(3).double(), x.double(), weight.double()
    )
    like = rows.through(nn.BatchNorm2d(3), x, weight)
    # A number's rounding, in units of the spread that it is divided by.
    scale = max(1.0, rows.mean / rows.spread)
    tolerance = {"y": torch.finfo(rows.dtype).eps * 4 * scale}
    tolerance["gradient"] = tolerance["y"] / rows.spread
    for rank, found in enumerate(several[world_size]):
        got = found["norms"][name]
        assert got["y"].dtype == like["y"].dtype
        for key in ("y", "gradient"):
            expected = exact[key][rank::world_size]
            torch.testing.assert_close(
                got[key].double(), expected, rtol=torch.finfo(rows.dtype).eps, atol=tolerance[key]
            )
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert got[key].dtype == like[key].dtype
            torch.testing.assert_close(got[key], exact[key].to(got[key].dtype), rtol=1e-4, atol=0)


def test_float16_skips_the_same_steps_sharded_or_not(
    several: dict[int, list[dict[str, Any]]],
) -> None:
    for ranks in several.values():
        for rank in ranks:
            whole, shared = (rank[f"convnext-float16-{p}"]["losses"] for p in ("ddp", "fsdp"))
            torch.testing.assert_close(shared, whole, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_worker_has_its_share_of_the_weights(
    several: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    for name, config in CONFIGS.items():
        total = sum(p.numel() for p in fresh_state(config).model.parameters())
        shares = [rank[f"{name}-fsdp"]["local"] for rank in several[world_size]]
        assert sum(shares) == total
        assert max(shares) < 0.75 * total  # rows of a tensor stay together, hence not evenly
        assert all(rank[f"{name}-ddp"]["local"] == 0 for rank in several[world_size])


def test_a_sharded_run_goes_on_with_another_number_of_workers(
    several: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    """Three workers die after two of four epochs; three, two and one go on with what they left."""
    straight, again = several[3][0]["straight"], several[3][0]["resumed"]
    left = latest(folder / "broken")
    assert left is not None and left.name == "checkpoint_1"
    check_checkpoint(left)
    assert again["steps"] == [7, 8, 9, 10, 11, 12]
    for key, value in straight["weights"].items():
        assert torch.equal(again["weights"][key], value), key
    assert again["history"] == straight["history"]
    fewer = several[2][0]["resumed"]
    one = parallel_jobs.sharded_run(folder / "broken-1", 0, 1)
    for resumed in (fewer, one):
        assert resumed["steps"] == again["steps"]
        for got, expected in zip(resumed["history"], straight["history"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)
        for key, value in straight["weights"].items():
            torch.testing.assert_close(resumed["weights"][key], value, rtol=1e-3, atol=1e-3)


def test_the_last_sharded_checkpoint_holds_whole_weights_and_all_scores(
    several: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    straight, last = several[3][0]["straight"], latest(folder / "straight-3")
    assert last is not None
    check_checkpoint(last)
    state = json.loads((last / STATE).read_text())
    assert {"__0_0.distcp", "__1_0.distcp", "__2_0.distcp", WEIGHTS} <= state["files"].keys()
    assert state["manifest_fingerprint"] == "roles"
    stored = load_file(last / WEIGHTS)
    model = AuditedModel(architecture_of(SHARDED))
    model.load_state_dict(stored)
    for key, value in straight["weights"].items():
        assert torch.equal(stored[key], value), key
    scores = read_scores(last / SCORES)
    for name, column in straight["scores"].items():
        assert np.array_equal(getattr(scores, name), column), name
    # Workers have 22, 22 and 21 images to score in batches of four: none is scored twice or lost.
    assert len(set(scores.sample_id.tolist())) == len(scores) == 65
    alone = take_reference(
        model, streams_of(SHARDED), LocalContext(folder), most=2000, head_trained=True
    )
    assert alone is not None
    kept = read_reference(last / REFERENCE)
    assert kept.role.tolist() == alone.role.tolist()
    assert kept.label.tolist() == alone.label.tolist()
    np.testing.assert_allclose(kept.mint_logit, alone.mint_logit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept.taps, alone.taps, rtol=1e-4, atol=1e-5)
    for name, column in vars(alone.told).items():
        np.testing.assert_allclose(getattr(kept.told, name), column, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("what", "bad_rank"), [("share", 1), ("scores", 0)])
def test_where_one_worker_cannot_write_all_are_told_where(
    several: dict[int, list[dict[str, Any]]], folder: Path, what: str, bad_rank: int
) -> None:
    for world_size, ranks in several.items():
        place = f"{folder / f'full-{world_size}' / f'{what}-of-{bad_rank}'} of "
        told = [rank["full disks"][what] for rank in ranks]
        assert len(set(told)) == 1
        assert told[0].startswith(f"{place}{socket.gethostname()}: ")
        assert "directory" in told[0] or "exists" in told[0]


def test_a_checkpoint_of_other_roles_is_not_taken(
    several: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    state = fresh_state(SHARDED)
    with pytest.raises(ValueError, match="manifest_fingerprint roles, this run has others"):
        state.load(folder / "straight-3" / "checkpoint_2", identity=identity_of(SHARDED, "others"))


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("where", ["metadata", "values"])
def test_a_pickle_in_the_shards_is_not_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if where == "values":
        optimizer.param_groups[0]["evil"] = _Evil()
    save_shards(model, optimizer, tmp_path / "shards")
    optimizer.param_groups[0]["evil"] = 0
    if where == "metadata":
        (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"not taken|Weights only load failed"):
        load_shards(model, optimizer, tmp_path / "shards")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("accumulate", "micro_batch", "fewest", "most", "expected"),
    [
        *((1, None, 64, 64, 1), (4, None, 64, 64, 4), (1, 16, 64, 64, 4), (1, 16, 33, 33, 3)),
        *((2, 64, 64, 64, 2), (1, 2, 5, 5, 2), (1, 2, 1, 1, 1), (1, 100, 8, 8, 1)),
        *((1, 2, 32, 33, 16), (1, 16, 32, 33, 3)),
    ],
)
def test_micro_batches_hold_no_more_than_asked_and_no_single_row(
    accumulate: int, micro_batch: int | None, fewest: int, most: int, expected: int
) -> None:
    config = SHARDED.train.model_copy(update={"accumulate": accumulate, "micro_batch": micro_batch})
    assert micro_batches(config, fewest, most) == expected


def test_whole_and_sharded_are_two_configurations() -> None:
    whole = in_parallel(SHARDED, "ddp")
    assert identity_of(whole, None) != identity_of(SHARDED, None)
