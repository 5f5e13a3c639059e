"""The two kinds of evidence: what the MINT head says, and what the model's outputs give away.

Either gives each suspect a score and a place among calibration images that were neither trained on
nor used to make the score, and a place to known images that did train the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from amint_ray.audit.ranks import Sample, place, rank_test
from amint_ray.audit.suspects import Mask, Whole
from amint_ray.audit.yardstick import Measured, Scored, Yardstick, known_rows
from amint_ray.contracts import Role
from amint_ray.evaluation.metrics import Interval, auc_of_shares, share_below
from amint_ray.evaluation.outputs import Scores
from amint_ray.evaluation.reference import Reference

Labels = Literal["own", "prediction", "mixed"]


@dataclass(frozen=True)
class Within:
    """Classes to compare within; of no use where the collection's are the calibration's.

    Attributes:
        suspects: (n,) classes of the suspects.
        reference: (r,) classes of the reference's rows, found in the same way.
        collection: whether the collection is compared within classes.
        image: whether an image is.
    """

    suspects: Whole
    reference: Whole
    collection: bool
    image: bool


@dataclass(frozen=True)
class Evidence:
    """One kind of evidence about n suspects, and what is known of it.

    Attributes:
        name: `head` or `outputs`.
        method: what makes the score.
        labels: whose labels the score reads; None: it reads none.
        score: (n,) larger means "more likely trained on"; NaN where there is none.
        p: (n,) conformal p-values; NaN where there is no score.
        p_value: of the collection; None where nothing could be compared.
        mean_share: over the collection, of the share of calibration images below.
        compared: images of the collection that were compared with calibration images.
        calibration: how many calibration images these are, or as many as would give the same
            sampling error.
        fewest: calibration images that a p-value comes from.
        known_role: (k,) roles of the reference's trained images.
        known_share: (k,) the share of calibration images below each.
        known_p: (k,) its p-value.
        auc: by role, of those images against calibration.
    """

    name: str
    method: str
    labels: Labels | None
    score: Scores
    p: Scores
    p_value: float | None
    mean_share: float
    compared: int
    calibration: float
    fewest: int
    known_role: npt.NDArray[np.str_]
    known_share: Scores
    known_p: Scores
    auc: dict[str, Interval]

    def shares(self, *roles: Role) -> Scores:
        """Shares of calibration images below the known images of these roles."""
        rows = np.isin(self.known_role, [role.value for role in roles])
        found: Scores = self.known_share[rows & np.isfinite(self.known_share)]
        return found


@dataclass(frozen=True)
class _Scored:
    """Images scored alike: some known ones, and the calibration images to compare with.

    Attributes:
        rows: which of the known images.
        known: their scores.
        everybody: (m,) scores of all calibration images.
        within: (c,) scores of those whose class is known.
        classes: (c,) their classes.
    """

    rows: Whole
    known: Scores
    everybody: Scores
    within: Scores
    classes: Whole

    def beside(self, score: Scores, classes: Whole, *, by_class: bool) -> tuple[Sample, Sample]:
        """Other images with this score and what they are compared with."""
        if by_class:
            return Sample(score, classes), Sample(self.within, self.classes)
        return Sample.unstratified(score), Sample.unstratified(self.everybody)


def head_evidence(
    suspects: Measured,
    unique: Mask,
    reference: Reference,
    calibration: Scores,
    *,
    within: Within,
    confidence: float,
) -> Evidence:
    """By the MINT logit alone.

    Args:
        suspects: n images.
        unique: (n,) the rows that make the collection.
        reference: images of known roles.
        calibration: MINT logits of all calibration images.
        within: classes.
        confidence: of intervals.
    """
    known = known_rows(reference)
    rows = (reference.role == Role.CALIBRATION.value) & np.isfinite(reference.mint_logit)
    scored = _Scored(
        rows=np.arange(known.sum()),
        known=reference.mint_logit[known],
        everybody=calibration,
        within=reference.mint_logit[rows],
        classes=within.reference[rows],
    )
    score = np.where(suspects.finite, suspects.mint_logit, np.nan)
    group = _Group(np.ones(len(suspects), np.bool_), score, scored, [scored])
    return _evidence(
        [group], "head", "MINT logit", None, unique, reference, within, confidence=confidence
    )


def output_evidence(
    suspects: Measured,
    unique: Mask,
    yardstick: Yardstick,
    *,
    within: Within,
    confidence: float,
) -> Evidence:
    """By the outputs: with the labels of the suspects that have some, without for the others.

    Args:
        suspects: n images, with a score of their outputs.
        unique: (n,) the rows that make the collection.
        yardstick: what they were measured by.
        within: classes.
        confidence: of intervals.
    """
    assert suspects.outputs is not None
    labelled = suspects.label >= 0
    groups, method = [], ""
    for has_label in (True, False):
        rows = labelled == has_label
        if rows.any():
            scale = yardstick.scale(labelled=has_label)
            method = scale.method
            final, *folds = (_on(scale.final, within), *(_on(f, within) for f in scale.folds))
            score = np.where(rows & suspects.finite, suspects.outputs, np.nan)
            groups.append(_Group(rows, score, final, folds))
    labels: Labels = "own" if labelled.all() else "mixed" if labelled.any() else "prediction"
    return _evidence(
        groups,
        "outputs",
        method,
        labels,
        unique,
        yardstick.reference,
        within,
        confidence=confidence,
    )


def _on(scored: Scored, within: Within) -> _Scored:
    """With the classes of the calibration images."""
    classes = within.reference[scored.compared]
    return _Scored(scored.rows, scored.known, scored.level, scored.level, classes)


@dataclass(frozen=True)
class _Group:
    """Suspects that are scored alike.

    Attributes:
        rows: (n,) which of all suspects.
        score: (n,) NaN elsewhere.
        final: how they are scored, and with what they are compared.
        folds: how the known images are; all of these once.
    """

    rows: Mask
    score: Scores
    final: _Scored
    folds: Sequence[_Scored]


def _evidence(
    groups: Sequence[_Group],
    name: str,
    method: str,
    labels: Labels | None,
    unique: Mask,
    reference: Reference,
    within: Within,
    *,
    confidence: float,
) -> Evidence:
    """Scores, tests and known images of all groups put together."""
    n = len(unique)
    score, p = np.full(n, np.nan), np.full(n, np.nan)
    tests = []
    for group in groups:
        scored = np.isfinite(group.score)
        score[scored] = group.score[scored]
        some, beside = group.final.beside(
            score[scored], within.suspects[scored], by_class=within.image
        )
        p[scored] = place(some, beside).p
        asked = scored & unique
        tests.append(
            rank_test(
                *group.final.beside(
                    score[asked], within.suspects[asked], by_class=within.collection
                )
            )
        )
    found = [test.p_value for test in tests if test.p_value is not None]
    compared = sum(test.compared for test in tests)
    weights = np.array([test.compared / max(1, compared) for test in tests])
    share, known_p, areas = _of_known(groups, weights, reference, within, confidence=confidence)
    return Evidence(
        name=name,
        method=method,
        labels=labels,
        score=score,
        p=p,
        # Two scales cannot be ranked together; whichever speaks, at the price of having asked both.
        p_value=min(1.0, len(found) * min(found)) if found else None,
        mean_share=math.fsum(
            weight * test.mean_share
            for weight, test in zip(weights.tolist(), tests, strict=True)
            if test.compared
        ),
        compared=compared,
        calibration=min((test.calibration for test in tests if test.compared), default=0.0),
        fewest=min(_fewest(group, within) for group in groups),
        known_role=reference.role[known_rows(reference)],
        known_share=share,
        known_p=known_p,
        auc=areas,
    )


def _fewest(group: _Group, within: Within) -> int:
    """Calibration images that a p-value of the group's images comes from, at the least."""
    if not within.image:
        return len(group.final.everybody)
    asked = np.unique(within.suspects[np.isfinite(group.score)])
    there, counts = np.unique(group.final.classes, return_counts=True)
    return int(counts[np.isin(there, asked)].min(initial=len(group.final.classes)))


