"""Error rates that the audit states, by simulation: 2,000 audits of images of known origin."""

from __future__ import annotations

import math

import numpy as np
import pytest
from audit_population import Population
from scipy.stats import kstest

from amint_ray.audit.collection import share_of
from amint_ray.audit.decisions import combined
from amint_ray.audit.output_scores import Score, fitted, loss
from amint_ray.audit.ranks import Sample, place, rank_test
from amint_ray.evaluation.calibration import benjamini_hochberg

AUDITS = 2000
SUSPECTS, HEAD_CALIBRATION, CALIBRATION = 25, 80, 40

plain = Sample.unstratified


def at_most(hits: int, rate: float) -> None:
    """So many of 2,000 are compatible with a rate of at most this."""
    assert hits / AUDITS <= rate + 4 * math.sqrt(rate * (1 - rate) / AUDITS)


@pytest.fixture(scope="module")
def scores() -> dict[str, np.ndarray]:
    """By evidence (audits, images): calibration images, then suspects that trained nothing.

    The output attack is fitted once, to images that are none of these: its error rates hold
    whatever it has learnt. Half of the head's calibration images are not among the outputs'.
    """
    rng = np.random.default_rng(0)
    model = Population()
    known = model.draw(rng, np.repeat(["calibration", "member", "withheld"], 60))
    by: Score = fitted(known["told"], np.arange(180) >= 60)
    n = AUDITS * (HEAD_CALIBRATION + SUSPECTS)
    drawn = model.draw(rng, np.full(n, "test"))
    columns = {
        "head": drawn["mint_logit"],
        "outputs": by(drawn["told"]),
        "loss": loss(drawn["untold"]),
    }
    return {name: column.reshape(AUDITS, -1) for name, column in columns.items()}


def split(scores: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One audit's calibration images and suspects."""
    first = 0 if name == "head" else HEAD_CALIBRATION - CALIBRATION
    return scores[first:HEAD_CALIBRATION], scores[HEAD_CALIBRATION:]


@pytest.mark.parametrize("name", ["head", "outputs", "loss"])
def test_p_values_of_images_are_uniform(scores: dict[str, np.ndarray], name: str) -> None:
    rng = np.random.default_rng(1)
    p = []
    for row in scores[name]:
        calibration, suspects = split(row, name)
        value = place(plain(suspects[:1]), plain(calibration)).p[0]
        # A multiple of 1/(m + 1), each as likely: uniform once the steps are filled.
        p.append(value - rng.random() / (len(calibration) + 1))
    assert kstest(p, "uniform").pvalue > 0.01


@pytest.fixture(scope="module")
def collections(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By evidence (audits,) p-values of the collection."""
    return {
        name: np.array(
            [rank_test(*map(plain, reversed(split(row, name)))).p_value for row in scores[name]]
        )
        for name in scores
    }


@pytest.mark.parametrize("name", ["head", "outputs", "loss"])
def test_p_values_of_collections_are_uniform(collections: dict[str, np.ndarray], name: str) -> None:
    assert kstest(collections[name], "uniform").pvalue > 0.01


def test_the_combined_p_value_is_valid_and_not_wasteful(
    scores: dict[str, np.ndarray], collections: dict[str, np.ndarray]
) -> None:
    correlation = np.corrcoef(scores["head"][:, -1], scores["outputs"][:, -1])[0, 1]
    assert correlation > 0.3  # what a sum of the two would have to take into account
    p = combined([collections["head"], collections["outputs"]])
    for alpha in (0.01, 0.05, 0.1, 0.25):
        at_most(int((p <= alpha).sum()), alpha)
        assert (p <= alpha).mean() > alpha / 2


def test_classes_of_a_collection_make_it_no_member() -> None:
    """Easy classes, and no training image: uniform within classes, and wrong by any other test."""
    rng = np.random.default_rng(2)
    model = Population(easy=1.0)
    classes = np.tile(np.r_[rng.integers(0, 4, 60), [3] * 20, [2] * 5], AUDITS)
    drawn = model.draw(rng, np.full(len(classes), "test"), classes)
    score = drawn["mint_logit"].reshape(AUDITS, -1)
    p, wrong = [], []
    for row, of in zip(score, classes.reshape(AUDITS, -1), strict=True):
        p.append(rank_test(Sample(row[60:], of[60:]), Sample(row[:60], of[:60])).p_value)
        wrong.append(rank_test(plain(row[60:]), plain(row[:60])).p_value)
    assert kstest(p, "uniform").pvalue > 0.01
    at_most(sum(value <= 0.01 for value in p), 0.01)
    assert np.mean(np.array(wrong) <= 0.01) > 0.5


@pytest.mark.parametrize("members", [0, 8])
def test_false_discoveries_stay_below_their_rate(
    scores: dict[str, np.ndarray], members: int
) -> None:
    """Members among the suspects are moved up; p-values are combined over dependent evidence."""
    fdr, found, share = 0.2, 0, []
    member = np.arange(SUSPECTS) < members
    for head, outputs in zip(scores["head"], scores["outputs"], strict=True):
        p = []
        for name, row in (("head", head), ("outputs", outputs)):
            calibration, suspects = split(row, name)
            p.append(place(plain(suspects + 4 * member), plain(calibration)).p)
        flagged = benjamini_hochberg(combined(p), fdr)
        share.append((flagged & ~member).sum() / max(1, flagged.sum()))
        found += int((flagged & member).sum())
    error = np.std(share) / math.sqrt(AUDITS)
    assert np.mean(share) <= fdr + 3 * error
    if members:
        assert found > AUDITS * members / 2
        assert np.mean(share) > 0.02  # and not because nobody is ever accused


@pytest.mark.parametrize(
    ("share", "suspects", "shift"),
    [(0.0, 12, 1.2), (0.7, 12, 1.2), (0.2, 150, 0.6), (0.7, 150, 0.6), (1.0, 150, 0.6)],
)
def test_the_interval_of_the_share_holds_it(share: float, suspects: int, shift: float) -> None:
    """Calibration, known images and suspects are all drawn anew."""
    rng = np.random.default_rng(round(10 * share) + suspects)
    held, told = 0, 0
    for _ in range(AUDITS):
        calibration = plain(rng.normal(size=150))
        known = place(plain(rng.normal(size=120) + shift), calibration).share
        score = rng.normal(size=suspects) + shift * (rng.random(suspects) < share)
        found = share_of(
            float(place(plain(score), calibration).share.mean()),
            known,
            suspects=suspects,
            calibration=150,
            confidence=0.95,
        )
        if found.value is not None:
            assert found.low is not None
            assert found.high is not None
            told += 1
            held += found.low <= share <= found.high
    assert told > 0.95 * AUDITS
    assert held / told >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / AUDITS)
    if 0 < share < 1:
        assert held / told <= 0.975  # nor is it wide for nothing
