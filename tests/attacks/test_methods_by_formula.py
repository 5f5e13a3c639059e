"""Every score of one number each, against loops written from the papers' formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from small_evidence import COUNTS, loop_log_p, outputs_from, population

from amint_ray.attacks.evidence import PLAIN, Evidence, Shadows
from amint_ray.attacks.lira import (
    LIRA_OFFLINE,
    LIRA_OFFLINE_FIXED,
    LIRA_ONLINE,
    LIRA_ONLINE_FIXED,
)
from amint_ray.attacks.method import Method
from amint_ray.attacks.rmia import RMIA_OFFLINE, RMIA_ONLINE
from amint_ray.attacks.salem import SALEM_CONFIDENCE, SALEM_ENTROPY
from amint_ray.attacks.watson import WATSON
from amint_ray.attacks.yeom import YEOM

EDITED = "jpeg_50"
SMALL = population(COUNTS, edits=(PLAIN, EDITED), shadows=6, seed=3)
WITH_SHADOWS = [
    WATSON,
    LIRA_ONLINE,
    LIRA_ONLINE_FIXED,
    LIRA_OFFLINE,
    LIRA_OFFLINE_FIXED,
    RMIA_ONLINE,
    RMIA_OFFLINE,
]


def own(evidence: Evidence, edit: str) -> list[float]:
    return [float(value) for value in evidence.outputs[edit].label_confidence[0]]


def told(evidence: Evidence, edit: str, j: int) -> tuple[list[float], list[float]]:
    """φ of sample j in the shadows that trained on it, and in the others."""
    shadows = evidence.shadows
    assert shadows is not None
    table = shadows.label_confidence[edit]
    inside = [float(table[i, j]) for i in range(len(shadows)) if shadows.inside[i, j]]
    outside = [float(table[i, j]) for i in range(len(shadows)) if not shadows.inside[i, j]]
    return inside, outside


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviations(values: list[float]) -> list[float]:
    return [(value - mean(values)) ** 2 for value in values]


def sigma(evidence: Evidence, edit: str, j: int, kind: int, *, fixed: bool) -> float:
    """Standard deviation by the sample's own shadows, or one for all."""
    samples = range(len(evidence)) if fixed else [j]
    groups = [told(evidence, edit, i)[kind] for i in samples]
    groups = [group for group in groups if len(group) >= 2]
    total = sum(sum(deviations(group)) for group in groups)
    return math.sqrt(total / sum(len(group) - 1 for group in groups))


def lira_by_loop(evidence: Evidence, edit: str, *, online: bool, fixed: bool) -> list[float]:
    scores = []
    for j, phi in enumerate(own(evidence, edit)):
        inside, outside = told(evidence, edit, j)
        if len(outside) < 2 or (online and len(inside) < 2):
            scores.append(math.nan)
            continue
        not_trained = norm(mean(outside), sigma(evidence, edit, j, 1, fixed=fixed))
        if online:
            trained = norm(mean(inside), sigma(evidence, edit, j, 0, fixed=fixed))
            scores.append(trained.logpdf(phi) - not_trained.logpdf(phi))
        else:
            scores.append(not_trained.cdf(phi))
    return scores


def rmia_by_loop(evidence: Evidence, edit: str, *, online: bool) -> list[tuple[float, float]]:
    """The paper's score, and the score with the order among equals."""

    def ratio(j: int, edit: str) -> float:
        inside, outside = (
            [math.exp(loop_log_p(phi)) for phi in group] for group in told(evidence, edit, j)
        )
        if not outside or (online and not inside):
            return math.nan
        if online:
            prior = 0.5 * (mean(inside) + mean(outside))
        else:
            prior = 0.5 * ((1 + 0.3) * mean(outside) + (1 - 0.3))
        return math.exp(loop_log_p(own(evidence, edit)[j])) / prior

    scores = []
    for j in range(len(evidence)):
        population = [
            ratio(z, PLAIN) for z in range(len(evidence)) if evidence.role[z] == "calibration"
        ]
        population = [value for value in population if not math.isnan(value)]
        mine = ratio(j, edit)
        beaten = sum(mine / value > 2 for value in population)
        unknown = math.isnan(mine)
        share = math.nan if unknown else beaten / len(population)
        scores.append((share, share + 0.999 / len(population) * mine / (1 + mine)))
    return scores


