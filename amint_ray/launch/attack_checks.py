"""Before an attack trains anything: which methods can answer, and have shadow models room."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amint_ray.attacks.evidence import EDITS
from amint_ray.attacks.method import Method
from amint_ray.attacks.shadows import POOL
from amint_ray.config.attack import AttackSettings
from amint_ray.config.schema import Config
from amint_ray.contracts import Role, UserError, Watcher
from amint_ray.data.roles import Manifest
from amint_ray.launch.attack_parts import SPARE, free_bytes
from amint_ray.storage import Location

_BYTES_OF_PHI = 4


def possible_methods(
    methods: Sequence[Method], settings: AttackSettings, watcher: Watcher, *, named: bool
) -> list[Method]:
    """Those methods for which the settings leave what they read.

    Args:
        methods: that are wished for.
        settings: of the attack.
        watcher: is told which are left out.
        named: whether the user named each of them.

    Raises:
        UserError: one that was named cannot be carried out.
    """
    without = {"shadows": settings.shadows == 0, "snapshots": not settings.snapshots}
    cures = {"shadows": "attack.shadows=16", "snapshots": "attack.snapshots=true"}
    lacking = {
        method.name: [need for need in sorted(method.needs) if without.get(need)]
        for method in methods
    }
    left_out = [name for name, needs in lacking.items() if needs]
    if left_out and named:
        raise UserError(f"--methods: {left_out[0]} needs {cures[lacking[left_out[0]][0]]}")
    if left_out:
        ways = sorted({cures[need] for need in without if without[need]})
        watcher.notice(f"left out: {', '.join(left_out)} ({', '.join(ways)} brings them)")
    return [method for method in methods if not lacking[method.name]]


def answering_methods(
    methods: Sequence[Method],
    settings: AttackSettings,
    manifest: Manifest,
    watcher: Watcher,
    *,
    named: bool,
) -> list[Method]:
    """Those methods that find an image with enough shadow models on either side.

    Args:
        methods: that the settings leave (`possible_methods`).
        settings: of the attack.
        manifest: the run's images and roles.
        watcher: is told which are left out.
        named: whether the user named each of them.

    Raises:
        UserError: one that was named would answer for no image.
    """
    share = _share_of_d(manifest)
    if not 0 < share < 1:  # no shadow model can be dealt images, which is told where they are
        return list(methods)
    counts = _counts(settings.shadows, share)
    unable = [
        method
        for method in methods
        if "shadows" in method.needs
        and not any(
            inside >= method.inside and settings.shadows - inside >= method.outside
            for inside in counts
        )
    ]
    if not unable:
        return list(methods)
    enough = max(fewest_shadows(method.inside, method.outside, share) for method in unable)
    names = ", ".join(method.name for method in unable)
    most = (
        f"with attack.shadows = {settings.shadows} no image is inside of "
        f"{max(method.inside for method in unable)} shadow models and outside of "
        f"{max(method.outside for method in unable)}"
    )
    if named:
        raise UserError(f"--methods: {names}: {most}; take attack.shadows={enough} or more")
    watcher.notice(f"left out: {names} ({most}; attack.shadows={enough} brings them)")
    return [method for method in methods if method not in unable]


def fewest_shadows(inside: int, outside: int, share: float) -> int:
    """How many shadow models there must be for each image to be in and out of so many.

    Args:
        inside: of how many.
        outside: likewise.
        share: of the images that each shadow model trains on, between 0 and 1.
    """
    shadows = inside + outside
    while _counts(shadows, share)[0] < inside or shadows - _counts(shadows, share)[-1] < outside:
        shadows += 1
    return shadows


def _counts(shadows: int, share: float) -> tuple[int, int]:
    """Of how many shadow models an image is inside: fewest and most, as `assign` deals them."""
    exact = round(shadows * share, 9)
    return math.floor(exact), math.ceil(exact)


def _share_of_d(manifest: Manifest) -> float:
    """Of the distinct images that shadow models are dealt."""
    pool = np.isin(manifest.role, [role.value for role in POOL])
    trained = np.isin(manifest.role, [role.value for role in Role if role.trains_task])
    of_d, of_all = (len(np.unique(manifest.content[rows])) for rows in (trained, pool))
    return of_d / max(1, of_all)


def check_room_for_shadows(
    methods: Sequence[Method],
    settings: AttackSettings,
    config: Config,
    manifest: Manifest,
    storage: Location,
) -> None:
    """Whether the shadow models' numbers have room, before anything is laid out for them.

    What lies in `shadows/` may be used again and is taken as if it were free: what is not there yet
    is counted exactly once the parts are laid out (`attack_parts.check_disk`).

    Args:
        methods: that are carried out.
        settings: of the attack.
        config: the run's.
        manifest: its images and roles.
        storage: what the results are kept in; on object storage only the temporary folder, where
            the table of all models lies, is asked.

    Raises:
        UserError: they have not.
    """
    if not any("shadows" in method.needs for method in methods):
        return
    images = int(np.isin(manifest.role, [role.value for role in POOL]).sum())
    edits = 1 + len(EDITS) if settings.edits else 1
    of_a_kind = settings.shadows * images * edits * _BYTES_OF_PHI
    both = config.loss.lambda_mint > 0 and settings.shadow_loss == "same" and settings.compare_plain
    rooms = [("the temporary folder", Path(tempfile.gettempdir()), of_a_kind, 0)]
    if not storage.remote:
        kept = Path(storage.path)
        there = sum(file.stat().st_size for file in (kept / "shadows").rglob("*.npz"))
        rooms.append((f"{storage.uri} (storage.path)", kept, of_a_kind * (1 + both), there))
    for name, folder, needed, there in rooms:
        free = free_bytes(folder) + there
        if needed * SPARE > free:
            most = math.floor(settings.shadows * free / (needed * SPARE))
            raise UserError(
                f"attack.shadows = {settings.shadows}: what is kept of {images:,} images takes "
                f"{needed * SPARE / 2**30:,.3g} GiB and {name} has {free / 2**30:,.3g} GiB: room "
                f"for {most:,}; take fewer, or give attack.edits=false"
            )
