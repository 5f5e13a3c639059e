"""Which samples each shadow model is trained on, and what the others are to it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import Mask, Names
from amint_ray.contracts import Role, UserError

POOL = (Role.MEMBER, Role.WITHHELD, Role.CALIBRATION, Role.TEST)
"""Roles whose samples shadows are trained on; `external` is what it is to the audited model."""


def assign(content: npt.NDArray[np.generic], *, inside: int, shadows: int, seed: int) -> Mask:
    """Which samples each shadow is trained on: as many in all, each sample in as many as another.

    What is dealt out are distinct contents: byte-identical images are always together. A shadow
    takes those that the fewest shadows before it took, by lot among equals. So each gets exactly
    `inside` contents, and each content is in ⌊S·inside/contents⌋ shadows or in one more; where
    `inside` is half of them, shadows 2i and 2i + 1 are complements. Which content is in which
    shadow does not depend on the order of the samples, nor on what the audited model trained on,
    nor on how many shadows come after it.

    Args:
        content: (n,) hashes of the samples of `POOL`.
        inside: distinct contents a shadow is trained on.
        shadows: how many there are, S.
        seed: of the lot.

    Returns:
        (S, n).

    Raises:
        UserError: there are no shadows, or not more contents than a shadow takes.
    """
    distinct, unit = np.unique(content, return_inverse=True)
    if shadows < 1:
        raise UserError(f"{shadows} shadow models: there must be at least one")
    if not 0 < inside < len(distinct):
        raise UserError(
            f"a shadow model would train on {inside} of {len(distinct)} distinct images: it needs "
            "at least one, and at least one must be left that it does not see; raise "
            "data.shares.test or data.shares.calibration"
        )
    rng = np.random.default_rng(seed)
    taken = np.zeros(len(distinct), np.int64)
    rows = np.zeros((shadows, len(distinct)), np.bool_)
    for row in rows:
        lot = rng.permutation(len(distinct))
        chosen = lot[np.argsort(taken[lot], kind="stable")[:inside]]
        row[chosen] = True
        taken[chosen] += 1
    return rows[:, unit.reshape(-1)]


def shadow_roles(
    role: Names, content: npt.NDArray[np.generic], inside: Mask, *, withheld: int, seed: int
) -> Names:
    """The roles under which one shadow is trained with the audited model's own recipe.

    Args:
        role: (n,) `Role` values of the audited model.
        content: (n,) hashes; equal ones get one role.
        inside: (n,) the shadow's row of `assign`, False where the role is `external`.
        withheld: distinct contents of its training set that its head is not told of; as large a
            share as the audited model's.
        seed: of the choice of these.

    Returns:
        (n,) `member` or `withheld` where inside; else `test`, or what it was where that is
        `external` or `calibration`, on which every training watches its losses.

    Raises:
        ValueError: an external sample is inside, or fewer contents are than are to be withheld.
    """
    pool = np.isin(role, [each.value for each in POOL])
    if inside[~pool].any():
        raise ValueError("external samples train no shadow's task")
    told = np.unique(content[inside])
    if not 0 <= withheld <= len(told):
        raise ValueError(f"{withheld} of {len(told)} contents are to be withheld")
    kept_back = np.random.default_rng(seed).permutation(told)[:withheld]
    stays = ~pool | (role == Role.CALIBRATION.value)
    roles = np.where(stays, role, Role.TEST.value)
    roles = np.where(inside, Role.MEMBER.value, roles)
    return np.where(inside & np.isin(content, kept_back), Role.WITHHELD.value, roles)
