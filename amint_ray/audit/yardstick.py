"""What suspects are measured by, and what an audit keeps of each: a few numbers.

An audit may be asked about millions of images. What the model says of one is a hundred times what
is needed once its score and its place are known, so suspects are measured as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.audit.likeness import Surroundings
from amint_ray.audit.output_scores import FEWEST_KNOWN, Score, fitted, loss, parts
from amint_ray.audit.suspects import Mask, Suspects, Whole
from amint_ray.contracts import Role
from amint_ray.evaluation.outputs import Outputs, Scores
from amint_ray.evaluation.reference import Reference

_FOLDS = 5
"""A known image is scored by a fit to the other four parts of the known images."""


@dataclass(frozen=True)
class Measured:
    """What is kept of n suspects.

    Attributes:
        content: (n,) of any type that sorts; equal where the decoded pixels are, at the model's
            input size.
        label: (n,) class indices; −1: none.
        prediction: (n,) the task's most likely class; −1 where only the head was asked.
        mint_logit: (n,) of the MINT head; NaN where it was not trained, or says nothing.
        outputs: (n,) score of the outputs, by `Yardstick.scale` with the label or without; None
            where only the head was asked.
        distance: (n,) of the activations to the nearest calibration image's.
        finite: (n,) whether everything the model said is finite.
    """

    content: npt.NDArray[Any]
    label: Whole
    prediction: Whole
    mint_logit: Scores
    outputs: Scores | None
    distance: Scores
    finite: Mask

    def __len__(self) -> int:
        return len(self.content)

    def duplicate_of(self) -> Whole:
        """(n,) the first row with the same content where that is another one; −1: it is the first.

        Ten thousand copies of an image are one image: they count once, and share its decision.
        """
        _, first, inverse = np.unique(self.content, return_index=True, return_inverse=True)
        original = first[inverse].astype(np.int64)
        return np.where(original == np.arange(len(self)), -1, original)


def append(measured: Sequence[Measured]) -> Measured:
    """The rows of several, one after another; all were asked for the same."""
    columns: dict[str, Any] = {}
    for field in fields(Measured):
        values = [getattr(part, field.name) for part in measured]
        columns[field.name] = None if values[0] is None else np.concatenate(values)
    return Measured(**columns)


@dataclass(frozen=True)
class Scored:
    """Some known images, and the calibration images to compare them with, scored alike.

    Attributes:
        rows: which of the known images.
        known: their scores.
        compared: which rows of the reference the calibration images are.
        level: their scores.
    """

    rows: Whole
    known: Scores
    compared: Whole
    level: Scores


@dataclass(frozen=True)
class OutputScale:
    """How outputs become scores.

    Attributes:
        by: gives the scores.
        method: its name.
        final: what suspects are compared with.
        folds: how the known images are scored; all of these once.
    """

    by: Score
    method: str
    final: Scored
    folds: Sequence[Scored]


def known_rows(reference: Reference) -> Mask:
    """(r,) the reference's rows that trained the model."""
    among: Mask = np.isin(reference.role, [Role.MEMBER.value, Role.WITHHELD.value])
    return among


class Yardstick:
    """All that a model's reference says of how to measure suspects; no suspect changes it."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.surroundings = Surroundings(
            reference.taps[reference.role == Role.CALIBRATION.value],
        )

    def measure(self, suspects: Suspects) -> Measured:
        """What is kept of these; which others there are makes no difference."""
        outputs = None
        if suspects.told is not None and suspects.untold is not None:
            outputs = np.full(len(suspects), np.nan)
            labelled = suspects.label >= 0
            for has_label, seen in ((True, suspects.told), (False, suspects.untold)):
                rows = np.flatnonzero((labelled == has_label) & suspects.finite)
                if len(rows):
                    outputs[rows] = self.scale(labelled=has_label).by(seen.kept(rows))
        return Measured(
            content=suspects.content,
            label=suspects.label,
            prediction=suspects.prediction,
            mint_logit=suspects.mint_logit,
            outputs=outputs,
            distance=self.surroundings.distance(suspects.taps),
            finite=suspects.finite,
        )

    def scale(self, *, labelled: bool) -> OutputScale:
        """Of images with a label, or of those by the model's own prediction; fitted when needed."""
        return self._told if labelled else self._untold

    @cached_property
    def _told(self) -> OutputScale:
        return self._fit(self.reference.told)

    @cached_property
    def _untold(self) -> OutputScale:
        return self._fit(self.reference.untold)

    def _fit(self, outputs: Outputs) -> OutputScale:
        """Fitted to the known images where there are enough of them, else the loss.

        The fit sees one half of the calibration images; suspects are compared with the other.
        """
        known = np.flatnonzero(known_rows(self.reference))
        of_calibration = self.reference.role == Role.CALIBRATION.value
        calibration = np.flatnonzero(of_calibration & outputs.finite())
        half = parts(len(calibration), 2)
        learnt, held = calibration[half == 0], calibration[half == 1]

        def scored(by: Score, some: Whole, compared: Whole) -> Scored:
            return Scored(some, by(outputs.kept(known[some])), compared, by(outputs.kept(compared)))

        if min(int(outputs.finite()[known].sum()), len(learnt)) < FEWEST_KNOWN:
            final = scored(loss, np.arange(len(known)), calibration)
            return OutputScale(loss, "loss", final, [final])

        def fit(some: Whole) -> Score:
            seen = np.concatenate([known[some], learnt])
            return fitted(outputs.kept(seen), np.arange(len(seen)) < len(some))

        everyone, fold = np.arange(len(known)), parts(len(known), _FOLDS)
        by = fit(everyone)
        folds = [scored(fit(everyone[fold != i]), everyone[fold == i], held) for i in range(_FOLDS)]
        return OutputScale(by, "trained output attack", scored(by, everyone[:0], held), folds)
