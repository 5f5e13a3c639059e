"""Figures of every method, what is left out of them, edited suspects, and the file of scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_evidence import population

from amint_ray.attacks.evidence import PLAIN
from amint_ray.attacks.methods import METHODS
from amint_ray.attacks.table import (
    measure,
    read_attack_scores,
    robustness,
    write_attack_scores,
)
from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable, UserError
from amint_ray.evaluation.metrics import auc
from amint_ray.evaluation.report import evaluate

CONFIG = Evaluation(fprs=(0.1, 0.01), min_false_positives=5)
COUNTS = {
    Role.MEMBER: 120,
    Role.WITHHELD: 60,
    Role.EXTERNAL: 10,
    Role.CALIBRATION: 150,
    Role.TEST: 600,
}
EVIDENCE = population(COUNTS, edits=(PLAIN, "jpeg_75", "flip"), shadows=4, known=40, seed=7)


def test_the_loss_threshold_has_the_figures_of_the_run_itself() -> None:
    loss = -METHODS["yeom"].score(EVIDENCE, PLAIN)
    table = ScoreTable(
        sample_id=EVIDENCE.sample_id,
        role=EVIDENCE.role,
        label=EVIDENCE.label,
        prediction=EVIDENCE.label,
        task_loss=loss,
        mint_logit=loss,
    )
    expected = evaluate(table, CONFIG)["loss_threshold"]
    got = measure(METHODS["yeom"], EVIDENCE, CONFIG)
    assert got.keys() == {"member", "withheld"}
    for role, figures in got.items():
        left_out = figures["compared"].pop("left_out")
        assert left_out == {"positives": 0, "negatives": 0, "calibration": 0}
        assert figures == expected[role]


def test_what_was_not_scored_is_left_out_of_all_three_and_counted() -> None:
    phi = EVIDENCE.outputs[PLAIN].label_confidence.copy()
    for role, count in (("member", 3), ("test", 5), ("calibration", 2)):
        phi[0, np.flatnonzero(EVIDENCE.role == role)[:count]] = np.nan
    outputs = {PLAIN: replace(EVIDENCE.outputs[PLAIN], label_confidence=phi)}
    got = measure(METHODS["yeom"], replace(EVIDENCE, outputs=outputs), CONFIG)
    member, withheld = got["member"]["compared"], got["withheld"]["compared"]
    assert member["left_out"] == {"positives": 3, "negatives": 5, "calibration": 2}
    assert withheld["left_out"] == {"positives": 0, "negatives": 5, "calibration": 2}
    assert (member["n_positives"], member["n_negatives"]) == (117, 595)
    kept = np.isfinite(phi[0])
    positives, negatives = (
        phi[0, kept & (EVIDENCE.role == role)].astype(float) for role in ("member", "test")
    )
    assert got["member"]["auc"] == auc(positives, negatives, confidence=0.95).as_dict()
    threshold = np.sort(-np.logaddexp(0, -phi[0, kept & (EVIDENCE.role == "calibration")]))[-7]
    assert got["member"]["threshold"] == pytest.approx(threshold, rel=1e-6)  # ⌊0.05 · 149⌋ = 7


def test_a_fitted_attack_is_not_measured_on_what_it_knew() -> None:
    method = METHODS["output_attack"]
    got = measure(method, EVIDENCE, CONFIG)
    known = {role: int((EVIDENCE.known & (EVIDENCE.role == role)).sum()) for role in COUNTS}
    assert known["member"] == 40 and 50 < known["calibration"] < 100
    assert got["member"]["compared"]["n_positives"] == 80
    assert got["member"]["compared"]["left_out"] == {
        "positives": 40,
        "negatives": 0,
        "calibration": known["calibration"],
    }
    assert got["withheld"]["compared"]["left_out"]["positives"] == 0
    scores = method.score(EVIDENCE, PLAIN)
    unknown = scores[(EVIDENCE.role == "calibration") & ~EVIDENCE.known]
    k = int(0.05 * (len(unknown) + 1))
    assert got["member"]["threshold"] == np.sort(unknown)[-k]


@pytest.mark.parametrize(
    ("name", "missing", "text"),
    [
        ("mint", {"mint_logit": None}, "loss.lambda_mint = 0"),
        ("rmia_online", {"shadows": None}, "no shadow models"),
        ("output_attack", {"known": np.zeros(len(EVIDENCE), np.bool_)}, "knows 0 members"),
    ],
)
def test_a_method_that_cannot_be_had_says_why_in_every_figure(
    name: str, missing: dict[str, object], text: str
) -> None:
    got = measure(METHODS[name], replace(EVIDENCE, **missing), CONFIG)
    for figures in got.values():
        assert figures["auc"]["value"] is None and text in figures["auc"]["note"]
        assert text in figures["tpr_at_fpr"]["0.1"]["note"]
        assert figures["threshold"] is None
        assert figures["compared"]["left_out"]["negatives"] == 600
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_figures_that_json_holds(name: str) -> None:
    got = measure(METHODS[name], EVIDENCE, CONFIG)
    json.dumps(got, allow_nan=False)
    assert got["withheld"]["auc"]["value"] is not None


def test_edited_suspects_under_the_threshold_of_plain_calibration() -> None:
    config = Evaluation(min_false_positives=5)
    got = robustness(METHODS["yeom"], EVIDENCE, config)
    assert list(got) == ["jpeg_75", "flip"]
    plain, edited = (METHODS["yeom"].score(EVIDENCE, edit) for edit in (PLAIN, "flip"))
    threshold = np.sort(plain[EVIDENCE.role == "calibration"])[-1]  # ⌊0.01 · 151⌋ = 1
    for role in ("member", "withheld"):
        positives, negatives = edited[EVIDENCE.role == role], edited[EVIDENCE.role == "test"]
        figures = got["flip"][role]
        assert figures["auc"] == auc(positives, negatives, confidence=0.95).as_dict()
        assert figures["tpr"]["value"] == (positives > threshold).mean()
        assert figures["realised_fpr"]["value"] == (negatives > threshold).mean()
    assert got["jpeg_75"] != got["flip"]


def test_edits_that_a_method_knows_nothing_of() -> None:
    assert robustness(METHODS["blind"], EVIDENCE, CONFIG) == {}
    assert EVIDENCE.shadows is not None
    table = {PLAIN: EVIDENCE.shadows.label_confidence[PLAIN]}
    only_plain = replace(EVIDENCE, shadows=replace(EVIDENCE.shadows, label_confidence=table))
    got = robustness(METHODS["lira_offline"], only_plain, CONFIG)
    assert "jpeg_75" in got["jpeg_75"]["member"]["auc"]["note"]
    assert got["flip"]["withheld"]["tpr"]["value"] is None
    fitted = robustness(METHODS["output_attack"], EVIDENCE, CONFIG)
    assert fitted["flip"]["member"]["auc"]["value"] is not None
    nobody = replace(EVIDENCE, known=np.zeros(len(EVIDENCE), np.bool_))
    assert (
        "knows 0"
        in robustness(METHODS["output_attack"], nobody, CONFIG)["flip"]["member"]["auc"]["note"]
    )


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    scores = {name: METHODS[name].score(EVIDENCE, PLAIN) for name in ("yeom", "lira_online")}
    write_attack_scores(tmp_path / "attacks.parquet", EVIDENCE, scores)
    back = read_attack_scores(tmp_path / "attacks.parquet")
    np.testing.assert_array_equal(back.sample_id, EVIDENCE.sample_id)
    np.testing.assert_array_equal(back.role, EVIDENCE.role)
    np.testing.assert_array_equal(back.label, EVIDENCE.label)
    np.testing.assert_array_equal(back.known, EVIDENCE.known)
    assert list(back.scores) == ["yeom", "lira_online"]
    for name, values in scores.items():
        np.testing.assert_array_equal(back.scores[name], values)
    assert np.isnan(back.scores["lira_online"]).sum() == 10  # external ones: no shadow trained


def test_a_file_that_is_no_table_of_scores_is_told(tmp_path: Path) -> None:
    path = tmp_path / "attacks.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a table of attack scores"):
        read_attack_scores(path)
