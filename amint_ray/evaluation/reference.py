"""What an audited model says of images whose role is known; it is kept with the model.

Whoever is asked about a suspect needs to know what the model says of images that trained it, and of
images that did not. Neither the images nor their names are kept, and of outputs no more than
`Outputs` has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amint_ray.contracts import Role
from amint_ray.evaluation.outputs import Floats, Outputs, Scores, append_samples

ROLES = (Role.CALIBRATION, Role.MEMBER, Role.WITHHELD)
"""Whose images are kept; a file has a role's place here. `test` is for nobody to learn from."""
TAP_FEATURES = 32
"""Numbers that are kept of an image's activations."""


@dataclass(frozen=True)
class Reference:
    """What a model says of n images of known roles.

    Attributes:
        role: (n,) `Role` values, those of `ROLES`.
        label: (n,) class indices.
        prediction: (n,) the task's most likely class.
        mint_logit: (n,) of the MINT head; NaN where it was not trained.
        told: outputs by the true label, in the fixed views (`evaluation/views.py`).
        untold: the same by the model's own prediction, as of images without a label.
        taps: (n, d) activations of all taps, each the mean over its positions, times `projection`.
        projection: (channels of all taps, d).
        code_matches: by role, how many bits of an image's code the model says, of images in rising
            order of that number; None: it says no codes. Of a model that says codes alone nothing
            else is kept of images that trained it: by their activations or outputs anybody could
            tell them, and only a key is to.
    """

    role: npt.NDArray[np.str_]
    label: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.int64]
    mint_logit: Scores
    told: Outputs
    untold: Outputs
    taps: Floats
    projection: Floats
    code_matches: Mapping[str, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.role)

    def kept(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Reference:
        """Some of the rows; all `code_matches`.

        Args:
            rows: (n,) whether each is kept; or which, in their order.
        """
        return Reference(
            role=self.role[rows],
            label=self.label[rows],
            prediction=self.prediction[rows],
            mint_logit=self.mint_logit[rows],
            told=self.told.kept(rows),
            untold=self.untold.kept(rows),
            taps=self.taps[rows],
            projection=self.projection,
            code_matches=self.code_matches,
        )

    def of(self, *roles: Role) -> Reference:
        """The rows of these roles; all `code_matches`."""
        return self.kept(np.isin(self.role, [role.value for role in roles]))


def draw_projection(channels: int) -> Floats:
    """(channels, d): random directions, the same for all models of so many channels.

    Distances are kept by them, about (Johnson and Lindenstrauss, 1984); what is no more than d
    wide already stays as it is.
    """
    if channels <= TAP_FEATURES:
        return np.eye(channels, dtype=np.float32)
    drawn = np.random.default_rng(0).standard_normal((channels, TAP_FEATURES))
    directions: Floats = (drawn / np.sqrt(TAP_FEATURES)).astype(np.float32)
    return directions


def append(parts: Sequence[Reference]) -> Reference:
    """The rows of several, one after another; all have the same projection, and none codes."""
    return Reference(
        role=np.concatenate([part.role for part in parts]),
        label=np.concatenate([part.label for part in parts]),
        prediction=np.concatenate([part.prediction for part in parts]),
        mint_logit=np.concatenate([part.mint_logit for part in parts]),
        told=append_samples([part.told for part in parts]),
        untold=append_samples([part.untold for part in parts]),
        taps=np.concatenate([part.taps for part in parts]),
        projection=parts[0].projection,
    )


def write_reference(reference: Reference, path: Path) -> None:
    """Store as safetensors."""
    from safetensors.numpy import save_file

    places = {role.value: place for place, role in enumerate(ROLES)}
    codes = np.array([places[role] for role in reference.role.tolist()], np.uint8)
    columns = {"role": codes, "label": reference.label, "prediction": reference.prediction}
    columns |= {"mint_logit": reference.mint_logit}
    columns |= {f"outputs.{name}": values for name, values in vars(reference.told).items()}
    # The other outputs are the same whatever the label.
    columns["untold.label_confidence"] = reference.untold.label_confidence
    columns |= {"taps": reference.taps, "projection": reference.projection}
    for role, matched in (reference.code_matches or {}).items():
        columns[f"code_matches.{role}"] = matched
    save_file({name: np.ascontiguousarray(values) for name, values in columns.items()}, path)


def read_reference(path: Path) -> Reference:
    """Load what `write_reference` stored.

    Raises:
        ValueError: the file holds something else.
    """
    from safetensors.numpy import load_file

    try:
        columns = load_file(path)
        told = Outputs(*(columns[f"outputs.{name}"] for name in Outputs.__dataclass_fields__))
        untold = replace(
            told,
            label_confidence=columns["untold.label_confidence"],
            right=np.zeros_like(told.right),
        )
        names = np.array([role.value for role in ROLES], np.str_)
        found = Reference(
            role=names[columns["role"]],
            label=columns["label"],
            prediction=columns["prediction"],
            mint_logit=columns["mint_logit"],
            told=told,
            untold=untold,
            taps=columns["taps"],
            projection=columns["projection"],
            code_matches={
                role.value: columns[f"code_matches.{role.value}"]
                for role in ROLES
                if f"code_matches.{role.value}" in columns
            }
            or None,
        )
        rows = {len(found.role), len(found.label), len(found.mint_logit), len(found.taps)}
        rows |= {len(found.prediction)}
        rows |= {values.shape[1] for out in (told, untold) for values in vars(out).values()}
    except Exception as error:  # safetensors' own, a missing column, another shape
        raise ValueError(f"{path.name} holds no reference: {error}") from error
    if len(rows) != 1:
        raise ValueError(f"{path.name} holds no reference: its columns differ in length")
    return found
