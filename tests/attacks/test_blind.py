"""The blind classifier sees what the split gives away, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from amint_ray.attacks.blind import blind_scores
from amint_ray.contracts import RunError


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, 3, 8, 8), dtype=np.uint8)


def test_a_split_with_a_flaw_is_seen_and_one_without_is_not() -> None:
    images, trained_on = noise(400), np.arange(400) % 2 == 0
    clean = blind_scores(images, trained_on, seed=0)
    assert 0.4 < roc_auc_score(trained_on, clean) < 0.6
    brighter = images + trained_on[:, None, None, None].astype(np.uint8)  # by one grey level
    flawed = blind_scores(brighter, trained_on, seed=0)
    assert roc_auc_score(trained_on, flawed) > 0.85
    np.testing.assert_array_equal(blind_scores(images, trained_on, seed=0), clean)


def test_copies_do_not_recognise_each_other() -> None:
    images = np.repeat(noise(100, seed=1), 4, axis=0)
    trained_on = np.repeat(np.arange(100) % 2 == 0, 4)
    assert 0.3 < roc_auc_score(trained_on, blind_scores(images, trained_on, seed=0)) < 0.7


def test_too_few_images_are_told_in_one_line() -> None:
    with pytest.raises(RunError, match="of 1 images of D and 19 others"):
        blind_scores(noise(20), np.arange(20) == 0, seed=0)
