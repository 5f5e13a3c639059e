"""Searches whose trials are not trained: their figures are written into the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from amint_ray.config.search import Search, load_search
from amint_ray.launch.ledger import Ledger, State, TrialRecord
from amint_ray.launch.proposals import Proposals
from amint_ray.storage import Location, locate

AUC, ACCURACY = "membership.member.auc", "task.accuracy"
SPACE: dict[str, Any] = {
    "placement": {
        "branches": {
            "entry": {"mint.taps": "entry", "mint.hidden": {"randint": [8, 64]}},
            "output": {"mint.taps": "output"},
        }
    },
    "loss.lambda_mint": {"loguniform": [1e-3, 1e3]},
    "mint.head": {"choice": ["mlp", "conv"]},
}


def searched(folder: Path, *overrides: str, **changes: Any) -> Search:
    """A search of digits."""
    content = {"recipe": "digits", "space": SPACE, **changes}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return load_search(str(folder / "mine.yaml"), overrides)


def ledger_in(folder: Path) -> Ledger:
    """What is kept there, as another driver finds it."""
    ledger = Ledger(place(folder))
    ledger.load()
    return ledger


def place(folder: Path) -> Location:
    (folder / "trials").mkdir(exist_ok=True)
    return locate(str(folder / "trials"), "test")


def proposing(search: Search, ledger: Ledger) -> Proposals:
    """Every trial has the configuration that all start from: nobody reads it."""
    return Proposals(search, search.space, ledger, lambda trial: search.base)


def ask(proposals: Proposals) -> str | None:
    """Id of the trial that is proposed; `FINISHED`; None: not yet."""
    proposed = proposals.suggest("Tune's name of it")
    return proposed["proposal"]["id"] if isinstance(proposed, dict) else proposed


def measured(**values: float) -> dict[str, float]:
    """A look's figures, `auc` and `accuracy`, as a trial reports them."""
    names = {"auc": AUC, "accuracy": ACCURACY}
    return {
        f"{names[name]}{end}": value + shift
        for name, value in values.items()
        for end, shift in (("", 0.0), (".low", -0.01), (".high", 0.01))
    }


def play(
    ledger: Ledger,
    proposals: Proposals,
    trial: str,
    looks: Mapping[int, Mapping[str, float]],
    state: State = "done",
    violation: float | None = None,
) -> TrialRecord:
    """Let a trial have these figures by epoch, and end."""
    ledger.begin(trial)
    for epoch, figures in looks.items():
        with ledger.changing(trial) as record:
            record.looked(epoch, measured(**figures), violation)
    ledger.end(trial, state, "broke" if state == "failed" else None)
    proposals.learn(trial)
    return ledger.trials[trial]
