"""Ranks: against SciPy, against counting out, and one decision with the critical value."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from amint_ray.audit.ranks import Sample, critical_share, exact_tail, place, rank_test
from amint_ray.evaluation.calibration import p_values

plain = Sample.unstratified


@pytest.mark.parametrize("levels", [3, 10**9])
def test_places_by_brute_force(levels: int) -> None:
    rng = np.random.default_rng(levels)
    suspects = Sample(rng.integers(-1, levels + 1, 60).astype(float), rng.integers(0, 4, 60))
    calibration = Sample(rng.integers(0, levels, 30).astype(float), rng.integers(0, 3, 30))
    found = place(suspects, calibration)
    for score, stratum, share, p in zip(
        suspects.score, suspects.stratum, found.share, found.p, strict=True
    ):
        others = calibration.score[calibration.stratum == stratum]
        assert p == (1 + (others >= score).sum()) / (1 + len(others))
        if stratum == 3:  # a class without calibration images
            assert math.isnan(share)
        else:
            assert share == pytest.approx((others < score).mean() + (others == score).mean() / 2)
    everybody = place(plain(suspects.score), plain(calibration.score))
    assert everybody.p.tolist() == p_values(suspects.score, calibration.score).tolist()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (3, 5), (5, 3), (4, 4), (6, 5)])
def test_null_distribution_by_counting_it_out(n: int, m: int) -> None:
    u = [sum(chosen) - n * (n - 1) // 2 for chosen in itertools.combinations(range(n + m), n)]
    expected = [np.mean(np.array(u) >= value) for value in range(n * m + 1)]
    np.testing.assert_allclose(exact_tail(n, m), expected, rtol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 40), (8, 60), (30, 25)])
def test_without_ties_it_is_the_exact_test(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.5, 2.0):
        x, y = rng.normal(size=n) + shift, rng.normal(size=m)
        expected = mannwhitneyu(x, y, alternative="greater", method="exact")
        found = rank_test(plain(x), plain(y))
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.mean_share == pytest.approx(expected.statistic / (n * m))
        assert (found.compared, found.calibration) == (n, pytest.approx(m))


@pytest.mark.parametrize(("n", "m", "decimals"), [(400, 300, 1), (30, 40, 0), (600, 700, 9)])
def test_with_ties_or_many_images_it_is_the_normal_one(n: int, m: int, decimals: int) -> None:
    rng = np.random.default_rng(n)
    x, y = (rng.normal(size=n) + 0.2).round(decimals), rng.normal(size=m).round(decimals)
    expected = mannwhitneyu(x, y, alternative="greater", method="asymptotic").pvalue
    assert rank_test(plain(x), plain(y)).p_value == pytest.approx(expected, rel=1e-9)


def test_ties_of_few_images_are_broken_against_them() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, 5).astype(float), rng.integers(0, 4, 50).astype(float)
    found = rank_test(plain(x), plain(y)).p_value
    assert found == pytest.approx(rank_test(plain(x - 1e-6), plain(y)).p_value)
    broken = [
        rank_test(plain(x + rng.random(5) / 9), plain(y + rng.random(50) / 9)).p_value
        for _ in range(50)
    ]
    assert found >= max(broken)
    assert rank_test(plain(np.ones(3)), plain(np.ones(9))).p_value == 1


def test_strata_by_permutation() -> None:
    """Within each stratum every division into suspects and calibration is as likely."""
    rng = np.random.default_rng(1)
    strata = [(12, 5), (3, 20), (9, 9)]
    score = [rng.normal(size=n + m) + 3 * i for i, (n, m) in enumerate(strata)]
    score[0][:12] += 0.5
    total = sum(n for n, _ in strata)

    def statistic(parts: list[np.ndarray]) -> float:
        return sum(
            n / total * (part[:n, None] > part[None, n:]).mean()
            for part, (n, _) in zip(parts, strata, strict=True)
        )

    seen = statistic(score)
    drawn = np.array([statistic([rng.permutation(part) for part in score]) for _ in range(4000)])
    suspects = Sample(
        np.concatenate([part[:n] for part, (n, _) in zip(score, strata, strict=True)]),
        np.repeat([7, 2, 5], [n for n, _ in strata]),
    )
    calibration = Sample(
        np.concatenate([*(part[n:] for part, (n, _) in zip(score, strata, strict=True)), [9.0]]),
        np.repeat([7, 2, 5, 8], [*(m for _, m in strata), 1]),
    )
    found = rank_test(suspects, calibration)
    assert found.mean_share == pytest.approx(seen)
    assert found.p_value == pytest.approx((drawn >= seen).mean(), abs=0.02)
    assert found.calibration == pytest.approx(1 / sum((n / total) ** 2 / m for n, m in strata))


def test_a_single_stratum_is_the_test_within_it() -> None:
    rng = np.random.default_rng(2)
    x, y, other = rng.normal(size=15), rng.normal(size=20), rng.normal(size=50) + 9
    calibration = Sample(np.r_[y, other], np.repeat([3, 4], [20, 50]))
    found = rank_test(Sample(x, np.full(15, 3)), calibration)
    assert found == rank_test(plain(x), plain(y))


def test_images_of_a_class_without_calibration_are_not_compared() -> None:
    calibration = Sample(np.arange(9.0), np.zeros(9, int))
    found = rank_test(Sample(np.array([8.5, 100.0]), np.array([0, 1])), calibration)
    assert found == rank_test(plain(np.array([8.5])), plain(np.arange(9.0)))
    assert found.p_value == pytest.approx(0.1)
    assert rank_test(Sample(np.ones(2), np.ones(2, int)), calibration).p_value is None
    assert rank_test(plain(np.empty(0)), calibration).p_value is None


def test_few_suspects_among_very_many_images_are_not_taken_for_normal() -> None:
    """One rank is uniform, and the sum of two has a triangle for its density."""
    m = 200_000
    many = plain(np.arange(m, dtype=float))
    one = rank_test(plain(np.array([0.9 * m - 0.5])), many).p_value
    assert one == pytest.approx(0.1, rel=1e-4)  # by the normal distribution 0.08
    assert critical_share(1, m, 0.1) == pytest.approx(0.9, rel=1e-4)
    two = rank_test(plain(np.array([0.75, 0.85]) * m - 0.5), many).p_value
    assert two == pytest.approx(0.4**2 / 2, rel=1e-3)


def test_a_tiny_p_value_is_not_nought() -> None:
    p = rank_test(plain(np.arange(900.0) + 900), plain(np.arange(900.0))).p_value
    assert p is not None
    assert 0 < p < 1e-290


@pytest.mark.parametrize(("n", "m"), [(3, 40), (20, 131), (700, 300)])
@pytest.mark.parametrize("alpha", [0.005, 0.05])
def test_the_critical_share_is_where_the_test_begins_to_reject(
    n: int, m: int, alpha: float
) -> None:
    needed = critical_share(n, m, alpha)
    u = math.ceil(needed * n * m - 1e-9)
    for pairs, rejects in ((u, True), (u - 1, False)):
        each, rest = divmod(pairs, n)
        below = np.full(n, each) + (np.arange(n) < rest)  # of calibration, for each suspect
        p = rank_test(
            plain(below - 0.9 + np.linspace(0, 0.5, n)), plain(np.arange(m, dtype=float))
        ).p_value
        assert p is not None
        assert (p <= alpha) == rejects
    assert critical_share(2, 3, 0.01) == math.inf
