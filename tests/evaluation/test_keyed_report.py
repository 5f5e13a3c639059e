"""The figures of a run whose head says codes, each against what it is said to be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable
from amint_ray.evaluation.keyed import hard_p_values
from amint_ray.evaluation.report import evaluate

BITS, CONFIG = 24, Evaluation()
SIZES = {"member": 300, "withheld": 80, "calibration": 100, "test": 500}
RIGHT = {"member": 0.8, "withheld": 0.65, "calibration": 0.5, "test": 0.5}


def table() -> ScoreTable:
    """How many bits are right is drawn, and p-values are those of their number."""
    rng = np.random.default_rng(4)
    role = np.repeat(list(SIZES), list(SIZES.values()))
    n = len(role)
    matched = rng.binomial(BITS, [RIGHT[each] for each in role.tolist()])
    return ScoreTable(
        sample_id=np.array([f"s{i:04d}" for i in range(n)]),
        role=role,
        label=np.zeros(n, np.int64),
        prediction=np.zeros(n, np.int64),
        task_loss=rng.exponential(size=n),
        mint_logit=matched.astype(float),
        code_bits=np.full(n, BITS),
        code_matches=matched,
        code_p=hard_p_values(matched, BITS),
    )


@pytest.mark.parametrize("role", ["member", "withheld"])
def test_rates_are_those_of_the_role_and_of_test(role: str) -> None:
    scores = table()
    assert scores.code_matches is not None and scores.code_p is not None
    of, test = scores.role == role, scores.role == Role.TEST.value
    found = evaluate(scores, CONFIG)["membership"][role]
    assert found["bits"] == BITS
    for name, rows in (("match_rate", of), ("null_match_rate", test)):
        rate = scores.code_matches[rows].mean() / BITS
        assert found[name]["value"] == pytest.approx(rate)
        assert found[name]["low"] < rate < found[name]["high"]
    for name, rows in (("tpr_at_p", of), ("null_share_at_p", test)):
        assert set(found[name]) == {"0.01", "0.001", "1e-06"}
        for level, share in found[name].items():
            hits = int((scores.code_p[rows] <= float(level)).sum())
            exact = binomtest(hits, int(rows.sum())).proportion_ci(CONFIG.confidence, "exact")
            assert share["value"] == hits / rows.sum()
            assert (share["low"], share["high"]) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("role", ["member", "withheld"])
def test_so_many_images_of_the_role_are_convicted_together_and_fewer_are_not(role: str) -> None:
    scores, rng = table(), np.random.default_rng(5)
    assert scores.code_matches is not None
    stated = evaluate(scores, CONFIG)["membership"][role]["collection"]
    assert (stated["p"], stated["power"]) == (1e-6, 0.95)
    matched = scores.code_matches[scores.role == role]

    def power(images: int) -> float:
        drawn = rng.choice(matched, (20_000, images)).sum(axis=1)
        return float((binom.sf(drawn - 1, BITS * images, 0.5) <= 1e-6).mean())

    assert power(stated["images"]) >= 0.94
    assert power(stated["images"] - 2) < 0.95
