"""What an attack may look at: the audited model's outputs, shadow models', and what else is known.

NumPy only. Nothing here is a score yet; the methods, a file each, make scores of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from amint_ray.contracts import Role
from amint_ray.evaluation.outputs import Floats, Outputs, Scores

Mask = npt.NDArray[np.bool_]
Names = npt.NDArray[np.str_]

PLAIN = "plain"
"""The image as the run has it."""
EDITS = ("jpeg_90", "jpeg_75", "jpeg_50", "resize_0.9", "shift_1", "flip")
"""What may have happened to a suspect since, besides nothing (`PLAIN`)."""

_MOST_CELLS = 1 << 21
"""Of the shadows' table, that are widened to float64 at a time."""

_ABSENT = {
    "mint": "the MINT head was not told of membership (loss.lambda_mint = 0, or mint.objective = "
    "keyed: `amint audit --key-file` asks it)",
    "passive": "no MINT head was trained afterwards",
    "shadows": "there are no shadow models",
    "snapshots": "no earlier checkpoint of the run is left",
    "listed": "no hashes of images are known",
    "blind": "no blind classifier was fitted",
}


@dataclass(frozen=True)
class Shadows:
    """Models of the audited one's recipe, each trained on a part of the same pool of samples.

    Attributes:
        inside: (S, n) whether sample j trained the task of shadow i.
        label_confidence: by edit (S, n) float32, φ as in `Outputs`; may be on disk (`np.memmap`).
            NaN: not known.
        rows: which shadows are used; None: all.
        silent: (n,) the shadow that is not asked about a sample, −1: all are; None: all, of any.
    """

    inside: Mask
    label_confidence: Mapping[str, Floats]
    rows: tuple[int, ...] | None = None
    silent: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.inside) if self.rows is None else len(self.rows)

    def without(self, *rows: int) -> Shadows:
        """The same without these shadows; nothing is copied."""
        used = range(len(self.inside)) if self.rows is None else self.rows
        return replace(self, rows=tuple(row for row in used if row not in rows))

    def blocks(self, edit: str) -> Iterator[tuple[slice, Mask, Mask, Scores]]:
        """The table by blocks of columns, so that it is never in memory as a whole.

        Args:
            edit: whose φ.

        Yields:
            For w samples: where they are, (S, w) whether the shadow trained on the sample, whether
            it did not (neither where φ is not finite, or it is not asked), and φ, 0 where neither.
        """
        n = self.inside.shape[1]
        width = max(1, _MOST_CELLS // max(1, len(self)))
        rows = slice(None) if self.rows is None else list(self.rows)
        for start in range(0, n, width):
            at = slice(start, min(n, start + width))
            phi = np.asarray(self.label_confidence[edit][rows, at], np.float64)
            inside, known = np.asarray(self.inside[rows, at]), np.isfinite(phi)
            if self.silent is not None:
                known &= np.arange(len(self.inside))[rows, None] != self.silent[at]
            yield at, known & inside, known & ~inside, np.where(known, phi, 0.0)


@dataclass(frozen=True)
class Evidence:
    """Everything about n samples of known roles that a method may read.

    Attributes:
        sample_id: (n,) the source's names.
        role: (n,) `Role` values.
        label: (n,) class indices; −1: none.
        outputs: of the audited model, by edit; `PLAIN` among them.
        mint_logit: by edit (n,), of the model's own head; None: not trained.
        passive_logit: by edit (n,), of a head that was trained afterwards; None: there is none.
        listed: by edit (n,), whether an image of D has the same pixels, as the model is shown them;
            None: not known.
        blind: (n,) scores of a classifier that never saw the model, NaN where not scored; or None.
        shadows: or None.
        snapshots: by edit, outputs of the run's own earlier checkpoints, oldest first; or None.
        known: (n,) what a fitted attack may learn from, and is not measured on (`choose_known`).
    """

    sample_id: Names
    role: Names
    label: npt.NDArray[np.int64]
    outputs: Mapping[str, Outputs]
    known: Mask
    mint_logit: Mapping[str, Scores] | None = None
    passive_logit: Mapping[str, Scores] | None = None
    listed: Mapping[str, Mask] | None = None
    blind: Scores | None = None
    shadows: Shadows | None = None
    snapshots: Mapping[str, Sequence[Outputs]] | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    def of(self, *roles: Role) -> Mask:
        """(n,) whether a sample has one of these roles."""
        among: Mask = np.isin(self.role, [role.value for role in roles])
        return among

    def lacks(self, needs: Collection[str], edit: str = PLAIN) -> str | None:
        """Why a method with these needs cannot score images edited so; None where it can.

        Args:
            needs: `Method.needs`.
            edit: `PLAIN` or one of `EDITS`.
        """
        by_edit = {
            "mint": self.mint_logit,
            "passive": self.passive_logit,
            "listed": self.listed,
            "snapshots": self.snapshots,
            "shadows": None if self.shadows is None else self.shadows.label_confidence,
        }
        if edit not in self.outputs:
            return f"the model was not shown images after {edit}"
        for need in sorted(needs):
            if need == "blind":
                if self.blind is None:
                    return _ABSENT[need]
                continue
            values = by_edit[need]
            if values is None or (need == "shadows" and not len(self.shadows or ())):
                return _ABSENT[need]
            if edit not in values:
                return f"{need}: nothing is known of images after {edit}"
            if need == "snapshots" and not values[edit]:
                return _ABSENT[need]
        return None


def choose_known(content: Names, role: Names, *, members: int = 300, seed: int = 0) -> Mask:
    """What a fitted attack may learn from: some of `member`, and one half of `calibration`.

    The choice is by a keyed hash of the content, so that it does not depend on the order or on what
    other samples there are, and byte-identical images are known together: an attack must not be
    measured on a copy of what it learned from. A search's own halves of `calibration`
    (`evaluation/selection.py`) are by a hash without a key: the two divisions are independent, and
    what a fitted attack keeps for its thresholds is as much of the half that chose the run as of
    the other. `withheld` and `test` are never known.

    Args:
        content: (n,) hashes of the images, or names where no two are alike.
        role: (n,) `Role` values.
        members: of `member` at most.
        seed: another seed is another choice.
    """
    hashes = np.array([_keyed(each, seed) for each in content.tolist()], np.uint64)
    known: Mask = (role == Role.CALIBRATION.value) & (hashes % 2 == 1)
    candidates: Mask = role == Role.MEMBER.value
    ordered = np.sort(hashes[candidates])
    if members < len(ordered):
        candidates &= hashes < ordered[members]  # of a content that would be cut in two: none
    known |= candidates
    return known


def _keyed(content: str, seed: int) -> int:
    digest = hashlib.blake2b(content.encode(), digest_size=8, key=f"known {seed}".encode()).digest()
    return int.from_bytes(digest, "little")
