"""What an attack is refused for before it trains: methods that cannot answer, and no room."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch.silent import Silent

from amint_ray.attacks.methods import METHODS, chosen
from amint_ray.attacks.shadows import assign
from amint_ray.config.attack import load_attack
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError
from amint_ray.data.roles import Manifest
from amint_ray.launch.attack_checks import (
    answering_methods,
    check_room_for_shadows,
    fewest_shadows,
)
from amint_ray.storage import locate

COUNTS = {"member": 40, "withheld": 10, "external": 30, "calibration": 40, "test": 160}
"""D is a fifth of the 250 images that shadow models are dealt."""
NAMES = np.array([f"n{number:03d}" for number in range(sum(COUNTS.values()))])
MANIFEST = Manifest(
    NAMES, NAMES, np.zeros(len(NAMES), np.int64), np.repeat(list(COUNTS), list(COUNTS.values()))
)


def left(shadows: int, methods: str = "all") -> tuple[list[str], list[str]]:
    """Names of the methods that can answer, and what is said of the others."""
    watcher = Silent()
    settings, _ = load_attack([f"attack.shadows={shadows}"])
    named = methods != "all"
    found = answering_methods(chosen(methods), settings, MANIFEST, watcher, named=named)
    return [method.name for method in found], watcher.notices


@pytest.mark.parametrize("shadows", [2, 3, 5, 9, 10])
def test_those_are_left_for_which_an_image_is_dealt_enough_shadows(shadows: int) -> None:
    inside = assign(NAMES[:250], inside=50, shadows=shadows, seed=0).sum(axis=0)
    names, notices = left(shadows)
    for method in METHODS.values():
        enough = (inside >= method.inside) & (shadows - inside >= method.outside)
        assert (method.name in names) == bool(enough.any()), method.name
    assert bool(notices) == ("lira_online" not in names)


def test_how_many_would_do_is_told() -> None:
    with pytest.raises(UserError) as told:
        left(4, "yeom,lira_online")
    assert str(told.value) == (
        "--methods: lira_online: with attack.shadows = 4 no image is inside of 2 shadow models and "
        "outside of 2; take attack.shadows=10 or more"
    )
    assert left(10, "yeom,lira_online") == (["yeom", "lira_online"], [])
    (notice,) = left(4)[1]
    assert notice.startswith("left out: lira_online, lira_online_fixed (with attack.shadows = 4 ")
    assert notice.endswith("attack.shadows=10 brings them)")


@pytest.mark.parametrize(
    ("inside", "outside", "share", "expected"),
    [(2, 2, 0.5, 4), (2, 2, 0.2, 10), (2, 2, 0.8, 10), (1, 1, 0.3, 4), (0, 2, 0.2, 3)],
)
def test_the_fewest_shadows(inside: int, outside: int, share: float, expected: int) -> None:
    assert fewest_shadows(inside, outside, share) == expected


def test_too_many_shadows_are_refused_by_the_room_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, config = locate(str(tmp_path / "kept"), "test"), load_config("digits")
    free = 2**27
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    def check(*settings: str, methods: str = "lira_offline") -> None:
        asked, _ = load_attack([f"attack.{each}" for each in settings])
        check_room_for_shadows(chosen(methods), asked, config, MANIFEST, storage)

    a_shadow = 250 * 7 * 4 * 1.2
    most = int(free / a_shadow)
    check(f"shadows={most // 2}")
    check(f"shadows={most}", "compare_plain=false")
    check("shadows=100000", methods="yeom")  # that reads none
    with pytest.raises(UserError, match=r"\(storage\.path\) has 0\.125 GiB: room") as told:
        check(f"shadows={most // 2 + 1}")
    assert f"room for {most // 2:,}; take fewer" in str(told.value)
    with pytest.raises(UserError, match=r"the temporary folder has 0\.125 GiB"):
        check(f"shadows={most + 1}", "compare_plain=false")
    # What an earlier attack left there may be what this one would write.
    there = tmp_path / "kept/shadows/abc/plain-000.npz"
    there.parent.mkdir(parents=True)
    there.write_bytes(bytes(int(2 * a_shadow)))
    check(f"shadows={most // 2 + 1}")
