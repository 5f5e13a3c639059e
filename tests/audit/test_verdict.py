"""Whole verdicts, from arrays to the document."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from audit_population import Population, judged, scores_of, without_labels

from amint_ray.attacks.evidence import PLAIN
from amint_ray.attacks.evidence import Evidence as AttackEvidence
from amint_ray.attacks.methods import METHODS
from amint_ray.audit.output_scores import fitted
from amint_ray.audit.suspects import Settings, Suspects
from amint_ray.audit.verdict import EXIT_CODES, Judgement
from amint_ray.contracts import UserError
from amint_ray.evaluation.metrics import auc
from amint_ray.evaluation.outputs import Outputs
from amint_ray.evaluation.reference import Reference

MODEL = Population(told=2.0, gain=1.0)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return MODEL.reference(np.random.default_rng(0), calibration=300, member=200, withheld=100)


def audit(
    suspects: Suspects,
    reference: Reference,
    settings: Settings | None = None,
    *,
    clean: bool | None = True,
    calibration: np.ndarray | None = None,
) -> Judgement:
    """One audit with the reference's own calibration scores."""
    scores = scores_of(reference) if calibration is None else calibration
    return judged(suspects, reference, scores, settings or Settings(), confounders_clean=clean)


def suspects(seed: int = 1, classes: np.ndarray | None = None, **counts: int) -> Suspects:
    return MODEL.suspects(np.random.default_rng(seed), classes, **counts)


def codes(found: Judgement) -> list[str]:
    return [reason["code"] for reason in found.document["reasons"]]


@pytest.mark.parametrize(
    ("counts", "verdict", "shares"),
    [
        ({"test": 150}, "not_member", (0, 0)),
        ({"member": 40}, "member", (1, 1)),
        ({"withheld": 150}, "member", (0, 1)),
        ({"member": 50, "test": 100}, "member", (1 / 3, 1 / 3)),
    ],
)
def test_collections_of_known_origin(
    reference: Reference, counts: dict[str, int], verdict: str, shares: tuple[float, float]
) -> None:
    found = audit(suspects(**counts), reference).document
    assert found["verdict"] == verdict
    assert (found["p_value"] <= found["alpha"]) == (verdict == "member")
    evidence = found["evidence"]
    assert found["p_value"] == min(1, 2 * min(e["p_value"] for e in evidence.values()))
    for name, share in zip(("head", "outputs"), shares, strict=True):
        measured = evidence[name]["share"]
        assert measured["low"] <= share <= measured["high"]
        assert measured["high"] - measured["low"] < 0.7
    # The head tells members better than outputs tell D, whoever the suspects are.
    assert found["share"] == {**evidence["head"]["share"], "by": "head"}


def test_a_small_collection_without_a_sign_is_no_acquittal(reference: Reference) -> None:
    found = audit(suspects(test=9), reference)
    needed = found.document["power"]["withheld"]
    assert 9 < needed < 100
    assert found.document["verdict"] == "no_verdict"
    assert codes(found) == ["underpowered"]
    assert str(needed) in found.document["reasons"][0]["text"]
    assert audit(suspects(test=needed), reference).document["verdict"] == "not_member"
    # But a small one with a sign is what it is.
    assert audit(suspects(member=9), reference).document["verdict"] == "member"


def test_no_verdict_on_a_confounded_split_or_on_other_images(reference: Reference) -> None:
    members = suspects(member=60)
    assert codes(audit(members, reference, clean=False)) == ["confounded"]
    other = dataclasses.replace(members, taps=members.taps + 5)
    found = audit(other, reference, clean=None)
    assert (codes(found), found.document["verdict"]) == (["unlike"], "no_verdict")
    (reserved,) = found.document["reservations"]
    assert (reserved["code"], "by its name" in reserved["help"]) == ("confounders_unknown", True)
    scores = scores_of(reference)
    named = judged(other, reference, scores, Settings(), confounders_clean=None, from_mlflow=True)
    again = "train it again with data.confounder_check=true"
    assert named.document["reservations"] == [{**reserved, "help": again}]
    assert audit(members, reference, clean=None).document["verdict"] == "member"
    assert audit(members, reference).document["reservations"] == []
    assert found.document["unlike"]["unlike"] is True
    assert found.document["p_value"] < 1e-6  # what was measured is still said
    both = audit(dataclasses.replace(suspects(test=5), taps=other.taps[:5]), reference, clean=False)
    assert codes(both) == ["confounded", "unlike", "underpowered"]
    assert all(reason["text"] and reason["help"] for reason in both.document["reasons"])


