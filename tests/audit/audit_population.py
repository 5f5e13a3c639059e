"""Images whose outputs depend on how easy they are, and on whether a model was trained on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from amint_ray.audit.suspects import Suspects
from amint_ray.audit.verdict import Judgement, judge
from amint_ray.audit.yardstick import Yardstick
from amint_ray.evaluation.outputs import Outputs
from amint_ray.evaluation.reference import Reference

CLASSES = 4
TAPS = 6
VIEWS = 2


def outputs_from(phi: np.ndarray, right: np.ndarray) -> Outputs:
    """Outputs of a task of two classes with these φ, (views, n)."""
    p = 1 / (1 + np.exp(-phi))
    q = np.clip(np.stack([p, 1 - p]), 1e-12, 1)
    columns = (phi, q.max(0), -(q * np.log(q)).sum(0), np.abs(phi), np.tile(right, (VIEWS, 1)))
    return Outputs(*(np.asarray(column, np.float32) for column in columns))


@dataclasses.dataclass(frozen=True)
class Population:
    """What all images of one model have in common.

    Attributes:
        told: how much higher the head's logit of a member is, in standard deviations.
        gain: how much surer the outputs are of an image that was trained on.
        easy: how much easier each class is than the one before.
    """

    told: float = 2.0
    gain: float = 1.0
    easy: float = 0.0

    def draw(
        self, rng: np.random.Generator, role: np.ndarray, classes: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Images of these roles."""
        n = len(role)
        label = rng.integers(0, CLASSES, n) if classes is None else classes
        ease = rng.normal(size=n) + self.easy * label
        gain = self.gain * np.isin(role, ["member", "withheld"])
        phi = 1 + ease + gain + 0.4 * rng.normal(size=(VIEWS, n))
        right = (phi[0] > 0).astype(float)
        centre = np.eye(CLASSES, TAPS)[label] * 4
        return {
            "label": label,
            "prediction": np.where(right > 0, label, (label + 1) % CLASSES),
            # The two kinds of evidence are correlated, as both read how easy an image is.
            "mint_logit": 0.7 * ease + 0.7 * rng.normal(size=n) + self.told * (role == "member"),
            "told": outputs_from(phi, right),
            "untold": outputs_from(np.abs(phi), np.zeros(n)),
            "taps": (centre + rng.normal(size=(n, TAPS))).astype(np.float32),
        }

    def reference(
        self, rng: np.random.Generator, *, calibration: int, member: int, withheld: int
    ) -> Reference:
        """What is stored with the model."""
        role = np.repeat(["calibration", "member", "withheld"], [calibration, member, withheld])
        projection = np.eye(TAPS, dtype=np.float32)
        return Reference(role=role, projection=projection, **self.draw(rng, role))

    def suspects(
        self, rng: np.random.Generator, classes: np.ndarray | None = None, **counts: int
    ) -> Suspects:
        """A collection of so many images of each role, which nobody is told."""
        role = rng.permutation(np.repeat(list(counts), list(counts.values())))
        content = rng.permutation(len(role)).astype(np.uint64)
        finite = np.ones(len(role), np.bool_)
        return Suspects(content=content, finite=finite, **self.draw(rng, role, classes))


def without_labels(suspects: Suspects, rows: np.ndarray | slice = slice(None)) -> Suspects:
    """The same where these have none."""
    label = suspects.label.copy()
    label[rows] = -1
    told = {}
    for name, values in vars(suspects.told).items():
        told[name] = values.copy()
        told[name][:, rows] = getattr(suspects.untold, name)[:, rows]
    return dataclasses.replace(suspects, label=label, told=Outputs(**told))


def judged(suspects: Suspects, reference: Reference, *settings: Any, **more: Any) -> Judgement:
    """What an audit of these finds."""
    yardstick = Yardstick(reference)
    return judge(yardstick.measure(suspects), yardstick, *settings, **more)


def scores_of(reference: Reference) -> np.ndarray:
    """MINT logits of the reference's calibration images."""
    return np.sort(reference.mint_logit[reference.role == "calibration"])
