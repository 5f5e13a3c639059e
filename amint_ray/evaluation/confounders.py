"""Whether the roles can be told apart without the model: before training, and by looking alone.

A membership figure says something about a model only where a *blind* classifier, one that never
sees that model, fails on the same two sets of images (Das, Zhang, Tramèr: "Blind Baselines Beat
Membership Inference Attacks for Foundation Models", arXiv 2406.16201).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from amint_ray.contracts import Role
from amint_ray.evaluation.metrics import Interval, auc

Images = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]

MOST_IMAGES = 4_000
"""Distinct images of a role that are used; where there are more, a seeded choice of them."""
FEWEST_IMAGES = 20
"""Distinct images of a role below which nothing is compared."""

_COMPARISONS = {"member_vs_test": Role.MEMBER, "external_vs_test": Role.EXTERNAL}
_BYTES_AT_ONCE = 1 << 21  # of images, which widen to many times that while they are looked at
_LARGEST_SIDE = 64


def check_confounders(
    images: Mapping[Role, Images], *, confidence: float, seed: int = 0
) -> dict[str, Any]:
    """Try to tell `member` and `external` images from `test` images without any audited model.

    Two detectors try: gradient boosting on per-image statistics of the exact bytes
    (`pixel_statistics`), and a small network on the image, brought down to at most 64 pixels a
    side (`small_network`). Each is trained on one half and scores the other, both ways, so that no
    image is scored by a classifier that saw it. Of byte-identical images in a role one counts, and
    the order of images plays no part.

    AUC and limits are the means of the two halves'. The halves err together, but a mean's standard
    error is at most the mean of the standard errors, whatever the correlation; one interval for the
    pooled scores would be too narrow.

    A comparison is confounded if the lower limit of either AUC is above 0.5. With m AUCs in all
    (detectors × comparisons that can be made) every interval is taken at Bonferroni's
    1 − (1 − confidence) / m. As only lower limits count, a random split is called confounded in at
    most (1 − confidence) / 2 of cases. On data full of near-duplicates that share a role (video
    frames) it is in more, as they are recognised by each other.

    Args:
        images: per role (n, channels, height, width), alike but for n, as the backbone sees them
            before normalisation. Of each role at most `MOST_IMAGES` are used; roles other than
            member, external and test are not.
        confidence: 1 − the largest chance that a random split is called confounded.
        seed: of the choice of images, the halves and the classifiers.

    Returns:
        `clean` (None where nothing could be compared), `confidence`, `interval_confidence` (the
        corrected one, of all limits) and `comparisons`: for `member_vs_test` and
        `external_vs_test` the `auc` of the detector with the larger one, `confounded`,
        `n_positives` and `n_negatives` (test) as used, and `classifiers`, every detector's AUC:
        `{value, low, high}`, all None with a `note` where the comparison was not made.

    Raises:
        ValueError: `confidence` is not within (0, 1), or images are not uint8 or of one shape.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    kinds = {(array.dtype.name, *array.shape[1:]) for array in images.values()}
    if len(kinds) > 1 or any(kind[0] != "uint8" or len(kind) != 4 for kind in kinds):
        raise ValueError(f"images must be uint8 (n, channels, height, width), alike, not {kinds}")
    roles = (Role.TEST, *_COMPARISONS.values())
    chosen = {role: _choose(images[role], seed) for role in roles if role in images}
    counts = {role: len(chosen.get(role, ())) for role in roles}
    compared = [role for role in roles[1:] if min(counts[role], counts[Role.TEST]) >= FEWEST_IMAGES]
    corrected = 1 - (1 - confidence) / (max(1, len(compared)) * len(_DETECTORS))
    comparisons = {}
    torch.get_num_threads()  # at first use torch sets its own number, which would undo the limit
    with threadpool_limits(1):  # figures do not depend on the cores, and no thread waits for one
        for name, role in _COMPARISONS.items():
            if role in compared:
                found = _tell_apart(chosen[role], chosen[Role.TEST], corrected, seed)
            else:
                fewer = min(role, Role.TEST, key=counts.__getitem__)
                note = f"{counts[fewer]} distinct {fewer} images, {FEWEST_IMAGES} needed"
                found = dict.fromkeys(_DETECTORS, Interval.unknown(note))
            comparisons[name] = {
                "auc": max(found.values(), key=lambda interval: interval.value or 0.0).as_dict(),
                "confounded": any((interval.low or 0.0) > 0.5 for interval in found.values()),
                "n_positives": counts[role],
                "n_negatives": counts[Role.TEST],
                "classifiers": {key: interval.as_dict() for key, interval in found.items()},
            }
    clean = not any(found["confounded"] for found in comparisons.values()) if compared else None
    settings = {"confidence": confidence, "interval_confidence": corrected}
    return {"clean": clean, **settings, "comparisons": comparisons}


