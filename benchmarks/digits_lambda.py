"""How the digits recipe got its λ₂: the task's accuracy on `calibration`, over three splits.

    python -m benchmarks.digits_lambda

Runs the training loop in this process, without Ray. The splits have seeds that no reported figure
uses; as all splits share 1,797 images, their `calibration` is partly `test` elsewhere.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from amint_ray.config.load import load_config
from amint_ray.contracts import Role
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.memory import load_memory
from amint_ray.data.sources import open_source
from amint_ray.evaluation.metrics import auc
from amint_ray.model.joint import plan_architecture
from amint_ray.train.loop import LocalContext, train
from benchmarks.runs import mean_interval

SEEDS = (100, 101, 102)
LAMBDAS = (0.0, 0.03, 0.1, 0.3, 1.0)


def measure(lambda_mint: float, seed: int) -> tuple[float, float]:
    """Task accuracy on `calibration`, and the MINT head's AUC of `member` against it."""
    config = load_config(
        "digits",
        [f"loss.lambda_mint={lambda_mint}", f"data.split_seed={seed}", f"train.seed={seed}"],
    )
    images, index = load_memory(open_source(config.data), config.data, readers=2)
    streams = MemoryStreams(images, index.manifest, config, rank=0, world_size=1)
    architecture = plan_architecture(config, len(index.class_names))
    with tempfile.TemporaryDirectory() as folder:
        scores = train(config, architecture, streams, LocalContext(Path(folder))).scores
    calibration = scores.of(Role.CALIBRATION)
    accuracy = float((calibration.prediction == calibration.label).mean())
    members = scores.of(Role.MEMBER).mint_logit
    area = auc(members, calibration.mint_logit, confidence=0.95).value
    assert area is not None
    return accuracy, area


def main() -> None:
    """Run, and print a Markdown table."""
    torch.set_num_threads(1)
    print(
        f"| λ₂ | task accuracy on calibration, mean of {len(SEEDS)} | AUC, member vs calibration |"
    )
    print("|---|---|---|")
    for lambda_mint in LAMBDAS:
        accuracies, areas = zip(*(measure(lambda_mint, seed) for seed in SEEDS), strict=True)
        area = f"{mean_interval(areas)[0]:.3f}" if lambda_mint else "–"
        print(f"| {lambda_mint:g} | {mean_interval(accuracies)[0]:.3f} | {area} |", flush=True)


if __name__ == "__main__":
    main()
