"""Digits over several seeds, with λ₂ = 0 and with the recipe's: what the MINT head costs and gives.

    python -m benchmarks.digits_seeds [--seeds 5] [--json]

Seed s sets both the split and the training. Both settings of λ₂ train on the same D. The splits
share 1,797 images, so that their test sets overlap: the intervals over seeds are too narrow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.runs import amint_train, mean_interval

FIGURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "task accuracy on test": lambda d: d["task"]["accuracy"],
    "MINT head, member vs test, AUC": lambda d: d["membership"]["member"]["auc"],
    "MINT head, withheld vs test, AUC": lambda d: d["membership"]["withheld"]["auc"],
    "loss threshold, member vs test, AUC": lambda d: d["loss_threshold"]["member"]["auc"],
    "loss threshold, withheld vs test, AUC": lambda d: d["loss_threshold"]["withheld"]["auc"],
    "MINT head, member vs test, balanced accuracy (calibrated to 5 % FPR)": lambda d: d[
        "membership"
    ]["member"]["balanced_accuracy"],
    "MINT head, member vs test, balanced accuracy at 0.5": lambda d: d["membership"]["member"][
        "balanced_accuracy_at_half"
    ],
    "MINT head, member vs test, TPR at 1 % FPR": lambda d: d["membership"]["member"]["tpr_at_fpr"][
        "0.01"
    ],
    "realised FPR of it on test": lambda d: d["membership"]["member"]["realised_fpr_at"]["0.01"],
}


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = {"λ₂ = 0": ["loss.lambda_mint=0"], "default": []}
    documents: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for seed in range(options.seeds):
        for name, overrides in settings.items():
            print(f"seed {seed}, {name}", file=sys.stderr)
            seeds = [f"train.seed={seed}", f"data.split_seed={seed}"]
            documents[name].append(amint_train(["digits", *overrides, *seeds]))
    if options.json:
        json.dump(documents, sys.stdout, indent=2)
        return
    print(f"| mean over {options.seeds} seeds [95 % interval of the mean] | λ₂ = 0 | default |")
    print("|---|---|---|")
    for label, figure in FIGURES.items():
        cells = []
        for runs in documents.values():
            values = [figure(d)["value"] for d in runs]
            if None in values:
                cells.append("–")
            else:
                cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(values)))
        print(f"| {label} | {' | '.join(cells)} |")
    gaps = [
        FIGURES["task accuracy on test"](with_mint)["value"]
        - FIGURES["task accuracy on test"](plain)["value"]
        for plain, with_mint in zip(documents["λ₂ = 0"], documents["default"], strict=True)
    ]
    print("\ntask accuracy, default minus λ₂ = 0, paired by seed: ", end="")
    print("{:+.3f} [{:+.3f}, {:+.3f}]".format(*mean_interval(gaps)))


if __name__ == "__main__":
    main()
