"""All attacks, in the order of the table, and choosing among them by name."""

from __future__ import annotations

import difflib

from amint_ray.attacks.blind import BLIND
from amint_ray.attacks.hash_list import HASH_LIST
from amint_ray.attacks.lira import (
    LIRA_OFFLINE,
    LIRA_OFFLINE_FIXED,
    LIRA_ONLINE,
    LIRA_ONLINE_FIXED,
)
from amint_ray.attacks.method import Method
from amint_ray.attacks.mint import MINT
from amint_ray.attacks.outputs import (
    OUTPUT_ATTACK,
    OUTPUT_ATTACK_REFERENCE,
    OUTPUT_ATTACK_SNAPSHOTS,
)
from amint_ray.attacks.passive_mint import PASSIVE_MINT
from amint_ray.attacks.rmia import RMIA_OFFLINE, RMIA_ONLINE
from amint_ray.attacks.salem import SALEM_CONFIDENCE, SALEM_ENTROPY
from amint_ray.attacks.watson import WATSON
from amint_ray.attacks.yeom import YEOM
from amint_ray.contracts import UserError

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        MINT,
        PASSIVE_MINT,
        YEOM,
        SALEM_CONFIDENCE,
        SALEM_ENTROPY,
        WATSON,
        LIRA_ONLINE,
        LIRA_ONLINE_FIXED,
        LIRA_OFFLINE,
        LIRA_OFFLINE_FIXED,
        RMIA_ONLINE,
        RMIA_OFFLINE,
        OUTPUT_ATTACK,
        OUTPUT_ATTACK_REFERENCE,
        OUTPUT_ATTACK_SNAPSHOTS,
        HASH_LIST,
        BLIND,
    )
}
"""By name, in the order of the table."""


def chosen(names: str) -> tuple[Method, ...]:
    """The methods of `--methods`, each once, in the order of the table.

    Args:
        names: `all`, or names with commas between them.

    Raises:
        UserError: a name is not one, or there is none.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"--methods: no name; give all, or some of {', '.join(METHODS)}")
    if unknown := [name for name in dict.fromkeys(wanted) if name not in {*METHODS, "all"}]:
        told = []
        for name in unknown:
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
            told.append(f"{name!r}, did you mean {near[0]!r}" if near else repr(name))
        raise UserError(
            f"--methods: no attack is called {'; '.join(told)}; there are {', '.join(METHODS)}"
        )
    return tuple(m for m in METHODS.values() if "all" in wanted or m.name in wanted)
