"""Placement: from `entry`, `middle`, `output`, names or globs to the modules that are tapped."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from amint_ray.contracts import UserError
from amint_ray.model.blocks import blocks
from amint_ray.model.survey import Site

PLACEMENTS: dict[str, tuple[float, float]] = {
    "entry": (1 / 4, 1 / 2),
    "middle": (1 / 2, 3 / 4),
    "output": (3 / 4, 1),
}
"""Where the two taps of a placement lie, as shares of the backbone's stages or blocks: after stages
1 and 2, 2 and 3, 3 and 4 of a network of four (DeAlcala et al., ICCV 2025, have the middle one)."""


def resolve(backbone: nn.Module, sites: Sequence[Site], wanted: Sequence[str]) -> list[Site]:
    """The tapped sites, in order of execution.

    Args:
        backbone: a timm model.
        sites: what `survey` gave of it.
        wanted: placements, module names or globs such as `blocks.[37]`, in any order.

    Raises:
        UserError: no such module, the same one twice, or one that cannot be tapped.
    """
    by_name = {site.name: site for site in sites}
    chosen: dict[str, str] = {}
    for item in wanted:
        for name in _names(item, backbone, sites):
            if name in chosen:
                raise UserError(
                    f"mint.taps: {item!r} and {chosen[name]!r} both mean module {name!r}; "
                    "name every tap once"
                )
            if fault := by_name[name].fault:
                raise UserError(f"mint.taps: module {name!r} {fault}")
            chosen[name] = item
    return [site for site in sites if site.name in chosen]


def placement(name: str, backbone: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The two sites of `entry`, `middle` or `output`.

    Stages or blocks as timm's feature info lists them. Of a backbone with too few of them to tell
    the two apart by rank, those that end nearest to the wanted depth as a share of the FLOPs; where
    there are not two at all, likewise among its blocks, their parts, or all modules.

    Raises:
        UserError: the backbone has fewer than two modules that could be tapped.
    """
    shares = PLACEMENTS[name]
    stages = landmarks(backbone, sites)
    picked = [stages[math.ceil(share * len(stages)) - 1] for share in shares] if stages else []
    if len(set(picked)) == len(shares):
        return picked
    good = [site for site in sites if not site.fault and site.depth > 0]
    names = set(blocks(backbone))
    whole = [site for site in good if site.name in names]
    parts = [site for site in good if site.name.rpartition(".")[0] in names]
    for choice in (stages, whole, parts, good):
        if len(choice) >= len(shares):
            return _nearest(choice, shares)
    raise UserError(f"mint.taps = {name}: the backbone has no two modules that can be tapped")


def _nearest(choice: Sequence[Site], shares: Sequence[float]) -> list[Site]:
    """For each share of the FLOPs the site that ends nearest to it, no site twice."""
    picked: list[Site] = []
    for share in reversed(shares):
        left = [site for site in choice if site not in picked]
        # Of modules that end at the same depth the outermost finished last.
        picked.append(min(reversed(left), key=lambda site: abs(site.depth - share)))
    return sorted(picked, key=choice.index)


def enclosing(site: Site, sites: Sequence[Site]) -> list[Site]:
    """Modules around a site that can be tapped, innermost first."""
    names = [site.name]
    while "." in names[-1]:
        names.append(names[-1].rpartition(".")[0])
    around = [s for s in sites if s.name in names[1:] and not s.fault]
    return sorted(around, key=lambda s: -len(s.name))


def landmarks(backbone: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Stages of a hierarchical backbone, blocks of an isotropic one, that can be tapped.

    timm's feature info names them; a module of it that cannot be tapped stands for the nearest one
    around it that can.
    """
    by_name = {site.name: site for site in sites}
    found: dict[str, Site] = {}
    for name in _feature_modules(backbone):
        while name and (name not in by_name or by_name[name].fault):
            name = name.rpartition(".")[0]
        if name:
            found.setdefault(name, by_name[name])
    return sorted(found.values(), key=sites.index)


def _feature_modules(backbone: nn.Module) -> list[str]:
    """Module names in timm's feature info; none where it has none."""
    info: Any = getattr(backbone, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list):
        return []
    return [entry["module"] for entry in entries if isinstance(entry, dict) and "module" in entry]


def _names(item: str, backbone: nn.Module, sites: Sequence[Site]) -> list[str]:
    """What one item of `mint.taps` means."""
    if item in PLACEMENTS:
        return [site.name for site in placement(item, backbone, sites)]
    known = [name for name, _ in backbone.named_modules() if name]
    if any(character in item for character in "*?["):
        matches = [s.name for s in sites if fnmatch.fnmatchcase(s.name, item) and not s.fault]
        if not matches:
            raise UserError(f"mint.taps: no module that can be tapped matches {item!r}")
        return matches
    if item not in known:
        words = [word for word in PLACEMENTS if difflib.get_close_matches(item, [word])]
        near = words + difflib.get_close_matches(item, known, n=3, cutoff=0.4)
        choice = near or [name for name, _ in backbone.named_children()]
        raise UserError(
            f"mint.taps: the backbone has no module {item!r}; "
            f"{'near names' if near else 'its modules begin with'}: {', '.join(choice)}"
        )
    if item not in {site.name for site in sites}:
        raise UserError(
            f"mint.taps: module {item!r} runs 0 times in a forward pass; a tap must run exactly "
            "once"
        )
    return [item]
