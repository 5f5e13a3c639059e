"""Error rates of whole audits by simulation: model, calibration images and suspects drawn anew."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from audit_population import Population, judged, scores_of, without_labels

from amint_ray.audit import verdict, yardstick
from amint_ray.audit.suspects import Settings
from amint_ray.audit.verdict import Judgement
from amint_ray.evaluation.outputs import Outputs, Scores

MODEL = Population(told=2.5, gain=1.0)
SETTINGS = Settings(alpha=0.1, fdr=0.2)
LABELS = ["labelled", "unlabelled", "mixed"]
NULL, MIXTURES = 300, 100


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error rates hold whatever was learnt, and whichever collection would have been noticed."""

    def any_score(outputs: Outputs) -> Scores:
        return outputs.label_confidence.mean(axis=0) - outputs.entropy[0]

    monkeypatch.setattr(yardstick, "fitted", lambda outputs, trained: any_score)
    monkeypatch.setattr(verdict, "images_for_power", lambda *given, **more: 1)


def audit(seed: int, labels: str, **counts: int) -> tuple[Judgement, np.ndarray]:
    """What one audit finds, and which suspects are members."""
    rng = np.random.default_rng(seed)
    reference = MODEL.reference(rng, calibration=120, member=40, withheld=40)
    suspects = MODEL.suspects(rng, **counts)
    if labels != "labelled":
        n = len(suspects)
        suspects = without_labels(suspects, np.arange(n if labels == "unlabelled" else n // 2))
    found = judged(suspects, reference, scores_of(reference), SETTINGS, confounders_clean=True)
    # As `Population.suspects` draws them, from the same place of the same stream.
    again = np.random.default_rng(seed)
    MODEL.reference(again, calibration=120, member=40, withheld=40)
    role = again.permutation(np.repeat(list(counts), list(counts.values())))
    return found, role == "member"


def at_most(hits: Any, rate: float) -> None:
    """So many are compatible with a rate of at most this."""
    assert np.mean(hits) <= rate + 3 * math.sqrt(rate * (1 - rate) / len(hits))


@pytest.mark.parametrize("labels", LABELS)
def test_of_collections_without_training_images_few_are_called_member(labels: str) -> None:
    found = [audit(seed, labels, test=12)[0] for seed in range(NULL)]
    evidence = [each.document["evidence"] for each in found]
    for p in (
        np.array([each.document["p_value"] for each in found]),
        *(np.array([each[name]["p_value"] for each in evidence]) for name in ("head", "outputs")),
    ):
        for level in (0.05, 0.2, 0.5):
            at_most(p <= level, level)
    verdicts = [each.document["verdict"] for each in found]
    at_most([each == "member" for each in verdicts], SETTINGS.alpha)
    assert np.mean([each == "not_member" for each in verdicts]) > 0.8
    at_most([each.document["unlike"]["unlike"] for each in found], 0.01)
    # Where nobody is a member, any that is called one is a false discovery, and all there are.
    at_most([each.images["flagged"].any() for each in found], SETTINGS.fdr)
    for name in ("p_head", "p_outputs", "p_value"):
        at_most(np.concatenate([each.images[name][:1] for each in found]) <= 0.2, 0.2)


@pytest.mark.parametrize("labels", LABELS)
def test_mixtures_are_called_member_with_their_share_and_few_others(labels: str) -> None:
    false, caught, shares = [], [], []
    for seed in range(MIXTURES):
        found, member = audit(seed, labels, member=15, test=15)
        assert found.document["verdict"] == "member"
        flagged = found.images["flagged"]
        false.append((flagged & ~member).sum() / max(1, flagged.sum()))
        caught.append((flagged & member).sum() / 15)
        shares.append(found.document["share"])
    assert np.mean(false) <= SETTINGS.fdr + 3 * np.std(false) / math.sqrt(MIXTURES)
    assert np.mean(caught) > 0.3
    assert {share["by"] for share in shares} <= {"head", "outputs"}
    at_most([not share["low"] <= 0.5 <= share["high"] for share in shares], 0.05)
    assert np.mean([share["high"] - share["low"] for share in shares]) < 0.7
