"""p-values of one image's code: against all codes written out, and exact whatever the logits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, kstest

from amint_ray.evaluation.keyed import (
    LEVELS,
    hard_p_values,
    log_likelihood_ratio,
    matches,
    on_grid,
    soft_p_values,
)
from amint_ray.evaluation.keyed_rates import match_rate, tpr_at_p
from amint_ray.evaluation.metrics import proportion


def all_codes(bits: int) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=bits)))


def odd_logits(rng: np.random.Generator, bits: int) -> list[np.ndarray]:
    """Logits of many kinds: the p-values must be exact for each."""
    z = rng.normal(size=bits)
    return [
        z,
        z + 2,
        np.round(z),  # zeros and ties
        np.sign(z),
        z * 1e-300,
        z * 1e300,
        rng.standard_cauchy(bits) ** 3,  # one bit has all weight
        np.zeros(bits),
    ]


def test_matches_and_likelihood_by_hand() -> None:
    logits = np.array([[2.0, -1.0, 0.0], [-800.0, 800.0, 1e-9]], np.float32)
    code = np.array([[1, 1, 0], [1, 1, 1]], np.uint8)
    assert matches(logits, code).tolist() == [2, 2]
    ratio = log_likelihood_ratio(logits, code)
    sure, unsure = math.log(2 / (1 + math.exp(-2))), math.log(2 / (1 + math.exp(1)))
    assert ratio[0] == pytest.approx(sure + unsure)
    assert ratio[1] == pytest.approx(-800 + 2 * math.log(2), abs=1e-6)


def test_hard_p_values_are_the_binomial_tail() -> None:
    for bits in (1, 2, 8, 16, 33, 64):
        m = np.arange(bits + 1)
        assert hard_p_values(m, bits) == pytest.approx(binom.sf(m - 1, bits, 0.5), rel=1e-12)
    assert hard_p_values(np.array([0, 64]), 64).tolist() == [1.0, 2.0**-64]
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match="not a number of matches among 8 bits"):
            hard_p_values(np.array([wrong]), 8)


@pytest.mark.parametrize("bits", [1, 2, 5, 12])
def test_p_values_by_all_codes(bits: int) -> None:
    """And P(p ≤ α) = α at each p-value that occurs: the tests are exact, not only valid."""
    codes = all_codes(bits)
    for logits in odd_logits(np.random.default_rng(bits), bits):
        tiled = np.tile(logits, (len(codes), 1))
        weights = on_grid(tiled, np.abs(tiled).max())
        statistic = (weights * ((tiled > 0) == (codes > 0))).sum(axis=1)
        soft = soft_p_values(tiled, codes)
        counted = (statistic[None] >= statistic[:, None]).mean(axis=1)
        assert (soft == counted).all()
        hard = hard_p_values(matches(tiled, codes), bits)
        for p in (soft, hard):
            levels = np.unique(p)
            assert ((p[None] <= levels[:, None]).mean(axis=1) == levels).all()
    assert (soft == 1).all()  # the last logits: nothing is said, nobody convicted


def test_soft_p_values_rank_codes_by_their_likelihood() -> None:
    """Where weights are on the grid already the two orders are one."""
    rng = np.random.default_rng(3)
    logits = rng.choice([-1, 1], 10) * rng.integers(1, LEVELS + 1, 10) / 20
    logits[0] = LEVELS / 20
    tiled, codes = np.tile(logits, (1024, 1)), all_codes(10)
    ratio = log_likelihood_ratio(tiled, codes).round(9)
    counted = (ratio[None] >= ratio[:, None]).mean(axis=1)
    assert (soft_p_values(tiled, codes) == counted).all()


def test_equal_weights_make_it_the_hard_test() -> None:
    rng = np.random.default_rng(4)
    logits, code = 3.0 * rng.choice([-1, 1], (200, 64)), rng.integers(0, 2, (200, 64))
    logits[:3] = [[3.0], [-3.0], [3.0]] * (2 * code[:3] - 1)
    hard = hard_p_values(matches(logits, code), 64)
    assert hard[:3].tolist() == [2.0**-64, 1, 2.0**-64]
    assert soft_p_values(logits, code) == pytest.approx(hard, rel=1e-12)


def test_p_values_of_strangers_are_uniform_whatever_the_logits() -> None:
    """Ties are broken at random, which makes an exact discrete p-value uniform on [0, 1]."""
    rng = np.random.default_rng(5)
    n, bits = 20_000, 32
    code = rng.integers(0, 2, (n, bits))
    scale = rng.lognormal(0, 2, (n, 1))
    logits = scale * (rng.standard_t(2, (n, bits)) + rng.normal(0, 2, (n, 1)))
    matched = matches(logits, code)
    hard = hard_p_values(matched, bits)
    more = np.where(matched < bits, hard_p_values(np.minimum(matched + 1, bits), bits), 0.0)
    for p, jump in ((hard, hard - more), (soft_p_values(logits, code), 0.0)):
        assert kstest(p - rng.random(n) * jump, "uniform").pvalue > 0.01
        for level in (0.1, 0.01, 0.001):
            assert (p <= level).mean() < level + 4 * math.sqrt(level / n)


def test_one_bit_that_is_sure_outweighs_many_that_are_not() -> None:
    code = np.ones((1, 16), np.uint8)
    logits = np.full((1, 16), -0.5)
    logits[0, :5] = 8.0  # 5 sure bits are right, 11 unsure ones are wrong
    assert hard_p_values(matches(logits, code), 16)[0] > 0.9
    assert soft_p_values(logits, code)[0] == pytest.approx(2.0**-5)


def test_weak_memory_is_found_more_often_by_weighing() -> None:
    """Logits as a head gives them, right as often as they say."""
    rng = np.random.default_rng(6)
    code = rng.integers(0, 2, (4000, 32))
    logits = rng.normal(0, 1.5, code.shape)
    right = rng.random(code.shape) < 1 / (1 + np.exp(-np.abs(logits)))
    logits = np.where(right, 1, -1) * np.abs(logits) * (2 * code - 1)
    hard, soft = hard_p_values(matches(logits, code), 32), soft_p_values(logits, code)
    assert (hard <= 0.001).mean() > 0.2
    assert (soft <= 0.001).mean() > (hard <= 0.001).mean() + 0.1


def test_blocks_do_not_matter() -> None:
    rng = np.random.default_rng(7)
    logits, code = rng.normal(size=(3000, 20)), rng.integers(0, 2, (3000, 20))
    p = soft_p_values(logits, code)
    some = rng.choice(3000, 50, replace=False)
    assert (p[some] == [soft_p_values(logits[[i]], code[[i]])[0] for i in some]).all()
    assert soft_p_values(logits[:0], code[:0]).shape == (0,)


def test_share_of_members_at_a_level() -> None:
    p = np.array([0.0005, 0.001, 0.005, 0.5])
    found = tpr_at_p(p, bits=16, confidence=0.95)
    assert found["0.01"] == proportion(3, 4, confidence=0.95)
    assert found["0.001"] == proportion(2, 4, confidence=0.95)
    assert found["1e-06"].value is None
    assert "smallest p-value of 16 bits is 1.5e-05" in str(found["1e-06"].note)
    assert tpr_at_p(p, bits=20, confidence=0.95)["1e-06"].value == 0


def test_match_rate_counts_that_images_differ() -> None:
    alike = match_rate(np.full(100, 24), bits=32, confidence=0.95)
    assert alike == proportion(2400, 3200, confidence=0.95)
    differ = match_rate(np.repeat([16, 32], 50), bits=32, confidence=0.95)
    assert differ.value == alike.value == 0.75
    assert differ.low is not None and alike.low is not None
    assert 0.75 - differ.low == pytest.approx(1.96 * 0.2513 / 10, rel=1e-3)
    assert differ.low < alike.low
    assert match_rate(np.array([32]), bits=32, confidence=0.95).low == pytest.approx(
        0.891, abs=1e-3
    )
    assert match_rate(np.array([], int), bits=32, confidence=0.95).value is None


@pytest.mark.parametrize(
    ("logits", "code", "says"),
    [
        ([[math.nan, 1.0]], [[0, 1]], "not finite"),
        ([[math.inf, 1.0]], [[0, 1]], "not finite"),
        ([[1.0, 1.0]], [[0, 1, 1]], r"\(1, 2\) for codes of shape \(1, 3\)"),
        ([1.0, 1.0], [0, 1], "shape"),
        ([[]], [[]], "shape"),
        ([[1.0, 1.0]], [[-1, 1]], "of 0 and 1"),
        ([[1.0] * 65], [[1] * 65], "at most 64 bits, not 65"),
    ],
)
def test_what_is_no_code_is_refused(logits: list, code: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        soft_p_values(np.array(logits), np.array(code))
