"""A small population: each sample has a difficulty, and φ rises where a model trained on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from amint_ray.attacks.evidence import PLAIN, Evidence, Shadows, choose_known
from amint_ray.attacks.shadows import assign
from amint_ray.contracts import Role
from amint_ray.evaluation.outputs import Outputs

COUNTS = {
    Role.MEMBER: 9,
    Role.WITHHELD: 5,
    Role.EXTERNAL: 3,
    Role.CALIBRATION: 8,
    Role.TEST: 7,
}


def outputs_from(phi: np.ndarray) -> Outputs:
    """Outputs of a task of two classes with these φ, (views, n)."""
    p = 1 / (1 + np.exp(-np.clip(phi.astype(np.float64), -700, 700)))
    q = np.clip(np.stack([p, 1 - p]), 1e-300, 1)
    columns = (phi, q.max(0), -(q * np.log(q)).sum(0), np.abs(phi), phi > 0)
    return Outputs(*(np.asarray(column, np.float32) for column in columns))


def population(
    counts: dict[Role, int],
    *,
    shadows: int = 8,
    gain: float = 1.0,
    uneven: bool = False,
    noise: float = 0.7,
    difficulty: float = 2.0,
    edits: Sequence[str] = (PLAIN,),
    views: int = 1,
    known: int = 300,
    seed: int = 0,
) -> Evidence:
    """Evidence of so many samples of each role; `external` trained no model.

    Where `uneven`, some samples leave no trace and others a large one; `gain` is the mean.
    """
    rng = np.random.default_rng(seed)
    role = np.array([r.value for r, count in counts.items() for _ in range(count)])
    rng.shuffle(role)
    n = len(role)
    names = np.array([f"s/{i:05d}" for i in range(n)])
    pool = np.flatnonzero(role != Role.EXTERNAL.value)
    own = np.isin(role, [Role.MEMBER.value, Role.WITHHELD.value])
    inside = np.zeros((shadows, n), np.bool_)
    if shadows:
        inside[:, pool] = assign(names[pool], inside=len(pool) // 2, shadows=shadows, seed=seed)
    base = rng.normal(1.0, difficulty, n)
    gains = gain * rng.exponential(size=n) if uneven else np.full(n, gain)

    def phi(trained: np.ndarray, weaker: float) -> np.ndarray:
        return (
            base + gains * weaker * trained + noise * rng.normal(size=(*trained.shape[:-1], n))
        ).astype(np.float32)

    outputs, told, snapshots = {}, {}, {}
    for i, edit in enumerate(edits):
        weaker = 0.5**i
        outputs[edit] = outputs_from(phi(np.tile(own, (views, 1)), weaker))
        told[edit] = phi(inside, weaker)
        snapshots[edit] = [outputs_from(phi(own[None], weaker * 0.5))]
    return Evidence(
        sample_id=names,
        role=role,
        label=rng.integers(0, 2, n),
        outputs=outputs,
        known=choose_known(names, role, members=known, seed=seed),
        mint_logit={edit: (role == "member") + rng.normal(size=n) for edit in edits},
        passive_logit={edit: (role == "member") / 2 + rng.normal(size=n) for edit in edits},
        listed={edit: own & (edit == PLAIN) for edit in edits},
        blind=np.where(role == Role.EXTERNAL.value, np.nan, rng.normal(size=n)),
        shadows=Shadows(inside, told) if shadows else None,
        snapshots=snapshots,
    )


def loop_log_p(phi: float) -> float:
    """Log of 1 / (1 + exp(−φ)), written so that it can be checked by eye."""
    return -math.log1p(math.exp(-phi))
