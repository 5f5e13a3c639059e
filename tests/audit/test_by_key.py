"""Audits by key: exact error rates on whatever images, and what is found of members."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from audit.audit_population import Population, scores_of
from audit.audits import document as unkeyed
from audit.audits import png
from audit.coded import BITS, CODE, reference, some, suspects
from audit.page import Page, read
from scipy.stats import binom, kstest

from amint_ray.audit.by_key import CodedSuspects, judge_by_key
from amint_ray.audit.report import extremes, render
from amint_ray.audit.suspects import Settings
from amint_ray.audit.verdict import Judgement, judge
from amint_ray.audit.yardstick import Yardstick
from amint_ray.evaluation.keyed import hard_p_values, soft_p_values
from amint_ray.evaluation.keyed_collection import collection_test, images_needed


@functools.cache
def known(memory: float = 2.0, members: int = 200) -> Any:
    return reference(np.random.default_rng(1), members=members, memory=memory)


def judged(
    asked: CodedSuspects, *, memory: float = 2.0, known_members: int = 200, **settings: Any
) -> Judgement:
    of = known(memory, known_members)
    return judge_by_key(asked, of, Settings(**settings), code=CODE, head="learned")


def test_without_members_p_values_are_uniform_and_no_collection_is_called_member_too_often() -> (
    None
):
    rng = np.random.default_rng(0)
    found = [judged(suspects(rng, members=0, others=30), known_members=5) for _ in range(400)]
    p = np.concatenate([each.images["p_value"] for each in found])
    assert kstest(p, "uniform").statistic < 2 / np.sqrt(len(p)) + 2.0**-BITS
    parts = [each.document["evidence"]["key"] for each in found]
    assert kstest([part["p_sum"] for part in parts], "uniform").pvalue > 0.01
    collection = np.array([each.document["p_value"] for each in found])
    for level in (0.01, 0.05, 0.2):
        assert (collection <= level).sum() <= binom.ppf(0.999, len(found), level)
    assert (collection <= 0.2).mean() > 0.1  # and not for want of trying
    called = sum(each.document["verdict"] == "member" for each in found)
    assert called <= binom.ppf(0.999, len(found), 0.01)


def test_a_wrong_key_finds_nothing() -> None:
    rng = np.random.default_rng(2)
    members = suspects(rng, members=300, others=0, key=b"right")
    assert judged(members).document["verdict"] == "member"
    other = suspects(np.random.default_rng(2), members=300, others=0, key=b"wrong")
    wrong = dataclasses.replace(members, code=other.code)
    assert (wrong.content == other.content).all()
    found = judged(wrong)
    assert found.document["verdict"] == "no_verdict"
    assert found.document["p_value"] > 0.05
    assert kstest(found.images["p_value"], "uniform").pvalue > 0.01


def test_images_that_are_marked_are_members_but_for_a_share() -> None:
    rng = np.random.default_rng(3)
    wrong, right = [], []
    for _ in range(100):
        flagged = judged(suspects(rng, members=20, others=80), known_members=5, fdr=0.2).images[
            "flagged"
        ]
        wrong.append(flagged[20:].sum() / max(1, flagged.sum()))
        right.append(flagged[:20].mean())
    # Of true nulls there are 0.8, so that the rate is 0.16 and not only below 0.2.
    assert 0.11 < np.mean(wrong) < 0.2
    assert np.mean(right) > 0.9


def test_what_is_found_of_a_mixed_collection() -> None:
    asked = suspects(np.random.default_rng(4), members=120, others=80)
    found = judged(dataclasses.replace(asked, label=np.arange(200) % 4 - 1))
    document, images = found.document, found.images
    assert document["verdict"] == "member"
    share = document["share"]
    assert share["low"] < 0.6 < share["high"]
    assert share["by"] == "key"
    evidence = document["evidence"]["key"]
    assert evidence["matched"] == images["key_matches"].sum()
    assert evidence["bits"] == 200 * BITS
    expected = collection_test(asked.logits, asked.code, [row.tobytes() for row in asked.content])
    assert (evidence["p_sum"], evidence["p_hard"]) == (expected.p_soft, expected.p_hard)
    assert evidence["p_image"] == 200 * images["p_key"].min()
    assert evidence["p_value"] == document["p_value"] == 2 * evidence["p_sum"]
    np.testing.assert_array_equal(images["p_key"], soft_p_values(asked.logits, asked.code))
    assert document["evidence"]["head"]["available"] is False
    assert "the key was asked" in document["evidence"]["outputs"]["why_not"]
    assert document["suspects"]["labelled"] == 150
    assert document["suspects"]["flagged"] == images["flagged"].sum() > 60


def test_a_few_members_among_many_strangers_are_noticed() -> None:
    """The sum does not; each of them is, and where they are too few for that it is said."""
    for others, verdict in ((200, "member"), (3000, "not_member")):
        asked = suspects(np.random.default_rng(14), members=3, others=others, memory=4.0)
        found = judge_by_key(asked, known(4.0), Settings(), code=CODE, head="fixed")
        assert found.document["evidence"]["key"]["p_sum"] > 0.01
        assert found.document["verdict"] == verdict
        assert found.images["flagged"][:3].all()
        told = [held["code"] for held in found.document["reservations"]]
        assert told == ([] if verdict == "member" else ["flagged"])


def test_precision_is_bayes_rule_with_the_p_value_as_the_others_rate() -> None:
    found = judged(suspects(np.random.default_rng(5), members=30, others=30), prior=0.02)
    of = known()
    taught = hard_p_values(of.code_matches["member"], BITS)
    for p, precision in zip(found.images["p_value"], found.images["precision"], strict=True):
        rate = np.mean(taught <= p * (1 + 1e-12))
        bayes = 0.02 * rate / (0.02 * rate + 0.98 * p) if rate else np.nan
        np.testing.assert_allclose(precision, bayes)
    at = found.document["precision"]["at_threshold"]
    last = found.images["p_value"][found.images["flagged"]].argmax()
    assert at["value"] == found.images["precision"][found.images["flagged"]][last]
    assert at["low"] < at["value"] < at["high"]


def test_copies_count_once_and_share_what_is_found() -> None:
    rng = np.random.default_rng(6)
    one = suspects(rng, members=1, others=1)
    many = some(one, np.array([0, *[1] * 500, 0]))
    noise = rng.normal(size=many.logits.shape) * 0.1  # as of near-duplicates that share a code
    found = judged(dataclasses.replace(many, logits=many.logits + noise))
    means = [(many.logits + noise)[rows].mean(0) for rows in ([0, 501], list(range(1, 501)))]
    alone = judged(dataclasses.replace(one, logits=np.stack(means)))
    assert found.document["p_value"] == alone.document["p_value"]
    assert found.document["suspects"]["unique"] == 2
    assert len(set(found.images["p_value"][1:501])) == 1
    assert found.images["duplicate_of"].tolist() == [-1, -1, *[1] * 499, 0]
    np.testing.assert_allclose(found.images["p_value"][[0, 1]], alone.images["p_value"])


def test_a_collection_that_is_too_small_acquits_nobody() -> None:
    """Where a single image says little, the size that is stated is what it takes."""
    rng, memory = np.random.default_rng(7), 0.3
    small = judged(suspects(rng, members=0, others=2), memory=memory)
    needed = small.document["power"]["member"]
    assert 5 < needed < 200
    assert small.document["power"]["withheld"] is None
    assert small.document["verdict"] == "no_verdict"
    codes = [reason["code"] for reason in small.document["reasons"]]
    assert codes == ["underpowered", "withheld_from_head"]
    assert f"{needed} whose codes" in small.document["reasons"][0]["text"]
    matched = known(memory).code_matches["member"]
    right = (np.arange(BITS) < matched[:, None]).astype(int)
    assert needed == images_needed(np.ones(right.shape), right, p=0.005, power=0.95)
    strangers = suspects(rng, members=0, others=needed)
    # Of what was withheld from a learned head nothing would be noticed, however much there is.
    (why,) = judged(strangers, memory=memory).document["reasons"]
    assert why["code"] == "withheld_from_head"
    of_members = {"member": known(memory).code_matches["member"]}
    told_all = dataclasses.replace(known(memory), code_matches=of_members)
    enough = judge_by_key(strangers, told_all, Settings(), code=CODE, head="learned")
    assert enough.document["verdict"] == "not_member"
    (held,) = enough.document["reservations"]
    assert held["code"] == "withheld_from_head"
    noticed = 0
    for _ in range(200):
        asked = suspects(rng, members=needed, others=0, memory=memory)
        contents = [row.tobytes() for row in asked.content]
        noticed += collection_test(asked.logits, asked.code, contents).p_value <= 0.01
    assert noticed >= binom.ppf(0.001, 200, 0.95)


def test_a_fixed_head_marks_what_was_withheld_too() -> None:
    asked = suspects(np.random.default_rng(8), members=0, others=5)
    found = judge_by_key(asked, known(), Settings(), code=CODE, head="fixed")
    power = found.document["power"]
    assert power["withheld"] == power["member"] is not None
    assert "withheld from the head" not in found.document["evidence"]["key"]["cannot_show"]
    assert found.document["verdict"] == "not_member"
    assert found.document["reservations"] == []
    # Withheld images that are remembered less make known ones fewer bits right, and shares larger.
    rng = np.random.default_rng(16)
    told = suspects(rng, members=100, others=100, memory=1.0)
    less = {**known(1.0).code_matches, "withheld": known(0.3).code_matches["withheld"]}
    of = dataclasses.replace(known(1.0), code_matches=less)
    fixed, learned = (
        judge_by_key(told, of, Settings(), code=CODE, head=head).document["share"]["value"]
        for head in ("fixed", "learned")
    )
    assert learned == pytest.approx(0.5, abs=0.1)
    assert fixed > learned + 0.1


def test_nothing_is_said_where_nothing_could_be_asked() -> None:
    asked = suspects(np.random.default_rng(9), members=3, others=0)
    asked.logits[:] = np.nan
    found = judged(asked)
    assert found.document["verdict"] == "no_verdict"
    assert found.document["p_value"] is None
    assert [reason["code"] for reason in found.document["reasons"]] == ["no_images"]
    assert found.document["suspects"]["not_finite"] == 3
    assert np.isnan(found.images["p_value"]).all()
    assert not found.images["flagged"].any()
    assert "no image could be asked" in page_of(found).text


def test_few_known_members_promise_no_power() -> None:
    found = judged(suspects(np.random.default_rng(10), members=0, others=50), known_members=5)
    assert found.document["power"]["member"] is None
    assert found.document["verdict"] == "no_verdict"
    assert "no size is known" in found.document["reasons"][0]["text"]


def test_the_document_is_that_of_any_audit() -> None:
    rng = np.random.default_rng(11)
    population = Population()
    of = population.reference(rng, calibration=60, member=20, withheld=20)
    yardstick = Yardstick(of)
    plain = judge(
        yardstick.measure(population.suspects(rng, member=10)),
        yardstick,
        scores_of(of),
        Settings(),
        confounders_clean=True,
        codes_alone=True,
    )
    found = judged(suspects(rng, members=5, others=5))
    assert found.document.keys() == plain.document.keys()
    assert found.images.keys() == plain.images.keys()
    assert found.document["suspects"].keys() == plain.document["suspects"].keys()
    assert found.document["evidence"].keys() == {*plain.document["evidence"], "key"}
    # Without the key the head is silent, and not because it was not trained.
    assert "without their key" in plain.document["evidence"]["head"]["why_not"]


def page_of(found: Judgement, **changes: Any) -> Page:
    """The report of what was found, with everything else as in any audit."""
    rows = found.images
    images = [
        {
            "image": f"{i}.png",
            "class_name": None,
            "decision": "member" if rows["flagged"][i] else "undecided",
            "problem": None,
            **dict.fromkeys(("label", "head_score", "outputs_score", "p_head", "p_outputs")),
            **{
                name: None if np.isnan(rows[name][i]) else rows[name][i].item()
                for name in ("prediction", "p_value", "p_key", "key_matches", "precision")
            },
            "duplicate_of": None,
        }
        for i in range(len(rows["label"]))
    ]
    shell = unkeyed()
    counts = {"source": "suspects", "images": len(images), "unreadable": 0}
    audit = {
        **shell,
        **found.document,
        "suspects": {**counts, **found.document["suspects"]},
        "images": images,
        **changes,
    }
    audit["lines"] = shell["lines"]
    shown = {image["image"]: png() for part in extremes(images) for image in part}
    return read(render(audit, shown, digests={"audit.json": "d" * 64}))


@pytest.mark.parametrize("code_from", ["content", "perceptual"])
@pytest.mark.parametrize("members", [60, 0])
def test_the_report_explains_the_key_in_five_sentences(members: int, code_from: Any) -> None:
    asked = suspects(np.random.default_rng(12), members=members, others=60 - members)
    code = dataclasses.replace(CODE, code_from=code_from)
    found = judge_by_key(asked, known(), Settings(), code=code, head="learned")
    page = page_of(found)
    assert page.errors == []
    (five,) = [e for e in page.all("ol") if e.attributes.get("class") == "key"]
    sentences = five.text.strip().split(".\n")
    assert len(sentences) == 5
    evidence = found.document["evidence"]["key"]
    for sentence, words in zip(
        sentences,
        (
            f"secret random code of {BITS}\u00a0bits",
            "trained to recall the code",
            f"guessing {BITS}\u00a0coin flips, whatever the image shows",
            f"Here {evidence['matched']:,} of 960\u00a0bits match",
            "was published before training",
        ),
        strict=True,
    ):
        assert words in sentence
    assert ("near-duplicates share" in sentences[4]) == (code_from == "perceptual")
    assert "withheld from the head" in sentences[4]
    assert "alibration image" not in page.text  # none is compared with
    assert "--key-file=KEY_FILE" in page.text
    headings = [e.text for e in page.all("th")]
    assert f"Bits that match, of {BITS}" in headings
    assert "Outputs, score" not in headings
    assert CODE.fingerprint in page.text