@pytest.mark.parametrize("edit", [PLAIN, EDITED])
def test_scores_of_the_outputs_alone(edit: str) -> None:
    outputs = SMALL.outputs[edit]
    expected = {
        YEOM: [loop_log_p(phi) for phi in own(SMALL, edit)],
        SALEM_CONFIDENCE: outputs.top_confidence[0],
        SALEM_ENTROPY: -outputs.entropy[0],
    }
    for method, values in expected.items():
        np.testing.assert_allclose(method.score(SMALL, edit), values, rtol=1e-9)


@pytest.mark.parametrize("edit", [PLAIN, EDITED])
def test_watson(edit: str) -> None:
    expected = []
    for j, phi in enumerate(own(SMALL, edit)):
        losses = [-loop_log_p(value) for value in told(SMALL, edit, j)[1]]
        expected.append(-(-loop_log_p(phi) - mean(losses)))
    np.testing.assert_allclose(WATSON.score(SMALL, edit), expected, rtol=1e-9)


@pytest.mark.parametrize("edit", [PLAIN, EDITED])
@pytest.mark.parametrize("fixed", [False, True])
def test_lira(edit: str, fixed: bool) -> None:
    # External samples train no shadow: those have no online score.
    expected = lira_by_loop(SMALL, edit, online=True, fixed=fixed)
    assert np.isnan(expected).sum() == COUNTS["external"]
    method = LIRA_ONLINE_FIXED if fixed else LIRA_ONLINE
    np.testing.assert_allclose(method.score(SMALL, edit), expected, rtol=1e-9)
    method = LIRA_OFFLINE_FIXED if fixed else LIRA_OFFLINE
    expected = lira_by_loop(SMALL, edit, online=False, fixed=fixed)
    np.testing.assert_allclose(norm.cdf(method.score(SMALL, edit)), expected, rtol=1e-9)


@pytest.mark.parametrize("edit", [PLAIN, EDITED])
@pytest.mark.parametrize("online", [False, True])
def test_rmia(edit: str, online: bool) -> None:
    method = RMIA_ONLINE if online else RMIA_OFFLINE
    got = method.score(SMALL, edit)
    share, expected = np.array(rmia_by_loop(SMALL, edit, online=online)).T
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    scored = np.flatnonzero(np.isfinite(got))
    assert len(set(share[scored])) > 1 and len(set(got[scored])) > len(set(share[scored]))
    for i in scored:  # where the paper's scores differ, the order is theirs
        assert (got[i] > got[scored])[share[i] > share[scored]].all()


def test_rmia_knows_ratios_of_probabilities_that_are_zero_in_doubles() -> None:
    """Scaling p(x|θ) and p(x) of one sample alike leaves its score as it is."""
    assert SMALL.shadows is not None
    table = SMALL.shadows.label_confidence[PLAIN].copy()
    phi = SMALL.outputs[PLAIN].label_confidence.copy()
    j = int(np.flatnonzero(SMALL.role == "member")[0])
    phi[:, j], table[:, j] = phi[:, j] - 40, table[:, j] - 40
    near = replace(
        SMALL,
        outputs={PLAIN: outputs_from(phi)},
        shadows=Shadows(SMALL.shadows.inside, {PLAIN: table}),
    )
    phi, table = phi.copy(), table.copy()
    phi[:, j], table[:, j] = phi[:, j] - 900, table[:, j] - 900
    far = replace(
        near,
        outputs={PLAIN: outputs_from(phi)},
        shadows=Shadows(SMALL.shadows.inside, {PLAIN: table}),
    )
    assert RMIA_ONLINE.score(far, PLAIN)[j] == pytest.approx(
        RMIA_ONLINE.score(near, PLAIN)[j], rel=1e-4
    )
    assert RMIA_ONLINE.score(far, PLAIN)[j] > 0


def poisoned(evidence: Evidence, j: int, *, shadow: int | None = None) -> Evidence:
    """φ of sample j is NaN, in the audited model or in one shadow."""
    assert evidence.shadows is not None
    if shadow is None:
        phi = evidence.outputs[PLAIN].label_confidence.copy()
        phi[:, j] = np.nan
        return replace(evidence, outputs={PLAIN: outputs_from(phi)})
    table = evidence.shadows.label_confidence[PLAIN].copy()
    table[shadow, j] = np.nan
    return replace(evidence, shadows=Shadows(evidence.shadows.inside, {PLAIN: table}))


