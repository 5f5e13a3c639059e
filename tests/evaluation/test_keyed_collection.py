"""A collection's codes: exact against whole-number counting, and what size is convicted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import gammaln, logsumexp
from scipy.stats import binom, norm

from amint_ray.evaluation.keyed import hard_p_values, matches, on_grid, soft_p_values
from amint_ray.evaluation.keyed_collection import (
    approximate_p,
    collection_test,
    grid_top,
    images_needed,
    log_p_missing_at_most,
    share_of_members,
)
from amint_ray.evaluation.keyed_rates import match_rate


def names(n: int) -> list[bytes]:
    return [b"%d" % i for i in range(n)]


def answers(
    rng: np.random.Generator, n: int, bits: int, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of random size, each with the right sign with this probability, and the codes."""
    code = rng.integers(0, 2, (n, bits))
    signs = np.where(rng.random(code.shape) < rate, 1, -1) * (2 * code - 1)
    return np.abs(rng.normal(size=code.shape)) * signs, code


def counted(missed: int, bits_of_weight: np.ndarray) -> float:
    """log P(D ≤ d) by a polynomial in whole numbers, its coefficients laid out in one integer."""
    width = int(bits_of_weight.sum()) + 1
    product = 1
    for weight, count in enumerate(bits_of_weight.tolist()):
        if weight:
            product *= (1 + (1 << width * weight)) ** count
    coefficients = ((product >> width * s) & ((1 << width) - 1) for s in range(missed + 1))
    return math.log(sum(coefficients)) - int(bits_of_weight[1:].sum()) * math.log(2)


