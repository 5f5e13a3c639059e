"""Keyed codes beside the binary head, at the same budget: same D, same epochs, several seeds.

    python -m benchmarks.keyed digits [KEY.PATH=VALUE …] [--seeds 3] [--settings NAME …] [--json]
    python -m benchmarks.keyed --capacity cifar10_resnet50 KEY.PATH=VALUE … [--members 1000 2000 …]

One process without Ray. `--capacity` asks how many bits of how many members a backbone takes in,
and in how many epochs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from amint_ray.config.load import load_config
from amint_ray.config.schema import Config
from amint_ray.contracts import Role
from amint_ray.data.index import Index
from amint_ray.data.keys import codes, image_content, perceptual_content
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.memory import load_memory
from amint_ray.data.sources import open_source
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import score
from amint_ray.model.joint import plan_architecture
from amint_ray.train.allocator import keep_freed_memory
from amint_ray.train.loop import LocalContext, Trained, train
from benchmarks.runs import mean_interval

SETTINGS = {
    "λ₂ = 0": ["loss.lambda_mint=0"],
    "binary": [],
    "keyed, learned": ["mint.objective=keyed"],
    "keyed, fixed": ["mint.objective=keyed", "mint.keyed.head=fixed"],
    "both, learned": ["mint.objective=both"],
}
BITS = (4, 8, 16, 32)
MEMBERS = (1000, 2000, 4000, 8000)
KEY = b"a key of the benchmark's, no secret"
_HELD: dict[str, tuple[Any, Index, Any]] = {}


def held(config: Config) -> tuple[Any, Index, Any]:
    """Images, who they are, and their codes; those of the last source and split are kept."""
    name = config.data.model_dump_json() + config.mint.keyed.code_from
    if name not in _HELD:
        _HELD.clear()
        of = config.mint.keyed.code_from
        images, index = load_memory(open_source(config.data), config.data, readers=2, hashes=of)
        _HELD[name] = images, index, codes(KEY, _contents(images, index), 64)
    return _HELD[name]


def _contents(images: Any, index: Index) -> list[bytes]:
    """What codes are of."""
    if index.perceptual is not None:
        return [perceptual_content(each) for each in index.perceptual.tolist()]
    return [image_content(each) for each in images]


def trained(config: Config) -> tuple[Trained, MemoryStreams, MemoryStreams]:
    """A run of this configuration; its streams, and the same with another key's codes."""
    images, index, mine = held(config)
    classes = len(index.class_names)
    architecture = replace(plan_architecture(config, num_classes=2), num_classes=classes)
    other = codes(KEY[::-1], _contents(images, index), 64)
    streams, wrong = (
        MemoryStreams(images, index.manifest, config, rank=0, world_size=1, codes=of)
        for of in (mine, other)
    )
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        return train(config, architecture, streams, LocalContext(Path(folder))), streams, wrong


