"""The verdict of whoever has the key: read `judge_by_key`.

The codes of images that were not trained on are coin flips (`evaluation/keyed.py`), so nothing is
compared with calibration images, and it does not matter what the suspects show or where they are
from. NumPy and SciPy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from amint_ray.audit import words_by_key as words
from amint_ray.audit.collection import telling
from amint_ray.audit.output_scores import FEWEST_KNOWN
from amint_ray.audit.suspects import Settings, Whole
from amint_ray.audit.verdict import Judgement
from amint_ray.audit.words import CANNOT_SHOW, SHOWS, reason
from amint_ray.contracts import Role
from amint_ray.evaluation.calibration import benjamini_hochberg
from amint_ray.evaluation.keyed import hard_p_values, matches, soft_p_values
from amint_ray.evaluation.keyed_collection import (
    Collection,
    collection_test,
    images_needed,
    share_of_members,
)
from amint_ray.evaluation.keyed_rates import match_rate
from amint_ray.evaluation.metrics import Interval, proportion
from amint_ray.evaluation.outputs import Scores
from amint_ray.evaluation.reference import Reference
from amint_ray.tracking.folder import Code

Head = Literal["learned", "fixed"]


@dataclass(frozen=True)
class CodedSuspects:
    """What a model says of the codes of n images that could be read, and what the codes are.

    Attributes:
        content: (n, bytes) uint8, what each code is made from; images that share it are one image.
        logits: (n, k) of the codes.
        code: (n, k) of 0 and 1.
        label: (n,) class indices; −1: none.
        prediction: (n,) the task's most likely class; −1: it was not asked.
    """

    content: npt.NDArray[np.uint8]
    logits: Scores
    code: npt.NDArray[np.uint8]
    label: Whole
    prediction: Whole


@dataclass(frozen=True)
class _Different:
    """The different images of a collection, in the order of their contents.

    Of images that share a code the mean of their logits counts, as in `collection_test`.

    Attributes:
        rows: (f,) suspects of which the model said something finite.
        image: (f,) which of the u different images each of these is.
        first: (u,) the first suspect of each.
        logits: (u, k).
        code: (u, k).
    """

    rows: Whole
    image: Whole
    first: Whole
    logits: Scores
    code: npt.NDArray[np.uint8]


def judge_by_key(
    suspects: CodedSuspects,
    reference: Reference,
    settings: Settings,
    *,
    code: Code,
    head: Head,
    lines: Mapping[str, Any] | None = None,
) -> Judgement:
    """The verdict on a collection and on each image of it, by their codes alone.

    Args:
        suspects: n images.
        reference: how many bits of known images' codes the model says.
        settings: how sure to be; `evidence` does not matter.
        code: what the codes are.
        head: what says them.
        lines: figures of the model that the document shows as they are.
    """
    different = _different(suspects)
    matched = matches(different.logits, different.code)
    p = soft_p_values(different.logits, different.code)
    flagged = benjamini_hochberg(p, settings.fdr)
    known = _known(reference)
    taught = known["member"]
    if head == "fixed":  # which marks whatever trained the classifier
        taught = np.concatenate([taught, known["withheld"]])
    found = _collection(suspects, different)
    needed = {
        "member": _needed(known["member"], code.bits, settings),
        "withheld": _needed(known["withheld"], code.bits, settings) if head == "fixed" else None,
    }
    reasons = _reasons(found, needed["member"], len(known["member"]), settings)
    unnoticed = head == "learned" and found is not None and found.p_value > settings.alpha
    if unnoticed and len(known["withheld"]):
        reasons.append(words.WITHHELD)
    if reasons or found is None:
        verdict = "no_verdict"
    else:
        verdict = "member" if found.p_value <= settings.alpha else "not_member"
    reservations = [words.NEVER_TAUGHT] if unnoticed and verdict == "not_member" else []
    if verdict == "not_member" and flagged.any():
        reservations.append(reason("flagged", flagged=int(flagged.sum()), fdr=settings.fdr))
    share = telling(
        share_of_members(matched, taught, bits=code.bits, confidence=settings.confidence)
    )
    told = share.value is not None
    known_p = np.sort(hard_p_values(taught, code.bits))
    document = {
        "verdict": verdict,
        "p_value": None if found is None else found.p_value,
        **{name: getattr(settings, name) for name in ("alpha", "fdr", "prior", "confidence")},
        "reasons": reasons,
        "reservations": reservations,
        "share": {
            **share.as_dict(),
            "of": words.SHARE_OF if told else None,
            "by": "key" if told else None,
        },
        "suspects": {
            "unique": len(matched),
            "not_finite": len(suspects.label) - len(different.rows),
            "labelled": int((suspects.label >= 0).sum()),
            "flagged": int(flagged.sum()),
        },
        "evidence": {
            "key": {
                **_part(found, matched, known, code, head, settings),
                "share": {**share.as_dict(), "of": words.SHARE_OF},
                "power": {"images_for_power": needed["member"], "of": Role.MEMBER.value},
            },
            **{name: _not_asked(name) for name in ("head", "outputs")},
        },
        "power": {"target": settings.power, "of": Role.MEMBER.value, **needed},
        "unlike": None,
        "classes": None,
        "lines": dict(lines or {}),
        "precision": {
            "prior": settings.prior,
            "at_threshold": _precision_at_threshold(p[flagged], known_p, settings).as_dict(),
        },
    }
    by_image = {
        "key_matches": matched,
        "p_value": p,
        "p_key": p,
        "precision": _precision(p, known_p, settings.prior),
        "flagged": flagged,
    }
    return Judgement(document, _every(suspects, different, by_image))


def _different(suspects: CodedSuspects) -> _Different:
    rows = np.flatnonzero(np.isfinite(suspects.logits).all(axis=1))
    _, first, image = np.unique(
        suspects.content[rows], axis=0, return_index=True, return_inverse=True
    )
    image = image.reshape(-1)
    sums = np.zeros((len(first), suspects.logits.shape[1]))
    np.add.at(sums, image, suspects.logits[rows])
    times = np.bincount(image, minlength=len(first))
    first = rows[first]
    return _Different(rows, image, first, sums / times[:, None], suspects.code[first])


def _collection(suspects: CodedSuspects, different: _Different) -> Collection | None:
    if len(different.first) == 0:
        return None
    contents = [row.tobytes() for row in suspects.content[different.first]]
    return collection_test(different.logits, different.code, contents)


def _known(reference: Reference) -> dict[str, Whole]:
    """By role, right bits of the known images."""
    found, none = reference.code_matches or {}, np.empty(0, np.int64)
    return {role.value: found.get(role.value, none) for role in (Role.MEMBER, Role.WITHHELD)}


def _needed(matched: Whole, bits: int, settings: Settings) -> int | None:
    """The smallest collection of such images that would be noticed; of codes all bits weigh alike.

    How sure the model was of each bit of a known image is not kept. By the sum of all matches,
    which has half of α.
    """
    if len(matched) < FEWEST_KNOWN:
        return None
    right = (np.arange(bits) < matched[:, None]).astype(np.int64)
    return images_needed(np.ones(right.shape), right, p=settings.alpha / 2, power=settings.power)


def _reasons(
    found: Collection | None, needed: int | None, known: int, settings: Settings
) -> list[dict[str, str]]:
    """Why there is no verdict; none where there is one."""
    if found is None:
        return [reason("no_images")]
    powered = needed is not None and found.images >= needed
    if found.p_value <= settings.alpha or powered:
        return []
    return [
        words.underpowered(images=found.images, needed=needed, known=known, power=settings.power)
    ]


def _part(
    found: Collection | None,
    matched: Whole,
    known: Mapping[str, Whole],
    code: Code,
    head: Head,
    settings: Settings,
) -> dict[str, Any]:
    def rate(of: Whole) -> dict[str, Any]:
        return match_rate(of, bits=code.bits, confidence=settings.confidence).as_dict()

    return {
        "available": True,
        "why_not": None,
        "method": words.METHOD,
        "p_value": None if found is None else found.p_value,
        "p_sum": None if found is None else found.p_soft,
        "p_image": None if found is None else found.p_image,
        "p_hard": None if found is None else found.p_hard,
        "images": len(matched),
        "matched": int(matched.sum()),
        "bits": len(matched) * code.bits,
        "bits_per_image": code.bits,
        "match_rate": rate(matched),
        "known_match_rate": {role: rate(of) for role, of in known.items()},
        "head": head,
        "code_from": code.code_from,
        "key_fingerprint": code.fingerprint,
        "shows": words.SHOWS,
        "cannot_show": words.cannot_show(head=head, code_from=code.code_from),
    }


def _not_asked(name: str) -> dict[str, Any]:
    return {
        "available": False,
        "why_not": words.KEY_ASKED,
        "shows": SHOWS[name],
        "cannot_show": CANNOT_SHOW[name],
    }


def _true_positives(p: Scores, known_p: Scores) -> npt.NDArray[np.int64]:
    """How many known images have so small a p-value, by the number of their right bits.

    Weights, which are not kept of known images, make p-values of remembered images smaller, as a
    rule, so that these are rather too few.
    """
    found: npt.NDArray[np.int64] = np.searchsorted(known_p, p * (1 + 1e-12), side="right")
    return found


def _precision(p: Scores, known_p: Scores, prior: float) -> Scores:
    """(u,) share of members among images with so small a p-value, which is the others' rate itself.

    NaN where no known image has so small a one.
    """
    hits = prior * _true_positives(p, known_p) / max(1, len(known_p))
    found: Scores = np.where(hits > 0, hits / (hits + (1 - prior) * p), np.nan)
    return found


def _precision_at_threshold(flagged_p: Scores, known_p: Scores, settings: Settings) -> Interval:
    """The same at the largest p-value that was called a member's, with its interval."""
    if len(flagged_p) == 0:
        return Interval.unknown("no image is called a member")
    threshold = flagged_p.max()
    hits = int(_true_positives(threshold, known_p))
    tpr = proportion(hits, len(known_p), confidence=settings.confidence)
    if tpr.value is None or tpr.low is None or tpr.high is None or hits == 0:
        return Interval.unknown("no known member has so small a p-value")

    def precision(rate: float) -> float:
        found = settings.prior * rate
        return float(found / (found + (1 - settings.prior) * threshold))

    return Interval(precision(tpr.value), precision(tpr.low), precision(tpr.high))


def _every(
    suspects: CodedSuspects, different: _Different, by_image: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """A row a suspect: those that share a code share what was found."""
    n = len(suspects.label)
    nothing = np.full(n, np.nan)
    originals = np.full(n, -1, np.int64)
    originals[different.rows] = different.first[different.image]
    images: dict[str, npt.NDArray[Any]] = {
        "label": suspects.label,
        "prediction": suspects.prediction,
        **dict.fromkeys(("head_score", "outputs_score", "p_head", "p_outputs"), nothing),
        "duplicate_of": np.where(originals == np.arange(n), -1, originals),
    }
    for name, values in by_image.items():
        none = -1 if name == "key_matches" else False if name == "flagged" else np.nan
        images[name] = np.full(n, none, values.dtype)
        images[name][different.rows] = values[different.image]
    return images
