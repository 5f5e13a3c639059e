"""The blind classifier: it never sees the model, so what it tells apart is the split's fault."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import Evidence, Mask
from amint_ray.attacks.method import Method
from amint_ray.contracts import RunError
from amint_ray.evaluation.confounders import boosting_scores, in_parts, pixel_statistics
from amint_ray.evaluation.outputs import Scores


def blind_scores(images: npt.NDArray[np.uint8], trained_on: Mask, *, seed: int) -> Scores:
    """Cross-fitted scores by gradient boosting on `evaluation.confounders.pixel_statistics`.

    Each half of the images is scored by a classifier fitted to the other. Halves are by a keyed
    hash of the bytes: byte-identical images are in the same one, and cannot recognise each other.

    Args:
        images: (n, channels, height, width), as the backbone sees them before normalisation.
        trained_on: (n,) whether an image is one of D.
        seed: of the halves and the classifiers.

    Returns:
        (n,) log odds; those of the two halves are by different classifiers.

    Raises:
        RunError: a half lacks images of a kind.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    key = f"blind {seed}".encode()
    digests = (hashlib.blake2b(image.tobytes(), digest_size=1, key=key) for image in images)
    half = np.array([digest.digest()[0] & 1 for digest in digests], np.bool_)
    for held in (half, ~half):
        fewest = min((trained_on & held).sum(), (~trained_on & held).sum())
        if fewest == 0:
            raise RunError(
                f"the blind classifier cannot be fitted: of {int(trained_on.sum())} images of D "
                f"and {int((~trained_on).sum())} others none of a kind is left in one half"
            )
    scores = np.empty(len(images))
    with threadpool_limits(1):  # figures do not depend on the cores
        features = np.concatenate([pixel_statistics(part) for part in in_parts(images)])
        for held in (half, ~half):
            scores[held] = boosting_scores(features, trained_on, held, seed)
    return scores


def _score(evidence: Evidence, edit: str) -> Scores:
    assert evidence.blind is not None
    return evidence.blind


BLIND = Method(
    name="blind",
    title="blind classifier",
    source="Das, Zhang, Tramèr: Blind Baselines Beat Membership Inference Attacks for Foundation "
    "Models, arXiv 2406.16201",
    score=_score,
    needs=frozenset({"blind"}),
    reads_suspect=False,
)
