"""What a search selects by is a run's figures with half of calibration for test, and no test."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, norm, sem
from sklearn.metrics import roc_auc_score

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import ScoreTable
from amint_ray.evaluation.selection import selection_figures, selection_metrics

CONFIG = Evaluation(fprs=(0.25, 0.05), priors=(0.1,), min_false_positives=10)


def halves(count: int) -> tuple[list[str], list[str]]:
    """So many names of the half that sets thresholds, and of the half that is measured on."""
    both: tuple[list[str], list[str]] = ([], [])
    number = 0
    while min(map(len, both)) < count:
        name, number = f"s/{number:04d}", number + 1
        both[hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 2].append(name)
    return both[0][:count], both[1][:count]


def column(*parts: tuple[str, list[str], list[float]]) -> ScoreTable:
    """Rows of (role, names, logits); every fourth prediction is wrong, losses are 0.1, 0.2, …."""
    names = [name for _, of, _ in parts for name in of]
    n = len(names)
    label = np.arange(n) % 5
    return ScoreTable(
        sample_id=np.array(names),
        role=np.array([role for role, of, _ in parts for _ in of]),
        label=label,
        prediction=np.where(np.arange(n) % 4 == 0, (label + 1) % 5, label),
        task_loss=0.1 * np.arange(1, n + 1),
        mint_logit=np.array([value for *_, of in parts for value in of]),
    )


KEPT, MEASURED = halves(40)
MEMBERS, WITHHELD = [20.0] * 7 + [17.0, 0.2, -1.0], [20.0, 16.0, 15.0, -2.0]
# Thresholds from 1 … 19: a FPR of 5 % is "above 19", one of 25 % is "above 15".
NEGATIVES = [21.0] * 2 + [16.0] * 4 + [15.0] * 4 + [-3.0] * 30
TABLE = column(
    ("calibration", MEASURED, NEGATIVES),
    ("calibration", KEPT[:19], [float(i) for i in range(1, 20)]),
    ("member", [f"m/{i}" for i in range(10)], MEMBERS),
    ("withheld", [f"w/{i}" for i in range(4)], WITHHELD),
)


def exact(successes: int, trials: int) -> tuple[float, float, float]:
    interval = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    return successes / trials, interval.low, interval.high


def test_figures_against_a_hand_computation() -> None:
    figures = selection_figures(TABLE, CONFIG, head_trained=True)
    member, withheld = figures["membership"]["member"], figures["membership"]["withheld"]
    assert member["compared"] == {
        "positives": "member",
        "n_positives": 10,
        "negatives": "calibration (half)",
        "n_negatives": 40,
        "seeds": 1,
    }
    assert member["threshold"] == withheld["threshold"] == 19
    for got, expected in (
        (member["realised_fpr"], exact(2, 40)),
        (member["tpr_at_fpr"]["0.25"], exact(8, 10)),
        (withheld["tpr_at_fpr"]["0.25"], exact(2, 4)),
        (figures["task"]["accuracy"], exact(30, 40)),
    ):
        assert (got["value"], got["low"], got["high"]) == pytest.approx(expected)
    for figure, positives in ((member, MEMBERS), (withheld, WITHHELD)):
        truth = [1] * len(positives) + [0] * 40
        area = roc_auc_score(truth, positives + NEGATIVES)
        assert figure["auc"]["value"] == pytest.approx(area)
    assert member["balanced_accuracy"]["value"] == pytest.approx((0.7 + 1 - 0.05) / 2)
    note = "2 false positives expected among 40 calibration (half) images, 10 needed"
    assert member["tpr_at_fpr"]["0.05"]["note"] == note
    losses = 0.1 * np.arange(1, 41)
    loss = figures["task"]["loss"]
    assert loss["value"] == pytest.approx(2.05)
    low, high = norm.interval(0.95, losses.mean(), sem(losses))
    assert (loss["low"], loss["high"]) == pytest.approx((low, high))


def test_metrics_are_the_known_leaves_under_their_names() -> None:
    metrics = selection_metrics(TABLE, CONFIG, head_trained=True)
    figures = selection_figures(TABLE, CONFIG, head_trained=True)
    assert all(key.startswith("selection.") for key in metrics)
    assert np.isfinite(list(metrics.values())).all()
    area = figures["membership"]["withheld"]["auc"]
    name = "selection.membership.withheld.auc"
    assert [metrics[name + end] for end in ("", ".low", ".high")] == [
        *(area["value"], area["low"], area["high"])
    ]
    assert metrics["selection.task.loss"] == pytest.approx(2.05)
    assert "selection.membership.member.tpr_at_fpr.0.25" in metrics
    assert "selection.membership.member.tpr_at_fpr.0.05" not in metrics  # 2 of 40
    plain = selection_metrics(TABLE, CONFIG, head_trained=False)
    assert not any("membership" in key for key in plain)
    assert plain == {k: v for k, v in metrics.items() if k in plain}
    assert "selection.loss_threshold.member.auc" in plain


@pytest.mark.parametrize("role", ["test", "external"])
def test_no_row_of_test_or_external_has_influence(role: str) -> None:
    """Whatever they hold, and whichever half their names would be in."""
    rng = np.random.default_rng(0)
    names = [f"{role}/{i}" for i in range(50)]
    before = selection_figures(TABLE, CONFIG, head_trained=True)
    for value in (0.0, 99.0, np.nan, np.inf):
        others = replace(column((role, names, [value] * 50)), task_loss=np.full(50, value))
        places = rng.integers(0, len(TABLE), 50)
        mixed = ScoreTable(
            **{k: np.insert(v, places, getattr(others, k)) for k, v in TABLE.columns.items()}
        )
        assert selection_figures(mixed, CONFIG, head_trained=True) == before


def test_each_half_does_its_own_work() -> None:
    """Scores of one set thresholds alone, those of the other are measured alone."""
    figures = selection_figures(TABLE, CONFIG, head_trained=True)["membership"]["member"]
    moved = {}
    for name, of in (("kept", KEPT), ("measured", MEASURED)):
        logit = np.where(np.isin(TABLE.sample_id, of), 2 * TABLE.mint_logit, TABLE.mint_logit)
        changed = selection_figures(replace(TABLE, mint_logit=logit), CONFIG, head_trained=True)
        moved[name] = changed["membership"]["member"]
    assert moved["kept"]["threshold"] == 2 * figures["threshold"]
    assert moved["kept"]["auc"] == figures["auc"]
    assert moved["measured"]["threshold"] == figures["threshold"]
    assert moved["measured"]["auc"] != figures["auc"]


def test_the_halves_are_halves_and_stay_what_they_are() -> None:
    names = [f"digits/{i}" for i in range(2000)]
    table = column(("calibration", names, [0.0] * 2000))
    compared = selection_figures(table, CONFIG, head_trained=True)["membership"]["member"]
    assert 900 < compared["compared"]["n_negatives"] < 1100
    # Other runs, on other machines, must measure on the same: `printf s/0 | b2sum -l 8`.
    found = []
    for number in range(8):
        one = column(("calibration", [f"s/{number}"], [0.0]))
        figures = selection_figures(one, CONFIG, head_trained=True)
        found.append(figures["membership"]["member"]["compared"]["n_negatives"])
    assert found == [1, 0, 0, 0, 0, 1, 1, 1]


def test_nothing_to_measure_on_is_said() -> None:
    empty = TABLE.kept(np.isin(TABLE.role, ["member"]))
    figures = selection_figures(empty, CONFIG, head_trained=True)
    assert figures["task"]["accuracy"]["note"] == "no samples"
    assert figures["task"]["loss"]["note"] == "fewer than two samples"
    assert selection_metrics(empty, CONFIG, head_trained=True) == {}
