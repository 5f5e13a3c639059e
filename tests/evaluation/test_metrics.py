"""Metrics against SciPy, scikit-learn, the published equations and simulation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binomtest, norm, sem
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from amint_ray.evaluation import metrics
from amint_ray.evaluation.metrics import Interval

Scores = npt.NDArray[np.float64]
Z95 = norm.ppf(0.975)


def limits(interval: Interval) -> tuple[float, float, float]:
    assert interval.value is not None
    assert interval.low is not None
    assert interval.high is not None
    assert interval.note is None
    return interval.value, interval.low, interval.high


def draw(
    m: int, n: int, *, shift: float, decimals: int = 9, seed: int = 0
) -> tuple[Scores, Scores]:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, m).round(decimals), rng.normal(0, 1, n).round(decimals)


def labelled(positives: Scores, negatives: Scores) -> tuple[Scores, Scores]:
    truth = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    return truth, np.r_[positives, negatives]


def above(one: float, other: float) -> float:
    return 1.0 if one > other else 0.5 if one == other else 0.0


def hanley_mcneil(theta: float, m: int, n: int) -> float:
    """Newcombe 2006, method 5: V(θ) with N* = (m + n) / 2 for both classes."""
    star = (m + n) / 2
    q = theta * (1 - theta)
    return (
        q
        * (1 + (star - 1) * (1 - theta) / (2 - theta) + (star - 1) * theta / (1 + theta))
        / (m * n)
    )


# --- proportions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (1, 10_000), (512, 1024)]
)
def test_proportion_is_scipys_exact_interval(
    successes: int, trials: int, confidence: float
) -> None:
    reference = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    got = metrics.proportion(successes, trials, confidence=confidence)
    expected = (successes / trials, reference.low, reference.high)
    assert limits(got) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_no_samples_is_no_value() -> None:
    nothing = np.empty(0)
    some = np.arange(3.0)
    for unknown in (
        metrics.proportion(0, 0, confidence=0.95),
        metrics.auc(nothing, some, confidence=0.95),
        metrics.auc(some, nothing, confidence=0.95),
        metrics.precision_at_prior(0, 0, 1, 5, prior=0.1, confidence=0.95),
        metrics.precision_at_prior(1, 5, 0, 0, prior=0.1, confidence=0.95),
    ):
        assert (unknown.value, unknown.low, unknown.high) == (None, None, None)
        assert unknown.note == "no samples"
        assert unknown.as_dict()["note"] == "no samples"


# --- AUC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [9, 1, 0])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.5, 4.0])
def test_auc_is_scikit_learns_ties_included(shift: float, decimals: int) -> None:
    positives, negatives = draw(83, 211, shift=shift, decimals=decimals)
    got = metrics.auc(positives, negatives, confidence=0.95)
    assert got.value == pytest.approx(roc_auc_score(*labelled(positives, negatives)), abs=1e-12)


@pytest.mark.parametrize("decimals", [9, 1, 0])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.5])
def test_auc_interval_is_delongs_on_the_logit_scale(shift: float, decimals: int) -> None:
    positives, negatives = draw(23, 41, shift=shift, decimals=decimals)
    m, n = len(positives), len(negatives)
    theta = sum(above(x, y) for x in positives for y in negatives) / (m * n)
    v10 = [sum(above(x, y) for y in negatives) / n for x in positives]
    v01 = [sum(above(x, y) for x in positives) / m for y in negatives]
    s10 = sum((v - theta) ** 2 for v in v10) / (m - 1)
    s01 = sum((v - theta) ** 2 for v in v01) / (n - 1)
    for confidence in (0.8, 0.95):
        half = norm.ppf((1 + confidence) / 2) * math.sqrt(s10 / m + s01 / n)
        half /= theta * (1 - theta)
        odds = theta / (1 - theta)
        low, high = (odds * math.exp(side) for side in (-half, half))
        expected = (theta, low / (1 + low), high / (1 + high))
        got = metrics.auc(positives, negatives, confidence=confidence)
        assert limits(got) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 5), (60, 1000), (2000, 1000)])
def test_perfect_separation_keeps_a_lower_limit_by_newcombes_equation(m: int, n: int) -> None:
    value, low, high = limits(metrics.auc(np.ones(m), np.zeros(n), confidence=0.95))
    assert value == high == 1
    assert 0 < low < 1
    assert 1 - low == pytest.approx(Z95 * math.sqrt(hanley_mcneil(low, m, n)), rel=1e-6)


def test_nearly_perfect_separation_has_the_wider_of_both_intervals() -> None:
    positives, negatives = np.arange(60.0) + 100, np.arange(1000.0) - 1000
    positives[0] = negatives[-1] - 0.5  # one wrong pair
    value, low, high = limits(metrics.auc(positives, negatives, confidence=0.95))
    assert value == pytest.approx(1 - 1 / 60_000)
    perfect = metrics.auc(np.ones(60), np.zeros(1000), confidence=0.95)
    assert perfect.low is not None
    assert low < perfect.low
    # Newcombe's lower limit is that low already; DeLong's upper limit is nearer to 1 than his.
    assert value - low >= Z95 * math.sqrt(hanley_mcneil(low, 60, 1000)) * (1 - 1e-6)
    assert high - value >= Z95 * math.sqrt(hanley_mcneil(high, 60, 1000)) * (1 - 1e-6)
    assert value < high < 1


@pytest.mark.parametrize("m", [10_000, 40_000])
def test_one_wrong_pair_in_a_hundred_million(m: int) -> None:
    positives, negatives = np.arange(m) + 1e6, np.arange(10_000) - 1e6
    positives[0] = negatives[-1] - 0.5
    for one, other in ((positives, negatives), (negatives, positives)):
        value, low, high = limits(metrics.auc(one, other, confidence=0.95))
        assert 0 <= low < value < high <= 1


@pytest.mark.parametrize("size", [2, 60])
def test_constant_scores_are_no_proof_of_chance(size: int) -> None:
    value, low, high = limits(metrics.auc(np.ones(size), np.ones(size), confidence=0.95))
    assert value == 0.5
    assert low < 0.5 < high


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0, 12.0])
def test_auc_is_mirrored_when_classes_swap(shift: float) -> None:
    positives, negatives = draw(30, 70, shift=shift)
    value, low, high = limits(metrics.auc(positives, negatives, confidence=0.9))
    swapped = limits(metrics.auc(negatives, positives, confidence=0.9))
    assert swapped == pytest.approx((1 - value, 1 - high, 1 - low), abs=1e-9)


def test_auc_limits_enclose_the_value_down_to_single_samples() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        m, n = rng.integers(1, 7, 2)
        scores = rng.integers(0, 3, m + n).astype(float)
        value, low, high = limits(metrics.auc(scores[:m], scores[m:], confidence=0.95))
        assert 0 <= low <= value <= high <= 1


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_auc_interval_covers_the_truth_as_often_as_it_says(shift: float) -> None:
    """1,000 repetitions: 0.92 to 0.99 leaves more than four standard errors to 95 %."""
    truth = norm.cdf(shift / math.sqrt(2))
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        got = metrics.auc(rng.normal(shift, 1, 60), rng.normal(0, 1, 1000), confidence=0.95)
        _, low, high = limits(got)
        covered += low <= truth <= high
    assert 0.92 <= covered / 1000 <= 0.99


def test_auc_interval_still_covers_where_classes_almost_separate() -> None:
    shift = 4.5
    truth = norm.cdf(shift / math.sqrt(2))
    assert truth > 0.999
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(600):
        got = metrics.auc(rng.normal(shift, 1, 60), rng.normal(0, 1, 300), confidence=0.95)
        _, low, high = limits(got)
        covered += low <= truth <= high
    assert covered / 600 >= 0.92


# --- balanced accuracy ----------------------------------------------------------------------------


def test_balanced_accuracy_by_hand() -> None:
    got = metrics.balanced_accuracy(Interval(0.9, 0.8, 0.95), Interval(0.2, 0.1, 0.35))
    # (0.9 + 1 − 0.2) / 2; down √(0.1² + 0.15²) / 2, up √(0.05² + 0.1²) / 2
    assert limits(got) == pytest.approx((0.85, 0.85 - 0.0901388, 0.85 + 0.0559017), abs=1e-6)


def test_balanced_accuracy_is_scikit_learns_and_stays_within_bounds() -> None:
    positives, negatives = draw(50, 90, shift=1.0)
    truth, scores = labelled(positives, negatives)
    for threshold in (-9.0, 0.3, 1.0, 9.0):
        rates = [
            metrics.proportion(int((s > threshold).sum()), len(s), confidence=0.95)
            for s in (positives, negatives)
        ]
        value, low, high = limits(metrics.balanced_accuracy(*rates))
        assert value == pytest.approx(balanced_accuracy_score(truth, scores > threshold))
        assert 0 <= low < value < high <= 1
    sure = metrics.balanced_accuracy(Interval(1.0, 0.5, 1.0), Interval(0.0, 0.0, 0.5))
    assert limits(sure)[2] == 1.0


def test_balanced_accuracy_of_an_unknown_rate_is_unknown() -> None:
    known = Interval(0.5, 0.4, 0.6)
    for pair in ((known, Interval.unknown("why")), (Interval.unknown("why"), known)):
        assert metrics.balanced_accuracy(*pair) == Interval.unknown("why")


# --- precision at a prior -------------------------------------------------------------------------


def test_precision_of_the_authors_run_by_bayes() -> None:
    """TPR 95 % at FPR 23 %: of a hundred accusations at a prior of 1 %, four are right."""
    got = metrics.precision_at_prior(950, 1000, 230, 1000, prior=0.01, confidence=0.95)
    value, low, high = limits(got)
    assert value == pytest.approx(0.0095 / (0.0095 + 0.2277))
    assert value == pytest.approx(0.04, abs=0.0005)
    each = math.sqrt(0.95)
    tpr = binomtest(950, 1000).proportion_ci(each)
    fpr = binomtest(230, 1000).proportion_ci(each)
    assert low == pytest.approx(0.01 * tpr.low / (0.01 * tpr.low + 0.99 * fpr.high))
    assert high == pytest.approx(0.01 * tpr.high / (0.01 * tpr.high + 0.99 * fpr.low))


def test_precision_at_the_edges() -> None:
    def precision(hits: int, alarms: int) -> Interval:
        return metrics.precision_at_prior(hits, 50, alarms, 80, prior=0.1, confidence=0.95)

    value, low, high = limits(precision(20, 0))
    assert value == high == 1
    assert 0 < low < 1
    value, low, high = limits(precision(0, 3))
    assert value == low == 0
    assert 0 < high < 1
    assert precision(0, 0) == Interval.unknown("nobody was accused")


# --- ROC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [9, 0])
def test_roc_is_scikit_learns(decimals: int) -> None:
    positives, negatives = draw(40, 70, shift=0.8, decimals=decimals)
    fpr, tpr = metrics.roc(positives, negatives)
    truth, scores = labelled(positives, negatives)
    expected_fpr, expected_tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected_fpr, atol=1e-12)
    np.testing.assert_allclose(tpr, expected_tpr, atol=1e-12)
    area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    assert area == pytest.approx(metrics.auc(positives, negatives, confidence=0.95).value)


def test_the_mean_is_scipys_and_needs_two_samples() -> None:
    values = np.random.default_rng(0).exponential(2.0, 50)
    low, high = norm.interval(0.9, values.mean(), sem(values))
    got = limits(metrics.mean(values, confidence=0.9))
    assert got == pytest.approx((values.mean(), low, high))
    assert metrics.mean(values[:1], confidence=0.9).note == "fewer than two samples"
