"""Comparing what the joint and the plain model tell an outsider, and shadows as targets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from small_evidence import loop_log_p, population

from amint_ray.attacks.evidence import PLAIN, Shadows
from amint_ray.attacks.leak import (
    _balancing,
    compare_models,
    leave_one_out,
    outsiders,
    paired_over_targets,
)
from amint_ray.attacks.lira import LIRA_ONLINE_FIXED
from amint_ray.attacks.methods import METHODS
from amint_ray.attacks.rmia import RMIA_ONLINE
from amint_ray.attacks.shadows import assign
from amint_ray.attacks.yeom import YEOM
from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, RunError
from amint_ray.evaluation.metrics import auc, auc_difference

CONFIG = Evaluation(min_false_positives=5)
COUNTS = {
    Role.MEMBER: 200,
    Role.WITHHELD: 100,
    Role.EXTERNAL: 20,
    Role.CALIBRATION: 200,
    Role.TEST: 600,
}
JOINT = population(COUNTS, shadows=6, gain=1.6, seed=1)
PLAIN_MODEL = population(COUNTS, shadows=6, gain=0.8, seed=1)
NAMES = ("yeom", "lira_online_fixed", "rmia_online")
METHODS_HERE = tuple(METHODS[name] for name in NAMES)


def test_both_models_and_their_difference_on_d_against_test() -> None:
    got = compare_models(JOINT, PLAIN_MODEL, METHODS_HERE, CONFIG)
    assert tuple(got) == NAMES
    in_d = np.isin(JOINT.role, ["member", "withheld"])
    test = JOINT.role == "test"
    for method in METHODS_HERE:
        figures = got[method.name]
        a, b = (method.score(model, PLAIN) for model in (JOINT, PLAIN_MODEL))
        for scores, name in ((a, "joint"), (b, "plain")):
            area = auc(scores[in_d], scores[test], confidence=0.95)
            assert figures[name]["auc"] == area.as_dict()
            threshold = np.sort(scores[JOINT.role == "calibration"])[-2]  # ⌊0.01 · 201⌋ = 2
            assert figures[name]["tpr"]["value"] == (scores[in_d] > threshold).mean()
        paired = auc_difference(a[in_d], a[test], b[in_d], b[test], confidence=0.95)
        assert figures["difference"]["auc"] == paired.as_dict()
        assert figures["difference"]["tpr"]["value"] == pytest.approx(
            figures["joint"]["tpr"]["value"] - figures["plain"]["tpr"]["value"]
        )
        assert figures["compared"]["n_positives"] == 300
    assert got["lira_online_fixed"]["difference"]["auc"]["low"] > 0
    json.dumps(got, allow_nan=False)


def test_what_one_model_has_no_score_of_counts_for_neither() -> None:
    phi = PLAIN_MODEL.outputs[PLAIN].label_confidence.copy()
    phi[0, np.flatnonzero(JOINT.role == "withheld")[:4]] = np.nan
    outputs = {PLAIN: replace(PLAIN_MODEL.outputs[PLAIN], label_confidence=phi)}
    got = compare_models(JOINT, replace(PLAIN_MODEL, outputs=outputs), [YEOM], CONFIG)["yeom"]
    assert got["compared"]["n_positives"] == 296
    in_d = np.isin(JOINT.role, ["member", "withheld"]) & np.isfinite(phi[0])
    scores = YEOM.score(JOINT, PLAIN)
    expected = auc(scores[in_d], scores[JOINT.role == "test"], confidence=0.95)
    assert got["joint"]["auc"] == expected.as_dict()


def test_models_of_other_samples_are_not_compared() -> None:
    other = replace(PLAIN_MODEL, sample_id=PLAIN_MODEL.sample_id[::-1])
    with pytest.raises(RunError, match="not trained on the same samples"):
        compare_models(JOINT, other, METHODS_HERE, CONFIG)
    role = PLAIN_MODEL.role.copy()
    role[np.flatnonzero(role == "member")[0]] = "test"
    with pytest.raises(RunError, match="not trained on the same samples"):
        compare_models(JOINT, replace(PLAIN_MODEL, role=role), METHODS_HERE, CONFIG)


def test_what_the_shadows_suffice_for() -> None:
    def names(shadows: int, of_plain: int) -> list[str]:
        models = [population(COUNTS, shadows=k, seed=1) for k in (shadows, of_plain)]
        return [method.name for method in outsiders(*models)]

    assert names(6, 4) == list(NAMES)
    assert names(6, 3) == ["yeom", "lira_offline_fixed", "rmia_online"]
    assert names(2, 6) == ["yeom", "lira_online_fixed", "rmia_online"]  # too few for any LiRA
    assert names(6, 1) == ["yeom", "lira_online_fixed", "rmia_offline"]
    without = compare_models(JOINT, population(COUNTS, shadows=0, seed=1), METHODS_HERE, CONFIG)
    assert without["rmia_online"]["difference"]["auc"]["note"] == "there are no shadow models"
    assert without["rmia_online"]["plain"]["tpr"]["value"] is None
    assert without["yeom"]["difference"]["auc"]["value"] is not None


def test_shadows_as_targets_by_loop() -> None:
    evidence = population({Role.MEMBER: 20, Role.EXTERNAL: 3, Role.TEST: 21}, shadows=6, seed=4)
    shadows = evidence.shadows
    assert shadows is not None
    inside, phi = shadows.inside, shadows.label_confidence[PLAIN].astype(float)
    got = leave_one_out(shadows, evidence.label, methods=(YEOM, RMIA_ONLINE))
    for target in range(6):
        pool = [j for j in range(44) if inside[:, j].any()]
        silent = _balancing(shadows, target)  # 41 have no half: no complements
        assert all(inside[silent[j], j] != inside[target, j] for j in pool)
        assert len(set(silent[pool])) == 5
        scores = {YEOM: {}, RMIA_ONLINE: {}}
        ratio = {}
        for j in pool:
            p = {i: np.exp(loop_log_p(phi[i, j])) for i in range(6)}
            others = [i for i in range(6) if i not in (target, silent[j])]
            a = [p[i] for i in others if inside[i, j]]
            b = [p[i] for i in others if not inside[i, j]]
            ratio[j] = p[target] / (0.5 * (np.mean(a) + np.mean(b)))
            scores[YEOM][j] = loop_log_p(phi[target, j])
        for j in pool:
            population_z = [z for z in pool if not inside[target, z]]
            share = np.mean([ratio[j] / ratio[z] > 2 for z in population_z])
            scores[RMIA_ONLINE][j] = (share, ratio[j])
        for method, values in scores.items():
            wins = [
                (values[j] > values[z]) + 0.5 * (values[j] == values[z])
                for j in pool
                for z in pool
                if inside[target, j] and not inside[target, z]
            ]
            assert got[method.name][target] == pytest.approx(np.mean(wins), abs=1e-12)


def test_a_complement_is_no_shadow_of_its_target() -> None:
    evidence = population({Role.MEMBER: 20, Role.TEST: 20}, shadows=6, seed=4)
    shadows = evidence.shadows
    assert shadows is not None and (shadows.inside[2] == ~shadows.inside[3]).all()
    got = leave_one_out(shadows, evidence.label, methods=[RMIA_ONLINE])["rmia_online"]
    nonsense = shadows.label_confidence[PLAIN].copy()
    nonsense[3] = 7.0
    changed = Shadows(shadows.inside, {PLAIN: nonsense})
    again = leave_one_out(changed, evidence.label, methods=[RMIA_ONLINE])["rmia_online"]
    assert again[2] == got[2]
    assert (again[[0, 1, 4, 5]] != got[[0, 1, 4, 5]]).any()


def test_targets_that_left_no_trace_are_not_told_apart_by_the_balance_of_shadows() -> None:
    """Were its complement kept, each image of a target would have a shadow more outside of it."""
    rng = np.random.default_rng(0)
    evidence = population({Role.MEMBER: 600, Role.TEST: 600}, shadows=6, seed=3)
    assert evidence.shadows is not None
    phi = {PLAIN: rng.normal(size=(6, 1200)).astype(np.float32)}
    null = Shadows(evidence.shadows.inside, phi)
    got = leave_one_out(null, evidence.label, methods=[METHODS["lira_online"]])["lira_online"]
    assert abs(got.mean() - 0.5) < 0.03
    kept = Shadows(evidence.shadows.inside[:5], {PLAIN: phi[PLAIN][:5]})
    assert kept.inside.shape == (5, 1200)
    np.testing.assert_array_equal(
        leave_one_out(null.without(5), evidence.label, methods=[YEOM])["yeom"],
        leave_one_out(kept, evidence.label, methods=[YEOM])["yeom"],
    )


def test_nor_where_shadows_train_on_more_than_half_of_the_images() -> None:
    found = []
    for seed in range(4):
        inside = assign(np.arange(1200), inside=800, shadows=8, seed=seed)
        phi = np.random.default_rng(seed).normal(size=(8, 1200)).astype(np.float32)
        null = Shadows(inside, {PLAIN: phi})
        got = leave_one_out(null, np.zeros(1200, np.int64), methods=[LIRA_ONLINE_FIXED])
        found.append(got["lira_online_fixed"].mean())
    assert abs(np.mean(found) - 0.5) < 0.01  # 0.47 if all other shadows were asked


def test_too_few_shadows_give_no_auc() -> None:
    pair = population(COUNTS, shadows=2, seed=1).shadows
    assert pair is not None
    got = leave_one_out(pair, JOINT.label, methods=(YEOM, LIRA_ONLINE_FIXED, RMIA_ONLINE))
    assert np.isfinite(got["yeom"]).all()
    assert np.isnan(got["lira_online_fixed"]).all() and np.isnan(got["rmia_online"]).all()


def test_mean_over_trainings_has_students_interval() -> None:
    rng = np.random.default_rng(0)
    joint, plain = rng.normal(0.7, 0.05, 9), rng.normal(0.65, 0.05, 9)
    got = paired_over_targets(np.r_[joint, np.nan, 0.5], np.r_[plain, 0.5, np.nan], confidence=0.9)
    expected = ttest_1samp(joint - plain, 0).confidence_interval(0.9)
    assert got["pairs"] == 9
    assert got["value"] == pytest.approx((joint - plain).mean())
    assert [got["low"], got["high"]] == pytest.approx([expected.low, expected.high])
    one = paired_over_targets(np.array([0.7]), np.array([0.6]), confidence=0.95)
    assert one["value"] is None and one["pairs"] == 1 and "two pairs" in one["note"]
    with pytest.raises(ValueError, match="2 AUCs cannot be paired with 1"):
        paired_over_targets(np.zeros(2), np.zeros(1), confidence=0.95)
