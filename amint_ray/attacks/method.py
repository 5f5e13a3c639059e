"""What all attacks have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from amint_ray.attacks.evidence import PLAIN, Evidence
from amint_ray.contracts import RunError
from amint_ray.evaluation.outputs import Scores


@dataclass(frozen=True)
class Method:
    """One attack.

    Attributes:
        name: as on the command line and in tables.
        title: as in pictures.
        source: who proposed it, and where.
        score: (evidence, edit) → (n,) scores of the samples after that edit; larger: more likely
            trained on. NaN: not scored. To be called where `evidence.lacks(needs, edit)` is None.
        needs: what of the evidence it reads beside the outputs: some of `mint`, `passive`,
            `shadows`, `snapshots`, `listed`, `blind`.
        inside: shadow models that must have trained on an image for it to be scored.
        outside: the same of those that must not.
        reads_suspect: whether an edit of the suspect changes what it reads.
        fitted: whether it learns from the `known` samples, and must not be measured on them.
    """

    name: str
    title: str
    source: str
    score: Callable[[Evidence, str], Scores]
    needs: frozenset[str] = frozenset()
    inside: int = 0
    outside: int = 0
    reads_suspect: bool = True
    fitted: bool = False

    def scores(self, evidence: Evidence, edit: str = PLAIN) -> tuple[Scores, str | None]:
        """The scores, or NaN for all and why there are none.

        Args:
            evidence: of n samples.
            edit: `PLAIN` or one of `EDITS`.
        """
        if (why := evidence.lacks(self.needs, edit)) is not None:
            return np.full(len(evidence), np.nan), why
        try:
            return self.score(evidence, edit), None
        except RunError as error:  # such as too few known images: the other methods go on
            return np.full(len(evidence), np.nan), str(error)