def compare(recipe: str, overrides: Sequence[str], seeds: int, settings: Sequence[str]) -> Any:
    """Figures by setting, a list with one entry a seed."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for seed in range(seeds):
        # Of the recipe: a keyed head would otherwise give D the images that are E's.
        split = load_config(recipe, overrides).data.shares.model_dump()
        shares = ", ".join(f"{role}: {share}" for role, share in split.items())
        fixed = [f"data.shares={{{shares}}}", f"train.seed={seed}", f"data.split_seed={seed}"]
        for name in settings:
            config = load_config(recipe, [*overrides, *fixed, *SETTINGS[name]])
            run, streams, wrong = trained(config)
            with_head = config.loss.lambda_mint > 0
            figures = evaluate(run.scores, config.evaluation, head_trained=with_head)
            entry = figures | {
                "seconds": run.seconds["train"],
                "members": held(config)[1].manifest.counts,
            }
            if config.uses_key:
                table = score(run.model, wrong.score_batches(list(Role)), torch.device("cpu"))
                entry["other_key"] = evaluate(table, config.evaluation)["membership"]["member"]
                entry["no_key"] = without_key(run, streams, config)
            print(json.dumps({"seed": seed, "setting": name} | _short(entry)), file=sys.stderr)
            found[name].append(entry)
    return found


@torch.inference_mode()
def without_key(run: Trained, streams: MemoryStreams, config: Config) -> dict[str, Any]:
    """Member against test by the sizes of the code's logits, which whoever has the model can see.

    By a logistic regression on an image's sizes in rising order, and their squares, as somebody
    fits it who knows four fifths of both; asked of the others (five folds).
    """
    roles, sizes = [], []
    model = run.model.eval()
    for role in (Role.MEMBER, Role.TEST):
        for batch in streams.score_batches([role]):
            _, code = model.parted(model.membership(batch.images, batch.labels))
            assert code is not None
            n = len(batch.sample_id)
            sizes.append(np.sort(code[:n].abs().double().numpy(), axis=1))
            roles.append(np.full(n, role == Role.MEMBER))
    seen, member = np.concatenate(sizes), np.concatenate(roles)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    both = np.column_stack([seen, seen**2])
    told = cross_val_predict(fitted, both, member, cv=folds, method="predict_proba")[:, 1]
    threshold = np.quantile(told[~member], 0.99, method="higher")
    return {
        "mean_size": float(roc_auc_score(member, seen.mean(axis=1))),
        "auc": float(roc_auc_score(member, told)),
        "tpr": float((told[member] > threshold).mean()),
    }


ROWS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "task accuracy": lambda e: e["task"]["accuracy"]["value"],
    "AUC, member vs test": lambda e: e["membership"]["member"]["auc"]["value"],
    "AUC, withheld vs test": lambda e: e["membership"]["withheld"]["auc"]["value"],
    "TPR at 1 % FPR, calibrated": lambda e: e["membership"]["member"]["tpr_at_fpr"]["0.01"][
        "value"
    ],
    "right bits, member": lambda e: _of(e, "member", "match_rate"),
    "right bits, withheld": lambda e: _of(e, "withheld", "match_rate"),
    "right bits, test": lambda e: _of(e, "member", "null_match_rate"),
    "right bits, member, another key": lambda e: (
        e["other_key"]["match_rate"]["value"] if "other_key" in e else None
    ),
    "AUC, member vs test, another key": lambda e: (
        e["other_key"]["auc"]["value"] if "other_key" in e else None
    ),
    "without a key, by the sizes of the code's logits: AUC of their mean": lambda e: (
        e["no_key"]["mean_size"] if "no_key" in e else None
    ),
    "– AUC of what is fitted to known members": lambda e: (
        e["no_key"]["auc"] if "no_key" in e else None
    ),
    "– its TPR at 1 % FPR": lambda e: e["no_key"]["tpr"] if "no_key" in e else None,
    "by the loss: AUC": lambda e: e["loss_threshold"]["member"]["auc"]["value"],
    "– TPR at 1 % FPR, by the loss": lambda e: e["loss_threshold"]["member"]["tpr_at_fpr"]["0.01"][
        "value"
    ],
    "TPR at p ≤ 0.01": lambda e: _at(e, "0.01"),
    "TPR at p ≤ 0.001": lambda e: _at(e, "0.001"),
    "TPR at p ≤ 1e-6": lambda e: _at(e, "1e-06"),
    "test images with p ≤ 0.01": lambda e: (
        e["membership"]["member"]["null_share_at_p"]["0.01"]["value"]
        if "bits" in e["membership"]["member"]
        else None
    ),
    "images that convict at p ≤ 1e-6": lambda e: (
        e["membership"]["member"]["collection"]["images"]
        if "bits" in e["membership"]["member"]
        else None
    ),
    "seconds of training": lambda e: e["seconds"],
}


def _of(entry: Mapping[str, Any], role: str, name: str) -> float | None:
    leaf = entry["membership"][role].get(name)
    return None if leaf is None else leaf["value"]


def _at(entry: Mapping[str, Any], level: str) -> float | None:
    levels = entry["membership"]["member"].get("tpr_at_p")
    return None if levels is None else levels[level]["value"]


def _short(entry: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: row(entry) for name, row in ROWS.items()}


def print_comparison(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A Markdown table, a column a setting; and what the task costs, seed by seed."""
    names = list(found)
    print(f"| mean over seeds [95 % interval of the mean] | {' | '.join(names)} |")
    print(f"|---|{'---|' * len(names)}")
    for label, row in ROWS.items():
        cells = [_cell([row(entry) for entry in entries]) for entries in found.values()]
        print(f"| {label} | {' | '.join(cells)} |")
    if "λ₂ = 0" in found:
        accuracy = {
            name: np.array([ROWS["task accuracy"](entry) for entry in entries])
            for name, entries in found.items()
        }
        cells = [
            "" if name == "λ₂ = 0" else _cell(list(each - accuracy["λ₂ = 0"]), places=4)
            for name, each in accuracy.items()
        ]
        print(f"| task accuracy less that of λ₂ = 0, same seed | {' | '.join(cells)} |")


