"""Near-duplicates: the groups are those of comparing every pair, and each shares one role."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hub_files import NO_TEST, hub, indexed, opened, photo, roles, write_hub
from image_files import encoded, noise
from PIL import Image

from amint_ray.data import near_duplicates as module
from amint_ray.data.images import decode, perceptual_hash
from amint_ray.data.index import SCHEMA, Index, examine, settle
from amint_ray.data.near_duplicates import near_duplicate_groups
from amint_ray.data.roles import role_of

Words = npt.NDArray[np.uint64]


# --- groups ---------------------------------------------------------------------------------------


def by_all_pairs(words: Words, distance: int) -> list[int]:
    """Groups by comparing every pair, each named by its first member."""
    parent = list(range(len(words)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    numbers = [int(word) for word in words]
    for i, one in enumerate(numbers):
        for j in range(i):
            if (one ^ numbers[j]).bit_count() <= distance:
                low, high = sorted((root(i), root(j)))
                parent[high] = low
    return [root(i) for i in range(len(words))]


def named_by_first(groups: npt.NDArray[np.int32]) -> list[int]:
    first: dict[int, int] = {}
    return [first.setdefault(group, i) for i, group in enumerate(groups.tolist())]


def flipped(word: int, bits: Any) -> int:
    return functools.reduce(lambda w, bit: w ^ (1 << int(bit)), bits, word)


def planted(distance: int, seed: int = 0) -> Words:
    """Random words, among them chains of steps of just the distance, or of one bit more."""
    generator = np.random.default_rng(seed)
    words = [int(w) for w in generator.integers(0, 2**64, 150, dtype=np.uint64)]
    for start in words[:60]:
        word, step = start, distance + int(generator.integers(0, 2))
        for _ in range(int(generator.integers(1, 5))):
            word = flipped(word, generator.choice(64, step, replace=False))
            words.append(word)
    for start in words[60:90]:  # one bit in each band but one, and neighbouring bits
        edges = np.linspace(0, 64, distance + 2).astype(int)[:distance]
        words.append(flipped(start, edges))
        words.append(flipped(start, range(64 - distance, 64)))
    words += [0, 2**64 - 1, 2**63, 1, *words[:5]]
    return generator.permutation(np.array(words, np.uint64))


@pytest.mark.parametrize("distance", [0, 1, 3, 8, 16])
def test_groups_are_those_of_comparing_every_pair(distance: int) -> None:
    words = planted(distance)
    expected = by_all_pairs(words, distance)
    found = near_duplicate_groups(words.view(np.int64), distance)
    assert named_by_first(found) == expected
    assert len(set(expected)) < len(set(words.tolist())) + (distance == 0)
    sizes = np.bincount(expected)
    assert sizes.max() < 30  # the chains have not all flown together
    assert distance == 0 or sizes.max() >= 4


def test_groups_do_not_depend_on_how_much_is_compared_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(1)
    # All in one bucket of the upper band, so that it is cut into many pieces.
    words = generator.integers(0, 2**32, 300, dtype=np.uint64)
    words[150:] = words[:150] ^ (np.uint64(1) << generator.integers(0, 32, 150).astype(np.uint64))
    expected = by_all_pairs(words, 1)
    for most in (1, 1000, 1 << 22):
        monkeypatch.setattr(module, "_PAIRS_AT_ONCE", most)
        assert named_by_first(near_duplicate_groups(words.view(np.int64), 1)) == expected


def test_pairs_of_a_dense_group_are_not_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 2¹⁰ words of some ten bits are near each other: half a million pairs."""
    words = np.arange(1 << 10, dtype=np.uint64)
    words = np.concatenate([words, ~words, [np.uint64(0xF0F0F0F0F0F0 << 8)]])
    held: list[int] = []
    components = module._components

    def watched(edges: Any, n: int) -> Any:
        held.append(sum(pairs.shape[1] for pairs in edges))
        return components(edges, n)

    monkeypatch.setattr(module, "_components", watched)
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 5000)
    found = near_duplicate_groups(words.view(np.int64), 8)
    assert named_by_first(found) == [0] * 1024 + [1024] * 1024 + [2048]
    assert len(held) > 20
    assert max(held) <= 5000 + len(words) + 5000


NONE: list[int] = []


@pytest.mark.parametrize("words", [NONE, [-1], [5, 5, 5]])
def test_few_words(words: list[int]) -> None:
    for distance in (0, 4):
        found = near_duplicate_groups(np.array(words, np.int64), distance)
        assert found.tolist() == [0] * len(words)


def test_a_hundred_thousand_words_take_no_all_pairs() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    words[50_000:] = words[:50_000] ^ np.uint64(1 << 40 | 1 << 7)
    found = near_duplicate_groups(words.view(np.int64), 2)
    assert (found[:50_000] == found[50_000:]).all()
    assert len(set(found.tolist())) == 50_000


# --- roles ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reencoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 photographs, the same saved anew by others, and smaller ones."""
    root = tmp_path_factory.mktemp("photos")
    photos = [photo(seed) for seed in range(60)]
    write_hub(root / "train-a.parquet", [encoded(p, "JPEG", quality=95) for p in photos])
    write_hub(root / "train-b.parquet", [encoded(p, "JPEG", quality=60) for p in photos])
    small = [encoded(Image.fromarray(p).resize((64, 48)), "JPEG", quality=85) for p in photos]
    write_hub(root / "train-c.parquet", small)
    return root


