"""Scores, their file, and every figure that is made of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm, sem
from sklearn.metrics import roc_auc_score
from torch import nn

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreBatch, ScoreTable
from amint_ray.evaluation import metrics
from amint_ray.evaluation.figures import roc_curves, score_histograms
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import concatenate, read_scores, score, write_scores

ROLES = [role.value for role in Role]


def table_of(logits: dict[str, list[float]], losses: dict[str, list[float]]) -> ScoreTable:
    """Rows of the roles in turn; every third prediction is wrong."""
    role = np.array([name for name, values in logits.items() for _ in values], dtype=np.str_)
    n = len(role)
    label = np.arange(n) % 4
    return ScoreTable(
        sample_id=np.array([f"s{i:04d}" for i in range(n)], dtype=np.str_),
        role=role,
        label=label,
        prediction=np.where(np.arange(n) % 3 == 0, (label + 1) % 4, label),
        task_loss=np.array([x for values in losses.values() for x in values]),
        mint_logit=np.array([x for values in logits.values() for x in values]),
    )


def random_table(seed: int = 0, **sizes: int) -> ScoreTable:
    sizes = {"member": 70, "withheld": 30, "external": 20, "calibration": 99, "test": 400} | sizes
    shift = {"member": 1.5, "withheld": 0.7, "external": -0.5, "calibration": 0.0, "test": 0.0}
    rng = np.random.default_rng(seed)
    logits = {r: list(rng.normal(shift[r], 1, n)) for r, n in sizes.items()}
    losses = {r: list(rng.exponential(1 / (1 + max(0, shift[r])), n)) for r, n in sizes.items()}
    return table_of(logits, losses)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict) and "value" in node:
        yield path, node
    elif isinstance(node, dict):
        for key, below in node.items():
            yield from leaves(below, f"{path}/{key}".lstrip("/"))


def without(node: Any, *keys: str) -> Any:
    return {k: v for k, v in node.items() if k not in keys}


def triple(leaf: dict[str, Any]) -> tuple[float, float, float]:
    return leaf["value"], leaf["low"], leaf["high"]


def exact(successes: int, trials: int) -> tuple[float, float, float]:
    interval = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    return successes / trials, interval.low, interval.high


def with_scores(table: ScoreTable, role: str, seed: int) -> ScoreTable:
    """Another draw of both scores for one role."""
    rng = np.random.default_rng(seed)
    new = [column.copy() for column in (table.mint_logit, table.task_loss)]
    for column in new:
        column[table.role == role] = rng.normal(0.3, 2, (table.role == role).sum())
    return replace(table, mint_logit=new[0], task_loss=new[1])


# --- the figures ----------------------------------------------------------------------------------

# Calibration 1 … 19: a FPR of 5 % is "above 19", one of 25 % is "above 15". Half is "above 0".
HAND = table_of(
    {
        "member": [20.0] * 7 + [17.0, 0.2, -1.0],
        "withheld": [20.0, 16.0, 15.0, -2.0],
        "external": [-9.0] * 3,
        "calibration": [float(i) for i in range(1, 20)],
        "test": [21.0] * 2 + [16.0] * 4 + [15.0] * 4 + [-3.0] * 30,
    },
    {
        "member": [0.1] * 5 + [0.5] * 5,
        "withheld": [0.1, 0.5, 0.5, 0.5],
        "external": [9.0] * 3,
        "calibration": [i / 10 for i in range(2, 21)],
        "test": [0.1] * 2 + [0.3] * 18 + [0.9] * 20,
    },
)
HAND_CONFIG = Evaluation(fprs=(0.25, 0.05), priors=(0.01, 0.5), min_false_positives=10)


def test_hand_checked_figures() -> None:
    figures = evaluate(HAND, HAND_CONFIG)
    member, withheld = figures["membership"]["member"], figures["membership"]["withheld"]
    assert member["compared"] == {
        "positives": "member",
        "n_positives": 10,
        "negatives": "test",
        "n_negatives": 40,
        "seeds": 1,
    }
    assert member["threshold"] == withheld["threshold"] == 19
    assert triple(member["realised_fpr"]) == pytest.approx(exact(2, 40))
    assert member["balanced_accuracy"]["value"] == pytest.approx((0.7 + 1 - 0.05) / 2)
    assert withheld["balanced_accuracy"]["value"] == pytest.approx((0.25 + 1 - 0.05) / 2)
    assert member["balanced_accuracy_at_half"]["value"] == pytest.approx((0.9 + 1 - 0.25) / 2)
    assert withheld["balanced_accuracy_at_half"]["value"] == pytest.approx((0.75 + 1 - 0.25) / 2)
    assert triple(member["tpr_at_fpr"]["0.25"]) == pytest.approx(exact(8, 10))
    assert triple(withheld["tpr_at_fpr"]["0.25"]) == pytest.approx(exact(2, 4))
    assert triple(member["realised_fpr_at"]["0.25"]) == pytest.approx(exact(6, 40))
    precision = member["precision_at_prior"]
    assert precision["0.01"]["value"] == pytest.approx(0.007 / (0.007 + 0.99 * 0.05))
    assert precision["0.5"]["value"] == pytest.approx(0.7 / 0.75)
    # By loss: 5 of 10 members and 2 of 40 test images lie below the smallest calibration loss, 0.2.
    by_loss = figures["loss_threshold"]["member"]
    assert by_loss["threshold"] == pytest.approx(-0.2)
    assert by_loss["balanced_accuracy"]["value"] == pytest.approx((0.5 + 1 - 0.05) / 2)
    assert triple(by_loss["realised_fpr"]) == pytest.approx(exact(2, 40))
    # Test images are rows 36 to 75, every third of which (36, 39, … 75) is wrong.
    assert triple(figures["task"]["accuracy"]) == pytest.approx(exact(26, 40))
    losses = HAND.task_loss[36:76]
    interval = norm.interval(0.95, losses.mean(), sem(losses))
    assert triple(figures["task"]["loss"]) == pytest.approx((losses.mean(), *interval))
    assert figures["confidence"] == 0.95


@pytest.mark.parametrize("role", ["member", "withheld"])
def test_auc_is_of_the_role_against_test(role: str) -> None:
    table = random_table()
    figures = evaluate(table, Evaluation())
    chosen = np.isin(table.role, [role, "test"])
    truth = table.role[chosen] == role
    for question, scores in (
        ("membership", table.mint_logit),
        ("loss_threshold", -table.task_loss),
    ):
        expected = roc_auc_score(truth, scores[chosen])
        assert figures[question][role]["auc"]["value"] == pytest.approx(expected)


def test_every_leaf_is_an_interval_or_says_why_not() -> None:
    config = Evaluation(fprs=(0.05, 0.01, 0.001))
    tables = [HAND, *(random_table(seed) for seed in range(5))]
    tables += [random_table(withheld=0), random_table(calibration=5), random_table(test=3)]
    known = unknown = 0
    for table in tables:
        for path, leaf in leaves(evaluate(table, config)):
            if leaf["value"] is None:
                assert leaf["low"] is leaf["high"] is None, path
                assert leaf["note"], path
                unknown += 1
            else:
                assert set(leaf) == {"value", "low", "high"}, path
                assert leaf["low"] <= leaf["value"] <= leaf["high"], path
                assert path == "task/loss" or 0 <= leaf["low"] <= leaf["high"] <= 1, path
                assert leaf["low"] < leaf["high"], path
                known += 1
    assert known > 100
    assert unknown > 50


def test_tpr_at_an_unmeasurable_rate_has_a_note_instead() -> None:
    table = random_table(test=999, calibration=2000)
    reported = evaluate(table, Evaluation(fprs=(0.01,)))["membership"]["member"]
    note = reported["tpr_at_fpr"]["0.01"]["note"]
    assert reported["tpr_at_fpr"]["0.01"] == reported["realised_fpr_at"]["0.01"]
    assert "9.99 false positives expected" in note
    assert "999 test images" in note
    enough = evaluate(random_table(test=1000, calibration=2000), Evaluation(fprs=(0.01,)))
    assert enough["membership"]["member"]["tpr_at_fpr"]["0.01"]["value"] is not None


def test_too_small_a_calibration_set_has_a_note_instead() -> None:
    # 18 images reach no 5 %, and 98 no 1 %.
    member = evaluate(random_table(calibration=18), Evaluation())["membership"]["member"]
    assert member["threshold"] is None
    for leaf in (
        member["balanced_accuracy"],
        member["realised_fpr"],
        *member["precision_at_prior"].values(),
    ):
        assert leaf["value"] is None
        assert "18 calibration images are too few for a rate of 0.05" in leaf["note"]
    assert member["auc"]["value"] is not None
    assert member["balanced_accuracy_at_half"]["value"] is not None
    config = Evaluation(fprs=(0.01,), min_false_positives=0)
    for size, there in ((98, False), (99, True)):
        figures = evaluate(random_table(calibration=size), config)["membership"]["member"]
        assert (figures["tpr_at_fpr"]["0.01"]["value"] is not None) == there


CONFIG = Evaluation(fprs=(0.1, 0.03))


def thresholds(figures: dict[str, Any]) -> list[float]:
    return [
        figures[question][role]["threshold"]
        for question in ("membership", "loss_threshold")
        for role in ("member", "withheld")
    ]


def tprs(figures: dict[str, Any]) -> list[float]:
    return [leaf["value"] for path, leaf in leaves(figures) if "/tpr_at_fpr/" in path]


def test_thresholds_come_from_calibration_alone() -> None:
    table = random_table()
    before = evaluate(table, CONFIG)
    for role in ("test", "external"):
        after = evaluate(with_scores(table, role, seed=9), CONFIG)
        assert thresholds(after) == thresholds(before)
        assert tprs(after) == tprs(before)
    moved = evaluate(with_scores(table, "test", seed=9), CONFIG)["membership"]["member"]
    assert moved["realised_fpr"] != before["membership"]["member"]["realised_fpr"]
    for role in ("member", "withheld"):
        assert thresholds(evaluate(with_scores(table, role, seed=9), CONFIG)) == thresholds(before)
    after = evaluate(with_scores(table, "calibration", seed=9), CONFIG)
    assert all(a != b for a, b in zip(thresholds(after), thresholds(before), strict=True))
    assert tprs(after) != tprs(before)


def test_withheld_is_asked_as_member_is() -> None:
    table = random_table()
    swap = {"member": "withheld", "withheld": "member"}
    swapped = replace(table, role=np.array([swap.get(r, r) for r in table.role]))
    one, other = evaluate(table, CONFIG), evaluate(swapped, CONFIG)
    for question in ("membership", "loss_threshold"):
        for role in swap:
            ours, theirs = one[question][role], other[question][swap[role]]
            assert without(ours, "compared") == without(theirs, "compared")
            assert ours["compared"]["positives"] == role
        assert one[question]["member"]["auc"] != one[question]["withheld"]["auc"]


def test_loss_threshold_is_the_same_measurement_of_the_negated_loss() -> None:
    table = random_table()
    by_loss = evaluate(table, CONFIG)["loss_threshold"]
    as_logit = evaluate(replace(table, mint_logit=-table.task_loss), CONFIG)["membership"]
    for role in ("member", "withheld"):
        # A loss has no value that stands for a probability of one half.
        assert by_loss[role] == without(as_logit[role], "balanced_accuracy_at_half")
        assert "balanced_accuracy_at_half" in as_logit[role]


def test_missing_withheld_leaves_member_as_it_is() -> None:
    full = random_table()
    kept = full.role != "withheld"
    part = ScoreTable(**{name: column[kept] for name, column in full.columns.items()})
    figures = evaluate(part, CONFIG)
    assert figures["membership"]["member"] == evaluate(full, CONFIG)["membership"]["member"]
    withheld = figures["membership"]["withheld"]
    # What is of the test images alone is still known.
    assert {path.split("/")[0] for path, leaf in leaves(withheld) if leaf["value"] is not None} == {
        "realised_fpr",
        "realised_fpr_at",
    }
    assert withheld["auc"]["note"] == "no samples"


# --- the file -------------------------------------------------------------------------------------


def test_every_figure_can_be_recomputed_from_the_file(tmp_path: Path) -> None:
    table = random_table(seed=3)
    path = tmp_path / "scores.parquet"
    write_scores(table, path)
    again = read_scores(path)
    for name, column in table.columns.items():
        stored = getattr(again, name)
        assert stored.dtype.kind == column.dtype.kind
        assert stored.tolist() == column.tolist()  # to the last bit
    assert evaluate(again, CONFIG) == evaluate(table, CONFIG)
    assert len(again) == len(table) == 619


def test_figures_do_not_depend_on_workers_or_order() -> None:
    table = random_table()
    order = np.random.default_rng(0).permutation(len(table))
    parts = [
        ScoreTable(**{name: column[order[r::3]] for name, column in table.columns.items()})
        for r in range(3)
    ]
    together = concatenate(parts)
    for name, column in table.columns.items():
        assert getattr(together, name).tolist() == column.tolist()
    assert evaluate(parts[0], CONFIG) != evaluate(table, CONFIG)


def test_nothing_scored_is_an_empty_table() -> None:
    empty = concatenate([])
    assert len(empty) == 0
    assert {name: column.dtype.kind for name, column in empty.columns.items()} == {
        name: column.dtype.kind for name, column in random_table().columns.items()
    }


# --- scoring --------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Dropout and BatchNorm show at once whether evaluation mode was forgotten.

    Its membership logit depends on the label, as that of a head that reads the task loss does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5))
        self.task, self.mint = nn.Linear(12, 5), nn.Linear(12, 1)

    def forward(
        self, images: torch.Tensor, *, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(images)
        return self.task(features), self.mint(features).squeeze(1) + 0.1 * labels


def score_batches(size: int) -> list[ScoreBatch]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(2, 3, (23, 3, 2, 2)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 5, 23))
    names = np.array([f"s{i:02d}" for i in range(23)])
    roles = np.array(ROLES)[rng.integers(0, 5, 23)]
    return [
        ScoreBatch(images[at], labels[at], names[at], roles[at])
        for at in (slice(start, start + size) for start in range(0, 23, size))
    ]


def test_scores_are_the_models_answers_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    reference = copy.deepcopy(model).eval()
    whole = score_batches(23)[0]
    with torch.no_grad():
        logits, membership = (
            x.double().numpy() for x in reference(whole.images, labels=whole.labels)
        )
    labels = whole.labels.numpy()
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(23), labels]
    state = copy.deepcopy(model.state_dict())
    for size in (23, 4):
        table = score(model, iter(score_batches(size)), torch.device("cpu"))
        np.testing.assert_allclose(table.task_loss, loss, rtol=1e-6)
        np.testing.assert_allclose(table.mint_logit, membership, rtol=1e-5, atol=1e-6)
        assert table.prediction.tolist() == logits.argmax(1).tolist()
        assert table.label.tolist() == labels.tolist()
        assert table.role.tolist() == whole.role.tolist()
        assert table.sample_id.tolist() == whole.sample_id.tolist()
        assert table.task_loss.dtype == table.mint_logit.dtype == np.float64
        assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"scoring changed {name}"
    score(model.eval(), score_batches(4), torch.device("cpu"))
    assert not model.training


# --- pictures -------------------------------------------------------------------------------------


def test_roc_picture_draws_the_curves_it_labels() -> None:
    table = random_table()
    figures = evaluate(table, CONFIG)
    axes = roc_curves(table, figures).axes[0]
    lines = {str(line.get_label()).split(":")[0]: line for line in axes.get_lines()}
    assert set(lines) == {"member", "withheld", "chance"}
    for role in ("member", "withheld"):
        positives, negatives = (table.of(Role(r)).mint_logit for r in (role, "test"))
        fpr, tpr = metrics.roc(positives, negatives)
        np.testing.assert_allclose(lines[role].get_ydata(), tpr)
        np.testing.assert_allclose(lines[role].get_xdata(), np.maximum(fpr, 0.5 / 400))
        assert f"{figures['membership'][role]['auc']['value']:.3f}" in str(lines[role].get_label())


def test_histograms_are_densities_of_each_role_that_is_there() -> None:
    table = random_table(withheld=0)
    axes = score_histograms(table).axes[0]
    labels = {str(patch.get_label()): patch for patch in axes.patches}
    assert set(labels) == {f"{r} ({(table.role == r).sum()})" for r in ROLES if r != "withheld"}
    for patch in labels.values():
        corners = patch.get_xy()
        area = np.sum(np.diff(corners[:, 0]) * (corners[1:, 1] + corners[:-1, 1]) / 2)
        assert math.isclose(area, 1, rel_tol=1e-6)