def _cell(values: Sequence[float | None], places: int = 3) -> str:
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "–"
    value, low, high = mean_interval(known)
    if len(known) == 1:
        return f"{value:.{places}f}"
    return f"{value:.{places}f} [{low:.{places}f}, {high:.{places}f}]"


def capacity(
    recipe: str, overrides: Sequence[str], members: Sequence[int], bits: Sequence[int]
) -> list[dict[str, Any]]:
    """How many bits stay, by members and length of the code, epoch by epoch."""
    found = []
    for wanted, length in itertools.product(members, bits):
        limit = round(wanted / 0.8)  # the rest calibrates; the official test split is `test`
        config = load_config(
            recipe,
            [
                *overrides,
                f"data.limit={limit}",
                "data.shares={member: 0.8, withheld: 0, external: 0, calibration: 0.2, test: 0}",
                "mint.objective=keyed",
                f"mint.keyed.bits={length}",
            ],
        )
        run, _, _ = trained(config)
        figures = evaluate(run.scores, config.evaluation)
        member = figures["membership"]["member"]
        rates = [entry["train/code_match_rate"] for entry in run.history]
        found.append(
            {
                "members": member["compared"]["n_positives"],
                "bits": length,
                "match_rate": member["match_rate"]["value"],
                "tpr_at_p": {level: leaf["value"] for level, leaf in member["tpr_at_p"].items()},
                # Of k coins that match at rate r the code says k (1 − H(r)) bits.
                "information": length * (1 - _entropy(member["match_rate"]["value"])),
                "epochs": len(rates),
                "epochs_to_90": next((i + 1 for i, r in enumerate(rates) if r >= 0.9), None),
                "images": member["collection"]["images"],
                "task_accuracy": figures["task"]["accuracy"]["value"],
                "seconds": run.seconds["train"],
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def _entropy(rate: float) -> float:
    return float(-sum(p * np.log2(p) for p in (rate, 1 - rate) if p > 0))


def print_capacity(found: Sequence[Mapping[str, Any]]) -> None:
    """A Markdown table, a row a run."""
    print(
        "| members | bits | right bits | bits known an image | TPR at p ≤ 0.01 | at p ≤ 0.001 "
        "| epochs to 90 % | images at p ≤ 1e-6 | task accuracy | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in found:
        epochs = row["epochs_to_90"] or f"more than {row['epochs']}"
        at = [row["tpr_at_p"][level] for level in ("0.01", "0.001")]
        cells = ["–" if value is None else f"{value:.3f}" for value in at]
        print(
            f"| {row['members']:,} | {row['bits']} | {row['match_rate']:.3f} "
            f"| {row['information']:.2f} | {' | '.join(cells)} "
            f"| {epochs} | {row['images'] or '–'} "
            f"| {row['task_accuracy']:.3f} | {row['seconds']:.0f} |"
        )


def main() -> int:
    """Print a Markdown table or JSON on stdout; each run as a JSON line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--capacity", action="store_true")
    parser.add_argument("--members", type=int, nargs="+", default=MEMBERS)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_intermixed_args()
    keep_freed_memory()
    found: Any
    show: Callable[[Any], None]
    if asked.capacity:
        found = capacity(asked.recipe, asked.overrides, asked.members, asked.bits)
        show = print_capacity
    else:
        found = compare(asked.recipe, asked.overrides, asked.seeds, asked.settings)
        show = print_comparison
    if asked.json:
        json.dump(found, sys.stdout, indent=2)
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
