"""The order of streaming: random, yet read from few shards at a time, and dealt out in pieces."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from amint_ray.data.orders import Positions, fixed_sample, shuffled, stream_count, windowed

SIZES = np.random.default_rng(0).integers(3, 14, 60)
SHARD = np.repeat(np.arange(60), SIZES).astype(np.int32)
# As with roles, not all of a shard's rows belong to it.
POSITIONS = np.sort(np.random.default_rng(1).permutation(len(SHARD))[:400])


def order(
    positions: Positions = POSITIONS,
    shard: npt.NDArray[np.int32] = SHARD,
    *,
    seed: int = 0,
    stream: str = "task",
    number: int = 0,
    streams: int = 24,
    window: int = 8,
) -> Positions:
    of = shard[positions]
    return windowed(positions, of, seed, stream, number, streams=streams, window=window)


def laid_end_to_end(found: Positions, streams: int) -> Positions:
    """The pieces one behind the other."""
    return np.concatenate([found[piece::streams] for piece in range(streams)])


def runs(values: npt.NDArray[np.int32]) -> list[int]:
    """Each value once for every stretch of it."""
    return values[np.concatenate([[True], values[1:] != values[:-1]])].tolist()


@pytest.mark.parametrize("streams", [1, 2, 24, 25, 399, 400, 500])
@pytest.mark.parametrize("window", [1, 3, 50, 10_000])
def test_each_sample_has_one_place(streams: int, window: int) -> None:
    found = order(streams=streams, window=window)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), POSITIONS)


@pytest.mark.parametrize("n", [0, 1, 2, 23, 24, 25])
def test_few_samples(n: int) -> None:
    assert sorted(order(POSITIONS[:n])) == POSITIONS[:n].tolist()


def test_it_is_a_function_of_seed_stream_and_number() -> None:
    variants = [{}, {"seed": 1}, {"stream": "external"}, {"number": 1}]
    found = [order(**variant).tolist() for variant in variants]
    assert found == [order(**variant).tolist() for variant in variants]
    assert len(set(map(tuple, found))) == 4
    # The shards' order differs, too, not just that within them.
    bare = [tuple(runs(SHARD[laid_end_to_end(order(window=1, **v), 24)])) for v in variants]
    assert len(set(bare)) == 4
    other = [tuple(shuffled(POSITIONS, 0, stream, 0)) for stream in ("task", "external")]
    assert len(set(other)) == 2


def test_it_leaves_numpys_own_randomness_alone() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    order()
    assert np.random.get_state()[1].tolist() == before


def test_without_a_window_all_shards_are_shuffled_and_stay_whole() -> None:
    """Laid end to end, every shard is one stretch, in the order of its rows."""
    for number in range(5):
        row = laid_end_to_end(order(window=1, number=number), 24)
        found = runs(SHARD[row])
        assert sorted(found) == sorted(set(SHARD[POSITIONS].tolist()))
        assert found != sorted(found)
        for shard in found:
            rows = row[SHARD[row] == shard]
            assert rows.tolist() == sorted(rows)


def test_any_shard_can_come_first_and_any_sample_in_its_window() -> None:
    firsts = [order(number=number, window=1)[0] for number in range(600)]
    counts = np.bincount(SHARD[firsts], minlength=60)
    assert counts.min() > 0
    assert counts.max() < 40  # ten on average
    # One shard for all: the window is all the mixing there is.
    alone = np.arange(100)
    shard = np.zeros(100, np.int32)
    places = np.array(
        [
            np.argsort(order(alone, shard, number=number, streams=1, window=10))[50]
            for number in range(400)
        ]
    )
    assert set(places.tolist()) >= set(range(44, 57))
    assert np.mean(places) == pytest.approx(50, abs=1)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("streams", [1, 7, 24])
def test_no_sample_moves_further_than_the_window(streams: int, window: int) -> None:
    moved = 0
    for number in range(20):
        still = order(streams=streams, number=number, window=1)
        found = order(streams=streams, number=number, window=window)
        for piece in range(streams):
            before, after = still[piece::streams], found[piece::streams]
            assert set(before) == set(after)  # a piece keeps what it has
            place = {sample: at for at, sample in enumerate(before.tolist())}
            far = max(abs(place[s] - at) for at, s in enumerate(after.tolist()))
            assert far <= window
            moved = max(moved, far)
    assert moved >= min(window - 1, 5)


@pytest.mark.parametrize("n", [24, 30, 47, 48, 400])
def test_pieces_are_as_long_as_each_other(n: int) -> None:
    """So that whoever takes places g, g + 24, … from any step on takes from one piece."""
    found = order(POSITIONS[:n], window=1)
    lengths = [len(found[piece::24]) for piece in range(24)]
    assert max(lengths) - min(lengths) <= 1
    stretches = [runs(SHARD[found[piece::24]]) for piece in range(24)]
    together = [shard for stretch in stretches for shard in stretch]
    # Cutting adds one stretch at most for each cut.
    assert len(together) <= len(set(together)) + 23


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8, 24])
@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 30])
def test_every_shard_is_read_once_or_twice_in_all(workers: int, readers: int, window: int) -> None:
    """Whoever has a piece reads a shard once for it."""
    streams = stream_count(workers * readers)
    for number in range(3):
        found = order(streams=streams, window=window, number=number)
        read = 0
        for worker in range(workers):
            for reader in range(readers):
                mine = [
                    piece
                    for piece in range(worker, streams, workers)
                    if piece // workers % readers == reader
                ]
                read += sum(len(set(SHARD[found[piece::streams]].tolist())) for piece in mine)
        shards = len(set(SHARD[POSITIONS].tolist()))
        assert shards <= read <= shards + streams - 1


def test_the_images_held_for_a_piece_are_a_window_and_a_shard() -> None:
    """Images of shards that were begun and are not asked for yet."""
    sizes = np.full(40, 25)
    shard = np.repeat(np.arange(40), sizes).astype(np.int32)
    window = 30
    for number in range(5):
        found = order(np.arange(1000), shard, streams=4, window=window, number=number)
        for piece in range(4):
            samples = found[piece::4]
            held: set[int] = set()
            seen: set[int] = set()
            most = 0
            for sample in samples.tolist():
                if int(shard[sample]) not in seen:
                    seen.add(int(shard[sample]))
                    held |= set(samples[shard[samples] == shard[sample]].tolist())
                most = max(most, len(held))
                held.discard(sample)
            assert most <= window + 25 + 25  # and a part of another that a cut left


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6, 8, 12, 24])
def test_divisors_of_24_share_one_order(readers: int) -> None:
    assert stream_count(readers) == 24


@pytest.mark.parametrize(("readers", "streams"), [(5, 25), (7, 28), (16, 32), (64, 64), (25, 25)])
def test_other_numbers_of_readers_have_as_many_streams_each(readers: int, streams: int) -> None:
    assert stream_count(readers) == streams
    assert streams % readers == 0
    assert streams >= 24


def test_epochs_mix_what_lies_far_apart() -> None:
    """Steps of successive epochs share few samples."""
    together = []
    for number in range(4):
        found = order(number=number, window=16)
        together.append([frozenset(step) for step in np.array_split(found, 25)])
    for a, b in itertools.pairwise(together):
        shared = max(len(one & other) for one in a for other in b)
        assert shared <= 6  # of sixteen


def test_a_fixed_sample_knows_no_period() -> None:
    """A source that has its ten classes in turn is not sampled in one of them."""
    first, second = np.arange(0, 4000, 2), np.arange(1, 400, 2)
    sample = fixed_sample([first, second], 400)
    assert np.array_equal(sample, np.sort(sample))
    assert np.array_equal(sample[sample % 2 == 1], second)  # has no more
    taken = sample[sample % 2 == 0]
    assert len(set(taken.tolist())) == 400
    counts = np.bincount(taken // 2 % 10, minlength=10)
    assert counts.min() > 20
    assert np.array_equal(fixed_sample([first], None), first)
    assert fixed_sample([], 3).tolist() == []