def _choose(images: Images, seed: int) -> Images:
    """The distinct images, in the order of a keyed hash of their bytes, up to `MOST_IMAGES`."""
    hashes = (hashlib.blake2b(image.tobytes(), key=str(seed).encode()) for image in images)
    _, first = np.unique([digest.hexdigest() for digest in hashes], return_index=True)
    return images[first[:MOST_IMAGES]]


def _tell_apart(
    positives: Images, negatives: Images, confidence: float, seed: int
) -> dict[str, Interval]:
    """Each detector's AUC, from the scores of classifiers that did not see what they score."""
    rows = np.r_[: len(positives), : len(negatives)]
    positive, half = np.arange(len(rows)) < len(positives), rows % 2 == 0
    parts = [*in_parts(positives), *in_parts(negatives)]
    found = {}
    for name, (prepare, detect) in _DETECTORS.items():
        inputs, limits = np.concatenate([prepare(part) for part in parts]), []
        for held in (half, ~half):
            scores, truth = detect(inputs, positive, held, seed), positive[held]
            measured = auc(scores[truth], scores[~truth], confidence=confidence)
            limits.append([measured.value, measured.low, measured.high])
        found[name] = Interval(*np.array(limits, float).mean(axis=0).tolist())
    return found


def in_parts(images: Images) -> list[Images]:
    """The images in parts whose statistics do not take much memory."""
    return np.array_split(images, max(1, min(len(images), 1 + images.size // _BYTES_AT_ONCE)))


def pixel_statistics(images: Images) -> npt.NDArray[np.float32]:
    """(n, features): histograms of the exact bytes, moments, quantiles, energies of gradients.

    Images brightened by one grey level have no 0 and twice the 255, however alike the means are;
    a stretched contrast leaves gaps between bytes, a re-quantisation prefers some residues.
    """
    n, channels, height, width = images.shape
    rows = images.reshape(n * channels, -1) + 256 * np.arange(n * channels)[:, None]
    shares = np.bincount(rows.ravel(), minlength=256 * len(rows)).reshape(-1, 256) / rows.shape[1]
    mean, square = shares @ np.arange(256), shares @ np.arange(256) ** 2
    levels = np.array([1e-9, 0.05, 0.25, 0.5, 0.75, 0.95, 1 - 1e-9])
    quantiles = (shares.cumsum(axis=1)[:, :, None] < levels).sum(axis=1)
    per_channel = [mean, square - mean**2, *quantiles.T, *shares[:, [0, 1, 254, 255]].T]

    x = images.astype(np.float32)
    for gradient in (np.diff(x, axis=2), np.diff(x, axis=3), np.diff(np.diff(x, axis=2), axis=3)):
        per_channel += [np.abs(gradient).sum(axis=(2, 3)), (gradient**2).sum(axis=(2, 3))]
    rim = max(1, min(height, width) // 8)
    centre = x[:, :, rim:-rim, rim:-rim].sum(axis=(2, 3))
    per_channel += [centre, x.sum(axis=(2, 3)) - centre]

    pooled = shares.reshape(n, channels, 256).mean(axis=1)
    residues = pooled.reshape(n, 32, 8).sum(axis=1)
    odd, gaps = residues[:, 1::2].sum(axis=1), (pooled == 0).sum(axis=1)
    comb = np.abs(np.diff(pooled, axis=1)).sum(axis=1)
    columns = [*(each.reshape(n, channels) for each in per_channel), pooled, residues]
    return np.column_stack([*columns, odd, gaps, comb]).astype(np.float32)


def boosting_scores(
    features: npt.NDArray[np.float32], positive: Mask, held: Mask, seed: int
) -> Scores:
    """Scores of the `held` rows by gradient boosting fitted on the others."""
    from sklearn.ensemble import HistGradientBoostingClassifier  # takes a second

    options = {"max_leaf_nodes": 8, "max_features": 0.3, "random_state": seed % 2**32}
    boosting = HistGradientBoostingClassifier(**options)
    boosting.fit(features[~held], positive[~held])
    scores: Scores = boosting.decision_function(features[held])
    return scores


def _with_high_pass(images: Images) -> npt.NDArray[np.int16]:
    """(n, height, width, 2·channels), at most 64 a side: 16 × the image and its high-pass map.

    The map is the Laplacian of the full-size image; of the pixels that become one, the strongest
    is kept, so that a single altered pixel does not drown in an average.
    """
    x = torch.from_numpy(images).float()
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    around = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
    high_pass = 4 * x - around - padded[..., 1:-1, :-2] - padded[..., 1:-1, 2:]
    if max(x.shape[2:]) > _LARGEST_SIDE:
        size = (min(x.shape[2], _LARGEST_SIDE), min(x.shape[3], _LARGEST_SIDE))
        high, low = (F.adaptive_max_pool2d(sign * high_pass, size) for sign in (1, -1))
        high_pass, x = torch.where(high > low, high, -low), F.adaptive_avg_pool2d(x, size)
    both = torch.cat([(16 * x).round(), high_pass], dim=1)
    return both.permute(0, 2, 3, 1).short().contiguous().numpy()


def _network(inputs: npt.NDArray[np.int16], positive: Mask, held: Mask, seed: int) -> Scores:
    """Scores of the `held` rows by convolutions and a readout of the map, trained on the others."""
    x, y, channels = torch.from_numpy(inputs), torch.from_numpy(positive), inputs.shape[3] // 2
    train = torch.from_numpy(np.flatnonzero(~held))
    # Standardised: of the image each channel, of the map each pixel.
    moments = [_moments(x, train[y[train] == truth]) for truth in (True, False)]
    share = y[train].double().mean()
    both = share * moments[0] + (1 - share) * moments[1]
    both[..., :channels] = both[..., :channels].mean(dim=(1, 2), keepdim=True)
    mean, factor = both[0].float(), (both[1] - both[0] ** 2).clamp(min=1).rsqrt().float()
    # By descent alone, the one weight that matters drowns in the noise of all others: the readout
    # starts from those means' differences that are above what noise alone reaches anywhere
    # (Donoho & Johnstone's universal threshold, Biometrika 81, 1994).
    apart = (factor * (moments[0] - moments[1])[0])[..., channels:].flatten().float()
    noise = float(2 * np.log(len(apart)) / (len(train) * share * (1 - share))) ** 0.5

    def logits(rows: torch.Tensor) -> torch.Tensor:
        batch = x[rows].float().sub_(mean).mul_(factor)
        seen: torch.Tensor = convolutions(batch.permute(0, 3, 1, 2)).squeeze(1)
        return seen + batch[..., channels:].flatten(1) @ readout

    # fork_rng restores the CPU's generator alone; torch.manual_seed would reach the GPUs', too.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        convolutions = nn.Sequential(
            *(nn.Conv2d(2 * channels, 32, 4, 4 if min(x.shape[1:3]) > 16 else 2, 2), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, 1)),
        ).to(memory_format=torch.channels_last)
        readout = nn.Parameter(F.hardshrink(apart, noise))
        epochs, steps = min(12, max(6, 20_000 // len(train))), -(-len(train) // 64)
        groups: list[dict[str, Any]] = [{"params": readout}, {"params": convolutions.parameters()}]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-4, 3e-3], epochs * steps)
        for _ in range(epochs):
            for rows in train[torch.randperm(len(train))].chunk(steps):
                loss = F.binary_cross_entropy_with_logits(logits(rows), y[rows].float())
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        scored = torch.from_numpy(np.flatnonzero(held)).chunk(steps)
        return torch.cat([logits(rows) for rows in scored]).double().numpy()


def _moments(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(2, *shape of a row): mean and mean square over these rows, read in parts."""
    parts = (x[part].double() for part in rows.chunk(-(-len(rows) // 256)))
    sums = [torch.stack([part.sum(dim=0), part.square().sum(dim=0)]) for part in parts]
    return torch.stack(sums).sum(dim=0) / len(rows)


_DETECTORS: dict[str, Any] = {
    "pixel_statistics": (pixel_statistics, boosting_scores),
    "small_network": (_with_high_pass, _network),
}
