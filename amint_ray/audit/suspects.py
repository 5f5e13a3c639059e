"""What an audit is asked about, and how sure it has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from amint_ray.contracts import UserError
from amint_ray.evaluation.outputs import Floats, Outputs, Scores

Mask = npt.NDArray[np.bool_]
Whole = npt.NDArray[np.int64]

EvidenceChoice = Literal["both", "head"]
"""`head`: only the trunk up to the deepest tap was computed, so there are no outputs."""


@dataclass(frozen=True)
class Settings:
    """How sure an audit has to be.

    Attributes:
        alpha: largest chance to call a collection without training images `member`.
        fdr: largest expected share of images not trained on among those called members.
        prior: share of members among the suspects at which precision is stated.
        power: how surely a collection of training images has to be noticed before `not_member` is
            a verdict.
        confidence: of all intervals.
        evidence: what is looked at.
    """

    alpha: float = 0.01
    fdr: float = 0.05
    prior: float = 0.1
    power: float = 0.95
    confidence: float = 0.95
    evidence: EvidenceChoice = "both"

    def __post_init__(self) -> None:
        """Refuse what is no probability.

        Raises:
            UserError: a value is not between 0 and 1, or the evidence has another name.
        """
        for name in ("alpha", "fdr", "prior", "power", "confidence"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise UserError(f"audit: {name} is {value}; give a number between 0 and 1")
        if self.evidence not in ("both", "head"):
            raise UserError(f"audit: evidence is {self.evidence!r}; give both or head")


@dataclass(frozen=True)
class Suspects:
    """What the audited model says of n images that could be read. Whose they are, nobody knows.

    Attributes:
        content: (n,) of any type that sorts; equal where the decoded pixels are, at the model's
            input size.
        label: (n,) class indices; −1: none.
        prediction: (n,) the task's most likely class; −1 where only the head was asked.
        mint_logit: (n,) float64 of the MINT head; NaN where it was not trained.
        taps: (n, d) float32, as `Reference.taps`.
        finite: (n,) whether everything the model said is finite.
        told: outputs by the label where there is one; None where only the head was asked.
        untold: outputs by the prediction; None where only the head was asked.
    """

    content: npt.NDArray[Any]
    label: Whole
    prediction: Whole
    mint_logit: Scores
    taps: Floats
    finite: Mask
    told: Outputs | None = None
    untold: Outputs | None = None

    def __len__(self) -> int:
        return len(self.content)