def _of_known(
    groups: Sequence[_Group],
    weights: Scores,
    reference: Reference,
    within: Within,
    *,
    confidence: float,
) -> tuple[Scores, Scores, dict[str, Interval]]:
    """Shares and p-values of the known images, and the AUC of either role.

    Where there are two groups, a known image counts as one of either, at random, in proportion.
    """
    rows = known_rows(reference)
    role, classes = reference.role[rows], within.reference[rows]
    k = len(role)
    drawn = np.random.default_rng(0).random(k)
    edges = np.concatenate([[0.0], weights.cumsum()]) if weights.sum() else np.array([0.0, 1.0])
    edges[-1] = 1.0
    share, p, level = np.full(k, np.nan), np.full(k, np.nan), np.full(k, np.nan)
    over: dict[str, Scores] = {}
    for i, group in enumerate(groups[: len(edges) - 1]):
        mine = (drawn >= edges[i]) & (drawn < edges[i + 1])
        for fold in group.folds:
            at = np.isfinite(fold.known)
            some, values = fold.rows[at], fold.known[at]
            plain = place(*fold.beside(values, classes[some], by_class=False))
            collection = place(*fold.beside(values, classes[some], by_class=within.collection))
            image = place(*fold.beside(values, classes[some], by_class=within.image))
            for target, source in (
                (level, plain.share),
                (share, collection.share),
                (p, image.p),
            ):
                target[some[mine[some]]] = source[mine[some]]
            for each in (Role.MEMBER.value, Role.WITHHELD.value):
                ours = values[role[some] == each]
                total = max(1, int((role == each).sum()))
                if len(ours):
                    above = 1 - share_below(fold.everybody, ours)
                    weight = (edges[i + 1] - edges[i]) * len(ours) / total
                    over[each] = over.get(each, 0.0) + weight * above
    areas = {
        each: auc_of_shares(
            level[(role == each) & np.isfinite(level)],
            over.get(each, np.empty(0)),
            confidence=confidence,
        )
        for each in (Role.MEMBER.value, Role.WITHHELD.value)
    }
    return share, p, areas