@pytest.mark.parametrize("method", [YEOM, *WITH_SHADOWS], ids=lambda method: method.name)
def test_a_sample_without_confidence_is_not_scored_and_spoils_no_other(method: Method) -> None:
    j = int(np.flatnonzero(SMALL.role == "member")[2])
    before, after = method.score(SMALL, PLAIN), method.score(poisoned(SMALL, j), PLAIN)
    assert np.isfinite(before[j]) and np.isnan(after[j])
    others = np.arange(len(SMALL)) != j
    np.testing.assert_allclose(after[others], before[others], rtol=1e-12)


@pytest.mark.parametrize("method", WITH_SHADOWS, ids=lambda method: method.name)
def test_a_shadow_that_says_nothing_of_a_sample_is_left_out(method: Method) -> None:
    j = int(np.flatnonzero(SMALL.role == "calibration")[0])
    shadows = SMALL.shadows
    assert shadows is not None
    row = int(np.flatnonzero(~shadows.inside[:, j])[0])
    got = method.score(poisoned(SMALL, j, shadow=row), PLAIN)
    at_j = replace(SMALL, shadows=shadows.without(row))
    if method in (LIRA_ONLINE_FIXED, LIRA_OFFLINE_FIXED):  # pooled over other samples, too
        assert np.isfinite(got[j])
    else:
        alone = WATSON if method is WATSON else method
        if method in (RMIA_ONLINE, RMIA_OFFLINE):
            assert 0 <= got[j] <= 1
        else:
            assert got[j] == pytest.approx(alone.score(at_j, PLAIN)[j], rel=1e-12)


def test_two_shadows_are_too_few_for_a_spread_but_not_for_a_mean() -> None:
    pair = population(COUNTS, shadows=2, seed=1)
    assert pair.shadows is not None
    inside = pair.shadows.inside.any(axis=0)  # in one, outside of the other
    for method in (LIRA_ONLINE, LIRA_ONLINE_FIXED):
        assert np.isnan(method.score(pair, PLAIN)).all()
    for method in (LIRA_OFFLINE, LIRA_OFFLINE_FIXED):  # others are outside of both
        np.testing.assert_array_equal(np.isnan(method.score(pair, PLAIN)), inside)
    for method in (WATSON, RMIA_ONLINE, RMIA_OFFLINE):
        assert np.isfinite(method.score(pair, PLAIN)[inside]).all()


def test_a_sample_in_all_shadows_has_no_score_that_needs_one_outside() -> None:
    assert SMALL.shadows is not None
    inside = SMALL.shadows.inside.copy()
    j = int(np.flatnonzero(SMALL.role == "test")[0])
    inside[:, j] = True
    everywhere = replace(SMALL, shadows=Shadows(inside, SMALL.shadows.label_confidence))
    for method in WITH_SHADOWS:
        assert np.isnan(method.score(everywhere, PLAIN)[j]), method.name


def test_equal_values_in_all_shadows_divide_by_nothing() -> None:
    assert SMALL.shadows is not None
    flat = {PLAIN: np.ones_like(SMALL.shadows.label_confidence[PLAIN])}
    same = replace(SMALL, shadows=Shadows(SMALL.shadows.inside, flat))
    with np.errstate(all="raise"):
        for method in (LIRA_ONLINE, LIRA_ONLINE_FIXED, LIRA_OFFLINE, LIRA_OFFLINE_FIXED):
            scores = method.score(same, PLAIN)
            assert np.isfinite(scores[SMALL.role != "external"]).all()


def test_without_calibration_there_is_no_population() -> None:
    role = np.where(SMALL.role == "calibration", "test", SMALL.role)
    for method in (RMIA_ONLINE, RMIA_OFFLINE):
        assert np.isnan(method.score(replace(SMALL, role=role), PLAIN)).all()


def test_scores_of_what_is_missing_are_nan_with_a_reason() -> None:
    scores, why = LIRA_ONLINE.scores(replace(SMALL, shadows=None))
    assert np.isnan(scores).all() and why == "there are no shadow models"
    scores, why = YEOM.scores(SMALL)
    assert np.isfinite(scores).all() and why is None