@pytest.mark.parametrize("largest", [1, 3, 10, 63])
def test_the_tail_by_whole_numbers(largest: int) -> None:
    """However many bits there are of each weight, and however far out the tail."""
    rng = np.random.default_rng(largest)
    for bits in (1, 3, 20, 60):
        weights = rng.integers(0, largest + 1, bits)
        weights[0] = largest
        if bits == 20:
            weights *= 2 if largest < 63 else 1  # a lattice with gaps
        bits_of_weight = np.bincount(weights, minlength=127)
        total = int(weights.sum())
        for missed in {0, 1, total // 7, total // 3, total // 2, total - 1, total, total + 1}:
            found = log_p_missing_at_most(missed, bits_of_weight)
            assert found == pytest.approx(counted(min(missed, total), bits_of_weight), abs=1e-11)


def test_bits_of_one_weight_are_binomial() -> None:
    """Where nothing can be counted any more: six million bits, p-values down to e^−200000."""
    bits = 6_400_000
    bits_of_weight = np.array([5, 0, 0, 0, bits])
    for missed in (3_195_000, 3_100_000, 2_400_000):
        s = np.arange(missed, missed - 20_000, -1.0)
        log_mass = gammaln(bits + 1) - gammaln(s + 1) - gammaln(bits - s + 1) - bits * math.log(2)
        found = log_p_missing_at_most(4 * missed + 3, bits_of_weight)
        assert found == pytest.approx(logsumexp(log_mass), rel=1e-7)
    likely = binom.cdf(3_201_000, bits, 0.5)
    found = log_p_missing_at_most(4 * 3_201_000, bits_of_weight)
    assert math.exp(found) == pytest.approx(likely, rel=1e-9)


def test_a_small_collection_by_all_codes() -> None:
    """Three images of four bits: all 4096 codes, one collection each. Both tests are exact."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4))
    codes = np.array(list(itertools.product((0, 1), repeat=12))).reshape(-1, 3, 4)
    weights = on_grid(logits, grid_top(logits))
    right = (logits > 0) == (codes > 0)
    weighted, plain = (weights * right).sum(axis=(1, 2)), right.sum(axis=(1, 2))
    for row in range(0, len(codes), 13):
        found = collection_test(logits, codes[row], names(3))
        assert found.p_soft == pytest.approx((weighted >= weighted[row]).mean(), rel=1e-11)
        assert found.p_hard == pytest.approx((plain >= plain[row]).mean(), rel=1e-11)
        assert (found.images, found.bits, found.matched) == (3, 12, plain[row])


def test_one_image_is_tested_as_by_itself() -> None:
    rng = np.random.default_rng(1)
    for bits, rate in ((8, 0.5), (32, 0.5), (32, 0.9), (64, 1.0)):
        logits, code = answers(rng, 1, bits, rate)
        found = collection_test(logits, code, [b"x"])
        assert found.p_soft == pytest.approx(soft_p_values(logits, code)[0], rel=1e-11)
        assert found.p_hard == pytest.approx(
            hard_p_values(matches(logits, code), bits)[0], rel=1e-11
        )


def test_a_hundred_thousand_images_that_did_not_train_it_and_that_did() -> None:
    rng = np.random.default_rng(2)
    for rate in (0.5, 0.503):
        logits, code = answers(rng, 100_000, 32, rate)
        logits[:10] *= 1000  # some wild ones
        found = collection_test(logits, code, names(100_000))
        weights = on_grid(logits, grid_top(logits))
        right = (logits > 0) == (code > 0)
        z = (weights * np.where(right, 1, -1)).sum() / math.sqrt((weights**2).sum())
        assert math.log(found.p_soft) == pytest.approx(norm.logsf(z), rel=5e-3)
        assert found.match_rate == right.mean() == pytest.approx(rate, abs=0.001)
        alike = log_p_missing_at_most(found.bits - found.matched, np.array([0, found.bits]))
        assert math.log(found.p_hard) == pytest.approx(alike, rel=1e-9)
        assert (found.p_soft < 1e-9) == (rate > 0.5)
    certain = collection_test(*answers(rng, 1000, 32, 0.99), names(1000))
    assert certain.p_soft == certain.p_hard == np.finfo(np.float64).tiny


def test_collections_of_strangers_have_valid_p_values() -> None:
    rng = np.random.default_rng(3)
    p = []
    for _ in range(300):
        logits, code = answers(rng, 6, 16, 0.5)
        found = collection_test(logits * rng.lognormal(0, 2, (6, 1)), code, names(6))
        p.append((found.p_soft, found.p_hard))
    for level in (0.5, 0.1, 0.02):
        share = (np.array(p) <= level).mean(axis=0)
        assert (share < level + 3 * math.sqrt(level * (1 - level) / 300)).all()


def test_what_occurs_twice_is_one_witness() -> None:
    rng = np.random.default_rng(4)
    logits, code = answers(rng, 5, 16, 0.8)
    once = collection_test(logits, code, names(5))
    often = np.array([0, 3, 1, 3, 2, 4, 3, 3])
    many = collection_test(logits[often], code[often], [b"%d" % i for i in often])
    assert many.images == 5
    assert many == once
    # Different pictures with one perceptual hash: their mean, in any order.
    twins, contents = np.r_[logits, logits[:1] * -3], [*names(5), b"0"]
    codes = np.r_[code, code[:1]]
    turned = collection_test(twins[::-1], codes[::-1], contents[::-1])
    assert turned == collection_test(twins, codes, contents)
    assert turned == collection_test(np.r_[-logits[:1], logits[1:]], code, names(5))


def test_what_cannot_be_tested_is_refused() -> None:
    logits, code = answers(np.random.default_rng(5), 2, 8, 0.5)
    with pytest.raises(ValueError, match="different codes"):
        collection_test(logits, np.array([[0] * 8, [1] * 8]), [b"x", b"x"])
    with pytest.raises(ValueError, match="2 images with 1 contents"):
        collection_test(logits, code, [b"x"])
    with pytest.raises(ValueError, match="0 images"):
        collection_test(logits[:0], code[:0], [])
    with pytest.raises(ValueError, match="not finite"):
        collection_test(logits * math.nan, code, names(2))
    silent = collection_test(logits * 0, code, names(2))
    assert silent.p_soft == 1


@pytest.mark.parametrize(("bits", "rate"), [(8, 0.9), (16, 0.6), (32, 0.8), (16, 0.55)])
def test_images_needed_where_the_binomial_tells(bits: int, rate: float) -> None:
    """Bits that are all as sure make the soft test the hard one."""
    rng = np.random.default_rng(6)
    code = rng.integers(0, 2, (2000, bits))
    right = rng.permuted(np.arange(code.size) < rate * code.size).reshape(code.shape)
    logits = np.where(right, 2.0, -2.0) * (2 * code - 1)
    for needed in range(1, 1000):
        all_bits = needed * bits
        tails = binom.sf(np.arange(all_bits + 1) - 1, all_bits, 0.5)
        fewest = int((tails > 1e-6).sum())
        if fewest <= all_bits and binom.sf(fewest - 1, all_bits, rate) >= 0.95:
            break
    found = images_needed(logits, code)
    assert found is not None
    assert needed * 0.95 - 0.5 <= found <= needed * 1.05 + 0.5


def test_collections_of_the_size_needed_are_convicted() -> None:
    rng = np.random.default_rng(7)
    logits, code = answers(rng, 2000, 32, 0.7)
    size = images_needed(logits, code, p=1e-4, power=0.9)
    assert size is not None
    assert size > 1
    assert size == images_needed(logits, code, p=1e-4, power=0.9)

    def power(n: int) -> float:
        drawn = (rng.choice(2000, n, replace=False) for _ in range(120))
        p = [collection_test(logits[i], code[i], names(n)).p_soft for i in drawn]
        return float((np.array(p) <= 1e-4).mean())

    assert power(size) > 0.84
    assert power(size - 2) < 0.9


def test_images_needed_at_the_ends() -> None:
    rng = np.random.default_rng(8)
    assert images_needed(*answers(rng, 50, 32, 1.0)) == 1
    assert images_needed(*answers(rng, 50, 16, 1.0)) == 2  # 16 bits alone cannot
    assert images_needed(*answers(rng, 300, 16, 0.5)) is None
    assert images_needed(*answers(rng, 1, 16, 1.0)) is None
    assert images_needed(np.zeros((20, 8)), np.zeros((20, 8), int)) is None
    assert images_needed(np.zeros((0, 8)), np.zeros((0, 8), int)) is None


def test_the_approximation_is_near_the_exact_tail() -> None:
    rng = np.random.default_rng(9)
    bits_of_weight = np.stack([np.bincount(rng.integers(0, 64, 200), minlength=64)] * 5)
    missed = np.array([600, 1500, 2000, 2500, 9000])
    found = np.log(approximate_p(missed, bits_of_weight))
    exact = [log_p_missing_at_most(int(m), bits_of_weight[0]) for m in missed]
    assert found[:4] == pytest.approx(exact[:4], abs=0.01)
    assert found[4] == 0


def test_share_of_members() -> None:
    rng = np.random.default_rng(10)
    known = rng.binomial(32, rng.beta(8, 2, 500))
    covered = 0
    for _ in range(200):
        half = np.r_[rng.binomial(32, rng.beta(8, 2, 60)), rng.binomial(32, 0.5, 60)]
        found = share_of_members(half, known, bits=32, confidence=0.9)
        assert found.value is not None and found.low is not None and found.high is not None
        covered += found.low <= 0.5 <= found.high
    assert covered >= 180
    none = share_of_members(rng.binomial(32, 0.5, 200), known, bits=32, confidence=0.95)
    assert none.low == 0
    assert none.high is not None and none.high < 0.15
    everyone = share_of_members(known, known, bits=32, confidence=0.95)
    assert (everyone.value, everyone.high) == (1, 1)
    one = share_of_members(np.array([32]), known, bits=32, confidence=0.95)
    assert one.value == 1
    rate = match_rate(known, bits=32, confidence=0.95).value
    assert rate is not None
    quarter = share_of_members(np.array([16, 24]), known, bits=32, confidence=0.95)
    assert quarter.value == pytest.approx((20 / 32 - 0.5) / (rate - 0.5))


def test_share_of_members_where_it_cannot_be_told() -> None:
    blind = share_of_members(np.array([20]), np.full(9, 16), bits=32, confidence=0.95)
    assert "by chance" in str(blind.note)
    few = share_of_members(np.array([20, 17]), np.array([17, 18]), bits=32, confidence=0.95)
    assert (few.low, few.high) == (0, 1)
    empty = share_of_members(np.array([], int), np.array([20]), bits=32, confidence=0.95)
    assert empty.note == "no samples"