def test_reencoded_and_resized_copies_share_a_role(reencoded: Path) -> None:
    shared = {}
    for distance in (None, 4):
        index = indexed(reencoded, near_duplicates=distance)
        role = roles(index)
        triples = [{role[f"train-{c}.parquet#{i}"] for c in "abc"} for i in range(60)]
        shared[distance] = sum(len(triple) == 1 for triple in triples)
        assert index.groups == (180 if distance is None else 60)
        assert len(set(index.manifest.content.tolist())) == 180
    assert shared[4] == 60
    assert shared[None] < 20  # by chance about a tenth


def test_different_photographs_keep_different_roles(reencoded: Path) -> None:
    given = roles(indexed(reencoded, near_duplicates=4))
    counts = np.unique([given[f"train-a.parquet#{i}"] for i in range(60)], return_counts=True)[1]
    assert len(counts) >= 4 and counts.max() < 45


def test_a_group_with_an_official_test_image_is_test(tmp_path: Path) -> None:
    photos = [photo(seed) for seed in range(30)]
    write_hub(tmp_path / "train.parquet", [encoded(p, "JPEG", quality=95) for p in photos])
    held = [encoded(p, "JPEG", quality=60) for p in photos[10:20]]
    write_hub(tmp_path / "test.parquet", held)
    tested = {f"test.parquet#{i}" for i in range(10)}
    for distance, expected in (
        (None, tested),
        (4, tested | {f"train.parquet#{i}" for i in range(10, 20)}),
    ):
        given = roles(indexed(tmp_path, near_duplicates=distance, shares=NO_TEST))
        assert {name for name, role in given.items() if role == "test"} == expected


def settled(tmp_path: Path, words: list[int], tests: int, **keys: Any) -> Index:
    """What becomes of images with these perceptual hashes, the last ones official test images."""
    train = len(words) - tests
    write_hub(tmp_path / "train.parquet", [b""] * train)
    write_hub(tmp_path / "test.parquet", [b""] * tests)
    source = opened(tmp_path)
    order = [*words[train:], *words[:train]] if source.shards[0].test else words
    table = pa.table(
        {
            "shard": np.repeat([0, 1], [shard.rows for shard in source.shards]),
            "row": [row for shard in source.shards for row in range(shard.rows)],
            "sample_id": [f"{word:x}" for word in order],
            "label": [0] * len(words),
            "content": [f"content {word:x}" for word in order],
            "width": [8] * len(words),
            "height": [8] * len(words),
            "perceptual": [word - (word >> 63 << 64) for word in order],
            "scored": pa.nulls(len(words)),
            "fault": pa.nulls(len(words)),
            "passing": pa.nulls(len(words)),
        }
    ).cast(SCHEMA)
    return settle(source, [table], hub(tmp_path, shares=NO_TEST, **keys))


def test_a_chain_carries_the_role_across_itself(tmp_path: Path) -> None:
    chain = [flipped(0x5A5A << 40, range(4 * i)) for i in range(8)]  # its ends are 28 bits apart
    apart = [flipped(chain[-1], range(start, start + 5)) for start in (50, 56)]
    tested = flipped(chain[0], [30])
    for distance in (3, 4):
        index = settled(tmp_path, [*chain, *apart, tested], 1, near_duplicates=distance)
        role = roles(index)
        of_test = {name for name, given in role.items() if given == "test"}
        copied = chain if distance == 4 else chain[:1]
        assert of_test == {f"{word:x}" for word in [*copied, tested]}
        assert index.groups == len(role) + 1 - len(of_test)


def test_a_groups_role_is_that_of_its_first_content_whatever_the_order(tmp_path: Path) -> None:
    words = [0b0011, 0b0001, 0b0111, 0xFF << 50]
    for seed in range(5):
        found = roles(settled(tmp_path, [*words, 1 << 63], 1, near_duplicates=1, split_seed=seed))
        again = roles(
            settled(tmp_path, [*words[::-1], 1 << 63], 1, near_duplicates=1, split_seed=seed)
        )
        assert found == again
        expected = role_of(f"content {min(words[:3]):x}", NO_TEST, seed).value
        assert [found[f"{word:x}"] for word in words[:3]] == [expected] * 3


@pytest.mark.parametrize(("chain", "others", "told"), [(101, 1000, True), (101, 2100, False)])
def test_a_group_of_many_images_is_remarked_on(
    chain: int, others: int, told: bool, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    words = [int(w) for w in generator.integers(0, 2**64, others, dtype=np.uint64)]
    word = 0x123456789ABCDEF
    for step in range(chain):
        words.append(word)
        word = flipped(word, [step % 64])
    index = settled(tmp_path, words, 1, near_duplicates=2)
    assert index.largest_group == chain
    assert bool(index.notes) == told
    for note in index.notes:
        assert f"holds 101 of {len(words):,} images, " in note
        name = note.split(" images, ")[1].split(" among them")[0]
        assert int(name, 16) in words[others:]
        assert "data.near_duplicates=2" in note and len(note.splitlines()) == 1
    apart = settled(tmp_path, words, 1)
    assert (apart.largest_group, apart.notes) == (None, [])


def test_many_images_of_few_are_no_chain(tmp_path: Path) -> None:
    index = settled(tmp_path, [5] * 100 + [2**60, 2**61 - 1], 1, near_duplicates=0)
    assert (index.largest_group, index.notes) == (100, [])


def test_perceptual_hashes_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    pictures = noise(3, 20, 30, 3)
    write_hub(tmp_path / "t.parquet", pictures)
    source = opened(tmp_path)
    expected = [perceptual_hash(Image.fromarray(p)) for p in pictures]
    table = examine(source, 0, hub(tmp_path, near_duplicates=0))
    assert table["perceptual"].to_pylist() == expected
    assert examine(source, 0, hub(tmp_path))["perceptual"].to_pylist() == [None] * 3
    copy = decode(encoded(pictures[0], "BMP"), max_megapixels=1)
    assert perceptual_hash(copy) == expected[0]