def test_copies_of_an_image_count_once_and_share_its_decision(reference: Reference) -> None:
    few = suspects(member=20)
    rows = np.r_[np.arange(20), np.zeros(3000, int)]
    rows = np.random.default_rng(0).permutation(rows)
    many = dataclasses.replace(
        few,
        **{
            name: getattr(few, name).kept(rows)
            if name in ("told", "untold")
            else getattr(few, name)[rows]
            for name in (field.name for field in dataclasses.fields(few))
        },
    )
    once, often = audit(few, reference), audit(many, reference)
    assert often.document["suspects"]["unique"] == 20
    for part in ("p_value", "share", "suspects.flagged", "unlike", "evidence"):
        assert _at(often.document, part) == pytest.approx(_at(once.document, part), rel=1e-9)
    copy = often.images["duplicate_of"]
    assert (copy >= 0).sum() == 3000
    for name in ("head_score", "p_value", "flagged"):
        column = often.images[name]
        assert (column[copy >= 0] == column[copy[copy >= 0]]).all()
    alone = audit(dataclasses.replace(few, content=np.zeros(20)), reference)
    assert alone.document["suspects"]["unique"] == 1


def _at(document: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        document = document[key]
    if path == "evidence":
        return {name: document[name]["p_value"] for name in document}
    return (
        {k: v for k, v in document.items() if isinstance(v, float)}
        if isinstance(document, dict)
        else document
    )


def test_the_order_of_suspects_changes_nothing(reference: Reference) -> None:
    ours = suspects(member=20, test=40)
    order = np.random.default_rng(5).permutation(60)
    turned = dataclasses.replace(
        ours,
        **{
            name: value.kept(order) if isinstance(value, Outputs) else value[order]
            for name, value in vars(ours).items()
        },
    )
    first, second = audit(ours, reference), audit(turned, reference)
    assert first.document == second.document
    for name, column in first.images.items():
        if name != "duplicate_of":
            np.testing.assert_array_equal(column[order], second.images[name])


def test_a_collection_of_an_easy_class_is_compared_within_it() -> None:
    model = Population(told=2.0, gain=1.0, easy=1.0)
    rng = np.random.default_rng(3)
    reference = model.reference(rng, calibration=600, member=200, withheld=200)
    easiest = np.full(60, 3)
    found = judged(
        model.suspects(rng, easiest, test=60),
        reference,
        scores_of(reference),
        Settings(),
        confounders_clean=True,
    )
    assert found.document["classes"]["collection_within"]
    assert found.document["classes"]["images_within"]
    in_class = int(((reference.role == "calibration") & (reference.label == 3)).sum())
    assert found.document["evidence"]["head"]["calibration_images"] == in_class
    assert found.document["p_value"] > 0.05
    assert not found.images["flagged"].any()
    few = model.suspects(rng, easiest[:12], test=12)
    told = judged(few, reference, scores_of(reference), Settings(), confounders_clean=True)
    (why,) = told.document["reasons"]
    assert why["code"] == "underpowered"
    assert "compared within them" in why["text"] and "images of all classes" in why["help"]
    # What would have been said without classes.
    p = [audit_without_classes(e, reference, model) for e in range(3)]
    assert max(p) < 1e-4
    members = model.suspects(rng, easiest, member=60)
    found = judged(members, reference, scores_of(reference), Settings(), confounders_clean=True)
    assert found.document["verdict"] == "member"
    assert found.document["evidence"]["head"]["share"]["low"] > 0.7


def audit_without_classes(seed: int, reference: Reference, model: Population) -> float:
    from amint_ray.audit.ranks import Sample, rank_test

    drawn = model.suspects(np.random.default_rng(seed), np.full(60, 3), test=60)
    p = rank_test(
        Sample.unstratified(drawn.mint_logit), Sample.unstratified(scores_of(reference))
    ).p_value
    assert p is not None
    return p


def test_suspects_without_labels_and_some_without(reference: Reference) -> None:
    ours = suspects(withheld=120)
    none, some = without_labels(ours), without_labels(ours, np.arange(0, 120, 2))
    own = audit(ours, reference)
    by_prediction, mixed = audit(none, reference), audit(some, reference)
    for found, labels in ((own, "own"), (by_prediction, "prediction"), (mixed, "mixed")):
        evidence = found.document["evidence"]["outputs"]
        assert evidence["labels"] == labels
        assert evidence["images"] == 120
        assert evidence["p_value"] < 0.01
        assert 0.55 < evidence["auc"]["withheld"]["value"] < 0.95
        assert evidence["share"]["low"] <= 1 <= evidence["share"]["high"]
    assert mixed.document["suspects"]["labelled"] == 60
    # A row is scored as it is where all are like it.
    half = np.arange(120) % 2 == 1
    np.testing.assert_array_equal(
        mixed.images["outputs_score"][half], own.images["outputs_score"][half]
    )
    np.testing.assert_array_equal(
        mixed.images["outputs_score"][~half], by_prediction.images["outputs_score"][~half]
    )


def test_labelled_and_unlabelled_suspects_together_acquit_nobody(reference: Reference) -> None:
    """Each kind is tested by itself, on a part of the images: none has the power of them all."""
    ours = suspects(test=400)
    verdicts = []
    for given in (ours, without_labels(ours), without_labels(ours, np.arange(0, 400, 2))):
        found = audit(given, reference).document
        power = found["evidence"]["outputs"]["power"]["images_for_power"]
        verdicts.append((found["verdict"], power is not None))
    assert verdicts == [("not_member", True), ("not_member", True), ("no_verdict", False)]
    assert found["reasons"][0]["help"].startswith("give labels to all images, or use none")


def test_head_alone_sees_told_members_and_acquits_nobody(reference: Reference) -> None:
    only = {"told": None, "untold": None, "prediction": np.full(80, -1)}
    settings = Settings(evidence="head")
    found = audit(dataclasses.replace(suspects(member=80), **only), reference, settings)
    evidence = found.document["evidence"]
    assert found.document["verdict"] == "member"
    assert found.document["p_value"] == evidence["head"]["p_value"]
    assert not evidence["outputs"]["available"]
    assert evidence["outputs"]["why_not"]
    assert np.isnan(found.images["p_outputs"]).all()
    assert found.images["p_value"].tolist() == found.images["p_head"].tolist()
    found = audit(dataclasses.replace(suspects(test=80), **only), reference, settings)
    assert found.document["power"]["withheld"] is None
    assert codes(found) == ["underpowered"]
    assert "audit.evidence=both" in found.document["reasons"][0]["help"]


def test_outputs_alone_where_the_head_was_not_trained(reference: Reference) -> None:
    nothing = np.empty(0)
    untrained = dataclasses.replace(
        reference, mint_logit=np.full_like(reference.mint_logit, np.nan)
    )
    ours = suspects(withheld=120)
    ours = dataclasses.replace(ours, mint_logit=np.full(120, np.nan))
    found = audit(ours, untrained, calibration=nothing)
    evidence = found.document["evidence"]
    assert found.document["verdict"] == "member"
    assert found.document["p_value"] == evidence["outputs"]["p_value"]
    assert "lambda_mint" in evidence["head"]["why_not"]
    with pytest.raises(UserError, match="nothing to judge by"):
        audit(ours, untrained, Settings(evidence="head"), calibration=nothing)


def test_the_loss_where_too_few_images_are_known() -> None:
    reference = MODEL.reference(np.random.default_rng(0), calibration=200, member=6, withheld=3)
    ours = suspects(test=150)
    found = audit(ours, reference).document
    assert found["evidence"]["outputs"]["method"] == "loss"
    # All calibration images serve, as none is learnt from.
    assert found["evidence"]["outputs"]["calibration_images"] == 200
    assert found["power"] == {
        "target": 0.95,
        "of": "withheld",
        "member": None,
        "withheld": None,
    }
    assert found["verdict"] == "no_verdict"
    more = "a model with more calibration and withheld images"
    assert found["reasons"][0]["help"].startswith(more)  # all else was asked already
    (why,) = audit(without_labels(ours), reference).document["reasons"]
    assert why["help"].startswith("give the labels of the images") and more in why["help"]


def test_where_no_image_was_withheld_told_members_say_what_would_be_noticed() -> None:
    reference = MODEL.reference(np.random.default_rng(0), calibration=300, member=200, withheld=0)
    found = audit(suspects(test=60), reference).document
    assert (found["power"]["withheld"], found["power"]["of"]) == (None, "member")
    assert found["power"]["member"] < 60
    assert found["verdict"] == "not_member"


def test_what_is_not_finite_is_left_out(reference: Reference) -> None:
    ours = suspects(member=30, test=30)
    broken = {name: value.copy() for name, value in vars(ours.told).items()}
    broken["label_confidence"][:, :5] = np.nan
    finite = np.arange(60) >= 5
    found = audit(dataclasses.replace(ours, told=Outputs(**broken), finite=finite), reference)
    assert found.document["suspects"]["not_finite"] == 5
    assert found.document["suspects"]["unique"] == 55
    for name in ("p_value", "p_head", "p_outputs", "precision", "head_score"):
        assert np.isnan(found.images[name][:5]).all()
        assert np.isfinite(found.images[name][5:]).all()
    assert not found.images["flagged"][:5].any()
    assert found.document["evidence"]["head"]["images"] == 55
    nothing = audit(dataclasses.replace(ours, finite=np.zeros(60, bool)), reference)
    assert (codes(nothing), nothing.document["p_value"]) == (["no_images"], None)
    json.dumps(nothing.document, allow_nan=False)
    # Neither is a calibration image of which something is not.
    holes = {name: value.copy() for name, value in vars(reference.told).items()}
    holes["entropy"][1, :20] = np.inf
    with_holes = dataclasses.replace(reference, told=Outputs(**holes))
    calibration = audit(ours, with_holes).document["evidence"]["outputs"]["calibration_images"]
    assert calibration == 140


def test_nobody_is_accused_where_nothing_was_found(reference: Reference) -> None:
    found = audit(suspects(test=100), reference).document
    assert found["suspects"]["flagged"] == 0
    assert found["precision"]["at_threshold"]["value"] is None


def test_the_auc_of_the_head_is_that_of_its_logits(reference: Reference) -> None:
    found = audit(suspects(test=60), reference).document["evidence"]["head"]["auc"]
    for role in ("member", "withheld"):
        expected = auc(
            reference.mint_logit[reference.role == role], scores_of(reference), confidence=0.95
        )
        assert found[role] == pytest.approx(expected.as_dict())


def test_known_images_are_not_scored_by_a_fit_that_saw_them() -> None:
    """Where training leaves no trace, the outputs know nothing, however much is fitted."""
    model = Population(told=2.0, gain=0.0)
    areas = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        reference = model.reference(rng, calibration=40, member=20, withheld=20)
        found = judged(
            model.suspects(rng, test=60),
            reference,
            scores_of(reference),
            Settings(),
            confounders_clean=True,
        ).document
        areas.append(found["evidence"]["outputs"]["auc"]["withheld"]["value"])
    assert abs(np.mean(areas) - 0.5) < 3 * np.std(areas) / math.sqrt(12)
    assert np.mean(areas) < 0.57
    assert found["power"]["withheld"] is None
    assert found["share"]["by"] == "head"
    assert found["evidence"]["outputs"]["share"]["value"] is None


def test_two_scales_are_asked_at_the_price_of_two(reference: Reference) -> None:
    ours = suspects(test=80)
    mixed = without_labels(ours, np.arange(40))
    p = []
    for rows in (np.arange(40), np.arange(40, 80)):
        kept = {
            name: value.kept(rows) if isinstance(value, Outputs) else value[rows]
            for name, value in vars(mixed).items()
        }
        found = audit(Suspects(**kept), reference).document
        assert not found["classes"]["collection_within"]
        p.append(found["evidence"]["outputs"]["p_value"])
    found = audit(mixed, reference).document
    assert found["evidence"]["outputs"]["p_value"] == pytest.approx(min(1, 2 * min(p)))


def test_two_kinds_of_evidence_need_larger_collections(reference: Reference) -> None:
    ours = suspects(member=40)
    both = audit(ours, reference, Settings(alpha=0.01)).document["evidence"]
    head = audit(ours, reference, Settings(alpha=0.005, evidence="head")).document["evidence"]
    more = audit(ours, reference, Settings(alpha=0.01, evidence="head")).document["evidence"]
    needed = [each["head"]["power"]["images_for_power"] for each in (both, head, more)]
    assert needed[0] == needed[1] > needed[2]


def test_the_output_score_is_the_trained_output_attack(reference: Reference) -> None:
    """The same as `amint attack` measures, where both know the same images."""
    trained = reference.role != "calibration"
    drawn = np.random.default_rng(0).random(len(reference)) < 0.3
    known = reference.kept(drawn)
    evidence = AttackEvidence(
        sample_id=np.arange(len(reference)).astype(str),
        role=np.where(trained, "member", "calibration"),
        label=reference.label,
        outputs={PLAIN: reference.told},
        known=drawn,
    )
    expected = METHODS["output_attack"].score(evidence, PLAIN)
    score = fitted(known.told, known.role != "calibration")
    np.testing.assert_allclose(score(reference.told), expected, rtol=1e-9)


def test_the_document_is_plain_json(reference: Reference) -> None:
    found = audit(suspects(member=20, test=30), reference)
    text = json.dumps(found.document, allow_nan=False)
    assert json.loads(text) == found.document
    assert EXIT_CODES[found.document["verdict"]] == 3
    assert {len(column) for column in found.images.values()} == {50}
    assert math.isclose(found.document["power"]["target"], 0.95)


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 0.0), ("fdr", 1.0), ("prior", -1), ("evidence", "tails")]
)
def test_settings_that_mean_nothing_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        Settings(**{name: value})
