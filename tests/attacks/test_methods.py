"""Choosing methods; what is handed through; the order of strength; fitted attacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from small_evidence import COUNTS, outputs_from, population

from amint_ray.attacks.evidence import PLAIN, Evidence
from amint_ray.attacks.method import Method
from amint_ray.attacks.methods import METHODS, chosen
from amint_ray.contracts import Role, RunError, UserError

LARGE = population(
    {Role.MEMBER: 500, Role.WITHHELD: 1500, Role.CALIBRATION: 1500, Role.TEST: 3000},
    shadows=32,
    gain=2.0,
    uneven=True,
    noise=0.8,
    difficulty=2.5,
    seed=11,
)


def rate(evidence: Evidence, name: str, *, fpr: float = 0.01) -> float:
    """Share of `withheld` above the score that a share `fpr` of `test` is above."""
    scores = METHODS[name].score(evidence, PLAIN)
    threshold = np.quantile(scores[evidence.role == "test"], 1 - fpr, method="higher")
    return float((scores[evidence.role == "withheld"] > threshold).mean())


def test_names() -> None:
    assert [method.name for method in chosen("all")] == list(METHODS)
    assert [method.name for method in chosen(" lira_online, yeom,yeom")] == ["yeom", "lira_online"]
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert all(method.source for method in METHODS.values())


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("lira", "'lira', did you mean 'lira_"),
        ("yeom,rmia_onlin", "'rmia_onlin', did you mean 'rmia_online'; there are mint,"),
        ("zzz,yeoom,yeom", "'zzz'; 'yeoom', did you mean 'yeom'; there are mint,"),
        ("xyz!", "'xyz!'; there are mint, "),
        (" , ", "no name"),
    ],
)
def test_names_that_are_none(names: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        chosen(names)


def test_what_was_measured_elsewhere_is_handed_through_by_edit() -> None:
    evidence = population(COUNTS, edits=(PLAIN, "flip"))
    for edit in (PLAIN, "flip"):
        for name, values in (
            ("mint", evidence.mint_logit),
            ("passive_mint", evidence.passive_logit),
            ("hash_list", evidence.listed),
        ):
            np.testing.assert_array_equal(METHODS[name].score(evidence, edit), values[edit])
        np.testing.assert_array_equal(METHODS["blind"].score(evidence, edit), evidence.blind)
    assert [m.name for m in METHODS.values() if not m.reads_suspect] == ["blind"]


def area(evidence: Evidence, name: str) -> float:
    scores = METHODS[name].score(evidence, PLAIN)
    truth = np.isin(evidence.role, ["withheld", "test"])
    return float(roc_auc_score(evidence.role[truth] == "withheld", scores[truth]))


def test_order_of_strength() -> None:
    """Difficulty is noise to a single loss, and how much trace a sample leaves to all but online.

    RMIA weighs probabilities, which hardly move for easy samples: here its strength is the AUC.
    """
    lira = [name for name in METHODS if name.startswith("lira")]
    rates = {name: rate(LARGE, name) for name in ("yeom", *lira)}
    assert rates["lira_online"] > rates["lira_offline"] > 2 * rates["yeom"]
    assert rates["lira_online_fixed"] > rates["lira_offline_fixed"] > 2 * rates["yeom"]
    areas = {name: area(LARGE, name) for name in ("yeom", "watson", "rmia_online", "rmia_offline")}
    assert areas["rmia_online"] > areas["rmia_offline"] > areas["yeom"] + 0.05
    assert areas["watson"] > areas["yeom"]


def test_no_attack_sees_what_has_left_no_trace() -> None:
    null = population(
        {Role.MEMBER: 800, Role.CALIBRATION: 800, Role.TEST: 1000}, shadows=6, gain=0.0, views=2
    )
    for name, method in METHODS.items():
        if name in ("mint", "passive_mint", "hash_list", "blind"):
            continue
        scores = method.score(null, PLAIN)
        kept = np.isfinite(scores) & ~(null.known & method.fitted)
        a, b = (scores[kept & (null.role == role)] for role in ("member", "test"))
        above = (a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean()
        assert abs(above - 0.5) < 0.06, name  # four standard errors


# --- fitted ---------------------------------------------------------------------------------------

FITTED = [METHODS[f"output_attack{kind}"] for kind in ("", "_reference", "_snapshots")]


def features_by_loop(evidence: Evidence, name: str, j: int) -> list[float]:
    outputs, found = evidence.outputs[PLAIN], []
    for column in vars(outputs).values():
        views = [float(value) for value in column[:, j]]
        average = sum(views) / len(views)
        spread = (sum((value - average) ** 2 for value in views) / len(views)) ** 0.5
        found += [*views, average, spread]
    if name.endswith("reference"):
        shadows = evidence.shadows
        rows = [i for i in range(len(shadows)) if not shadows.inside[i, j]]
        outside = [float(shadows.label_confidence[PLAIN][i, j]) for i in rows]
        average = sum(outside) / len(outside)
        found += [average, float(outputs.label_confidence[0, j]) - average]
    if name.endswith("snapshots"):
        for earlier in evidence.snapshots[PLAIN]:
            views = [float(value) for value in earlier.label_confidence[:, j]]
            found += [views[0], sum(views) / len(views)]
    return found


@pytest.mark.parametrize("method", FITTED, ids=lambda method: method.name)
def test_output_attack_is_the_regression_it_says(method: Method) -> None:
    evidence = population(
        {Role.MEMBER: 90, Role.WITHHELD: 20, Role.CALIBRATION: 80, Role.TEST: 20},
        views=3,
        known=40,
        seed=5,
    )
    x = np.array([features_by_loop(evidence, method.name, j) for j in range(len(evidence))])
    known = evidence.known
    spread = x[known].std(axis=0)
    x = (x - x[known].mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    y = (evidence.role == "member")[known]
    by_hand = LogisticRegression(class_weight="balanced", max_iter=5000, tol=1e-8)
    expected = by_hand.fit(x[known], y).decision_function(x)
    got = method.score(evidence, PLAIN)
    np.testing.assert_allclose(got, expected, atol=0.02)
    np.testing.assert_array_equal(method.score(evidence, PLAIN), got)


@pytest.mark.parametrize("method", FITTED, ids=lambda method: method.name)
def test_output_attack_learns_from_nothing_but_the_known(method: Method) -> None:
    evidence = population(
        {Role.MEMBER: 90, Role.WITHHELD: 20, Role.CALIBRATION: 80, Role.TEST: 20}, known=40, seed=5
    )
    phi = evidence.outputs[PLAIN].label_confidence.copy()
    other = np.flatnonzero(~evidence.known)
    phi[:, other[1:]] += 50
    changed = replace(evidence, outputs={PLAIN: outputs_from(phi)})
    before, after = method.score(evidence, PLAIN), method.score(changed, PLAIN)
    np.testing.assert_array_equal(after[evidence.known], before[evidence.known])
    assert after[other[0]] == before[other[0]]
    assert (after[other[1:]] != before[other[1:]]).all()


def test_output_attack_on_edited_suspects_is_fitted_to_plain_ones() -> None:
    counts = {Role.MEMBER: 90, Role.WITHHELD: 20, Role.CALIBRATION: 80, Role.TEST: 20}
    evidence = population(counts, edits=(PLAIN, "flip"), seed=2)
    as_plain = replace(evidence, outputs={**evidence.outputs, "flip": evidence.outputs[PLAIN]})
    method = METHODS["output_attack"]
    plain = method.score(evidence, PLAIN)
    np.testing.assert_array_equal(method.score(as_plain, "flip"), plain)
    assert (method.score(evidence, "flip") != plain).any()


@pytest.mark.parametrize("method", FITTED, ids=lambda method: method.name)
def test_nothing_known_is_told_in_one_line(method: Method) -> None:
    counts = {Role.MEMBER: 90, Role.WITHHELD: 5, Role.CALIBRATION: 80, Role.TEST: 5}
    nobody = population(counts, known=0)
    with pytest.raises(RunError, match="knows 0 members and needs 10") as raised:
        method.score(nobody, PLAIN)
    scores, why = method.scores(nobody)
    assert np.isnan(scores).all() and why == str(raised.value) and "\n" not in str(why)
    few = population(counts | {Role.CALIBRATION: 4})
    with pytest.raises(RunError, match="calibration images and needs 10"):
        method.score(few, PLAIN)


def test_output_attack_leaves_out_what_has_no_outputs() -> None:
    evidence = population({Role.MEMBER: 60, Role.CALIBRATION: 80, Role.TEST: 20}, known=30)
    phi = evidence.outputs[PLAIN].label_confidence.copy()
    unknown, known = (np.flatnonzero(mask)[0] for mask in (~evidence.known, evidence.known))
    phi[:, [unknown, known]] = np.nan
    scores = METHODS["output_attack"].score(
        replace(evidence, outputs={PLAIN: outputs_from(phi)}), PLAIN
    )
    assert np.flatnonzero(np.isnan(scores)).tolist() == sorted([unknown, known])
