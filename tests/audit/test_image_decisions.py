"""What is decided of single images, copies and all."""

from __future__ import annotations

import numpy as np
import pytest
from audit_population import Population, judged, scores_of

from amint_ray.audit.suspects import Settings, Suspects
from amint_ray.evaluation.outputs import Outputs


def test_images_are_decided_by_benjamini_hochberg_and_precision_falls_with_p() -> None:
    model = Population(told=5.0, gain=1.0)
    rng = np.random.default_rng(0)
    reference = model.reference(rng, calibration=600, member=300, withheld=100)
    members = model.suspects(rng, member=60, test=60)
    found = judged(members, reference, scores_of(reference), Settings(), confounders_clean=True)
    images = found.images
    p, flagged = images["p_value"], images["flagged"]
    assert (p == np.minimum(1, 2 * np.minimum(images["p_head"], images["p_outputs"]))).all()
    assert p[flagged].max() < p[~flagged].min()
    k = int(flagged.sum())
    assert p[flagged].max() <= 0.05 * k / 120
    assert found.document["suspects"]["flagged"] == k > 40
    trained = members.mint_logit > 2.5
    assert (flagged & ~trained).sum() <= 0.2 * k
    order = np.argsort(p, kind="stable")
    assert images["precision"][order[0]] > 0.9
    assert images["precision"][order[-1]] == pytest.approx(0.1, abs=0.01)  # the prior
    at = found.document["precision"]["at_threshold"]
    assert at["low"] < at["value"] < at["high"]
    worst = images["precision"][flagged].min()
    assert at["value"] == pytest.approx(worst, abs=0.05)


def test_copies_of_a_member_accuse_nobody_else() -> None:
    model = Population(told=5.0, gain=1.0)
    rng = np.random.default_rng(0)
    reference = model.reference(rng, calibration=600, member=300, withheld=100)
    ours = model.suspects(rng, member=30, test=90)
    first = judged(ours, reference, scores_of(reference), Settings(), confounders_clean=True)
    rows = np.r_[np.arange(120), np.full(5000, np.argmin(first.images["p_value"]))]
    many = Suspects(
        **{
            name: value.kept(rows) if isinstance(value, Outputs) else value[rows]
            for name, value in vars(ours).items()
        }
    )
    found = judged(many, reference, scores_of(reference), Settings(), confounders_clean=True)
    assert found.images["flagged"][:120].tolist() == first.images["flagged"].tolist()
    assert found.images["flagged"][120:].all()
    assert found.document["suspects"]["flagged"] == first.document["suspects"]["flagged"]
