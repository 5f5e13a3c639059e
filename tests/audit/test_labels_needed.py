"""A head that reads the task loss has nothing to say of images without labels; the outputs have."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from audit_population import Population, judged, scores_of, without_labels

from amint_ray.audit.decisions import precision, precision_at_threshold
from amint_ray.audit.suspects import Settings, Suspects
from amint_ray.audit.verdict import Judgement
from amint_ray.evaluation.reference import Reference

MODEL = Population(told=2.0, gain=1.0)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return MODEL.reference(np.random.default_rng(0), calibration=300, member=200, withheld=100)


def given(labelled: np.ndarray, **counts: int) -> Suspects:
    ours = without_labels(MODEL.suspects(np.random.default_rng(1), **counts), ~labelled)
    return dataclasses.replace(ours, mint_logit=np.where(labelled, ours.mint_logit, np.nan))


def audit(suspects: Suspects, reference: Reference, evidence: str = "both") -> Judgement:
    settings = Settings(evidence=evidence)  # type: ignore[arg-type]
    return judged(
        suspects,
        reference,
        scores_of(reference),
        settings,
        confounders_clean=True,
        needs_labels=True,
    )


def codes(found: Judgement, key: str) -> list[str]:
    return [reason["code"] for reason in found.document[key]]


def test_the_outputs_are_heard_where_the_head_is_silent(reference: Reference) -> None:
    found = audit(given(np.zeros(150, bool), withheld=150), reference)
    p = found.images["p_value"]
    assert np.isnan(found.images["p_head"]).all()
    np.testing.assert_array_equal(p, np.minimum(1, 2 * found.images["p_outputs"]))
    assert found.document["verdict"] == "member"
    assert codes(found, "reservations") == ["labels_needed"]
    assert "150" in found.document["reservations"][0]["text"]
    assert found.document["evidence"]["head"]["p_value"] is None
    assert found.document["evidence"]["head"]["power"]["images_for_power"] is None
    others = audit(given(np.zeros(150, bool), test=150), reference).document
    assert others["verdict"] != "member"
    assert others["suspects"]["flagged"] == 0


def test_a_head_alone_without_labels_says_what_it_needs(reference: Reference) -> None:
    found = audit(given(np.zeros(40, bool), member=40), reference, "head")
    assert (found.document["verdict"], codes(found, "reasons")) == ("no_verdict", ["labels_needed"])
    assert codes(found, "reservations") == []
    assert "audit.label_column" in found.document["reasons"][0]["help"]
    all_labelled = audit(given(np.ones(40, bool), member=40), reference, "head")
    assert all_labelled.document["verdict"] == "member"


def test_precision_is_that_of_images_of_which_as_much_is_known() -> None:
    """The head, which is silent about the second image, would know all training images."""
    known = [np.full(100, 0.001), np.arange(1, 101) / 100]
    p = [np.array([0.2, np.nan, np.nan]), np.array([0.2, 0.2, np.nan])]
    found = precision(p, known, prior=0.1)
    # Combined p-values are 0.4: of training images all have a smaller one, or a fifth by outputs.
    assert found[0] == pytest.approx(0.1 / (0.1 + 0.9 * 0.4))
    assert found[1] == pytest.approx(0.02 / (0.02 + 0.9 * 0.4))
    assert np.isnan(found[2])
    for flagged, value in (([True, False, False], found[0]), ([True, True, False], found[1])):
        at = precision_at_threshold(
            p, known, np.array(flagged), calibration=1000, settings=Settings(prior=0.1)
        )
        assert at.value == pytest.approx(value, rel=0.01)
