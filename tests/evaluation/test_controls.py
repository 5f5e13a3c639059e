"""Figures of the controls, and whether scores that were made again are the saved ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable
from amint_ray.evaluation import metrics
from amint_ray.evaluation.controls import (
    blind_figures,
    duplicate_figures,
    plain_figures,
    stranger_figures,
)
from amint_ray.evaluation.report import evaluate, four_lines
from amint_ray.evaluation.scores import compare_scores

CONFIG = Evaluation()
ROLES = list(Role)


@pytest.fixture(scope="module")
def table() -> ScoreTable:
    random = np.random.default_rng(0)
    role = np.repeat([r.value for r in Role], 100)
    return ScoreTable(
        sample_id=np.array([f"s{i:03d}" for i in range(500)]),
        role=role,
        label=np.arange(500) % 4,
        prediction=np.where(np.arange(500) % 5 == 0, 4, np.arange(500) % 4),
        task_loss=random.exponential(size=500),
        mint_logit=random.normal(size=500) + (role == "member"),
    )


def test_the_plain_model_is_compared_on_the_images_that_both_saw(table: ScoreTable) -> None:
    test = table.of(Role.TEST)
    right = {name: float(i % 3 > 0) for i, name in enumerate(test.sample_id.tolist())}
    right[test.sample_id[0]] = np.nan
    found = plain_figures(table, right, CONFIG)
    ours, theirs = (test.prediction == test.label)[1:], np.arange(1, 100) % 3 > 0
    assert found["n"] == 99
    assert found["accuracy"]["value"] == pytest.approx(ours.mean())
    assert found["plain_accuracy"]["value"] == pytest.approx(theirs.mean())
    difference = metrics.proportion_difference(ours, theirs, confidence=0.95)
    assert found["difference"] == difference.as_dict()


def test_a_blind_classifier_that_sees_something_is_not_clean(table: ScoreTable) -> None:
    noise = np.random.default_rng(1).normal(size=500)
    noise[0] = np.nan
    assert blind_figures(table.role, noise, CONFIG)["clean"] is True
    seeing = noise + 2.0 * (table.role == "withheld")
    found = blind_figures(table.role, seeing, CONFIG)
    assert found["clean"] is False
    assert found["member"]["low"] <= 0.5 < found["withheld"]["low"]


def test_strangers_are_judged_by_the_threshold_of_calibration(table: ScoreTable) -> None:
    calibration = table.of(Role.CALIBRATION).mint_logit
    kinds = {"noise": np.array([100.0, 100.0, -100.0, -100.0]), "given": calibration}
    found = stranger_figures(table, kinds, CONFIG)
    assert (found["noise"]["n"], found["noise"]["realised_fpr"]["value"]) == (4, 0.5)
    assert found["given"]["realised_fpr"]["value"] <= CONFIG.threshold_fpr
    without = table.kept(table.role != "calibration")
    assert stranger_figures(without, kinds, CONFIG)["noise"]["realised_fpr"]["value"] is None


def test_near_duplicates_across_roles_are_taken_out_on_both_sides(table: ScoreTable) -> None:
    role = np.array([ROLES.index(Role(name)) for name in table.role.tolist()])
    test, member = ROLES.index(Role.TEST), ROLES.index(Role.MEMBER)
    near = np.zeros((500, len(ROLES)), np.bool_)
    copied = np.flatnonzero(role == member)[:10], np.flatnonzero(role == test)[:10]
    near[copied[0], test] = near[copied[1], member] = True
    pairs = np.zeros((len(ROLES), len(ROLES)), np.int64)
    pairs[member, test] = pairs[test, member] = 10
    found = duplicate_figures(table, table.sample_id, role, pairs, near, CONFIG, head_trained=True)
    assert found["pairs"] == {"member-test": 10}
    assert (found["test_near_trained"], found["compared"]) == (10, 500)
    positives, negatives = (table.mint_logit[role == each][10:] for each in (member, test))
    area = metrics.auc(positives, negatives, confidence=0.95)
    assert found["without"]["member"] == area.as_dict()
    given = (table, table.sample_id, role, pairs, near, CONFIG)
    plain = duplicate_figures(*given, head_trained=False)
    assert plain["pairs"] == found["pairs"]
    assert {area["value"] for area in plain["without"].values()} == {None}


def test_the_four_lines(table: ScoreTable) -> None:
    figures = evaluate(table, CONFIG)
    blind = {"value": 0.5, "low": 0.4, "high": 0.6}
    lines = four_lines(figures, {"comparisons": {"member_vs_test": {"auc": blind}}})
    assert list(lines) == ["member", "withheld", "blind", "loss"]
    assert lines["blind"] == blind
    assert lines["member"] == figures["membership"]["member"]["auc"]
    assert lines["withheld"] == figures["membership"]["withheld"]["auc"]
    assert lines["loss"] == figures["loss_threshold"]["member"]["auc"]
    assert four_lines(figures, None)["blind"]["value"] is None


def test_scores_made_again_are_compared_by_name(table: ScoreTable) -> None:
    order = np.random.default_rng(2).permutation(500)[:490]
    anew = ScoreTable(**{name: column[order] for name, column in table.columns.items()})
    found = compare_scores(table, replace(anew, mint_logit=anew.mint_logit + 1e-5))
    assert (found["compared"], found["missing"], found["different"]) == (490, 10, 0)
    assert found["predictions"] == 0
    assert found["largest"]["mint_logit"] == pytest.approx(1e-5)
    changed = anew.mint_logit.copy()
    changed[:3] += 0.5
    prediction = anew.prediction.copy()
    prediction[5] += 1
    found = compare_scores(table, replace(anew, mint_logit=changed, prediction=prediction))
    assert (found["different"], found["predictions"]) == (3, 1)
    assert found["largest"] == {"mint_logit": pytest.approx(0.5), "task_loss": 0.0}
    nothing = np.full(490, np.nan)
    unlabelled = replace(table.kept(np.ones(500, np.bool_)), task_loss=np.full(500, np.nan))
    assert compare_scores(unlabelled, replace(anew, task_loss=nothing))["different"] == 0
