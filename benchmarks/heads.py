"""The MINT heads on a CNN and on a ViT: same images, same steps, several seeds.

`python -m benchmarks.heads FOLDER` takes the hub's Parquet files of CIFAR-10; no Ray, one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from amint_ray.config.load import load_config
from amint_ray.config.schema import Config
from amint_ray.data.loading import MemoryStreams, check_roles
from amint_ray.data.memory import load_memory
from amint_ray.data.sources import open_source
from amint_ray.evaluation.report import evaluate
from amint_ray.model.joint import AuditedModel, plan_architecture
from amint_ray.train.allocator import keep_freed_memory
from amint_ray.train.flops import count_flops
from amint_ray.train.loop import LocalContext, train

FAMILIES = {
    "cnn": ["model.backbone=resnet18", "model.options.channels=[32,64,128,256]"],
    "vit": [
        "model.backbone=vit_tiny_patch16_224",
        "model.options={img_size: 32, patch_size: 8, embed_dim: 64, depth: 12, num_heads: 8}",
    ],
}
HEADS = {
    "conv": ["mint.head=conv"],
    "conv, 16 filters": ["mint.head=conv", "mint.channels=16"],
    "tokens": ["mint.head=tokens"],
    "attention": ["mint.head=attention"],
    "mlp": ["mint.head=mlp"],
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        family: key of `FAMILIES`.
        head: key of `HEADS`.
        seed: of the split and of the training.
        auc: of the head, member against test.
        tpr: of the head at 1 % false positives, threshold from `calibration`; None where `test` is
            too small.
        task_accuracy: on test.
        weights: of the head.
        flop_share: of the joint step that is the head's.
        seconds: of training.
    """

    family: str
    head: str
    seed: int
    auc: float
    tpr: float | None
    task_accuracy: float
    weights: int
    flop_share: float
    seconds: float


def config_of(folder: Path, family: str, head: str, seed: int, extra: list[str]) -> Config:
    """1,000 images of D, 2,000 of E, 4,000 of the official test set; taps in the middle."""
    shares = "{member: .25, withheld: 0.0, external: .5, calibration: .25, test: 0.0}"
    return load_config(
        "cifar10_resnet50",
        [
            f"data.path={folder}",
            "data.limit=4000",
            f"data.shares={shares}",
            *FAMILIES[family],
            "mint.taps=middle",
            *HEADS[head],
            "train.epochs=15",
            "train.lr=1e-3",
            "train.schedule=cosine",
            f"data.split_seed={seed}",
            f"train.seed={seed}",
            *extra,
        ],
    )


def run(config: Config, family: str, head: str, seed: int) -> Run:
    """Train, score, measure."""
    images, index = load_memory(open_source(config.data), config.data, readers=2)
    manifest = index.manifest
    check_roles(manifest, config)
    architecture = plan_architecture(config, len(index.class_names))
    streams = MemoryStreams(images, manifest, config, rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        trained = train(config, architecture, streams, LocalContext(Path(folder)))
    report = evaluate(trained.scores, config.evaluation)
    member = report["membership"]["member"]
    size = config.train.batch_size
    flops = count_flops(architecture, n_task=size, n_rows=size + config.external_rows)
    weights = sum(p.numel() for p in AuditedModel(architecture).head.parameters())
    trunk = 1 + architecture.taps[-1].depth * config.train.external_ratio
    return Run(
        family=family,
        head=head,
        seed=seed,
        auc=member["auc"]["value"],
        tpr=member["tpr_at_fpr"]["0.01"]["value"],
        task_accuracy=report["task"]["accuracy"]["value"],
        weights=weights,
        flop_share=(flops.ratio - trunk) / flops.ratio,
        seconds=trained.seconds["train"],
    )


def main() -> int:
    """Print a Markdown table on stdout, each run as a JSON line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("overrides", nargs="*", help="further key=value settings for all runs")
    arguments = parser.parse_intermixed_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    runs: list[Run] = []
    for seed in arguments.seeds:
        for family in FAMILIES:
            for head in HEADS:
                config = config_of(arguments.folder, family, head, seed, arguments.overrides)
                done = run(config, family, head, seed)
                print(json.dumps(asdict(done)), file=sys.stderr, flush=True)
                runs.append(done)
    print("| family | head | AUC | TPR at 1 % FPR | task accuracy | weights | share of FLOPs | s |")
    print("|---|---|---|---|---|---|---|---|")
    for family in FAMILIES:
        for head in HEADS:
            these = [r for r in runs if (r.family, r.head) == (family, head)]
            print(
                f"| {family} | {head} | {_each([r.auc for r in these])} "
                f"| {_each([r.tpr for r in these])} "
                f"| {_each([r.task_accuracy for r in these])} | {these[0].weights:,} "
                f"| {these[0].flop_share:.3f} | {statistics.median(r.seconds for r in these):.0f} |"
            )
    return 0


def _each(values: list[float | None]) -> str:
    """Every seed's value: three are too few for an interval that says anything."""
    return ", ".join("–" if value is None else f"{value:.3f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
