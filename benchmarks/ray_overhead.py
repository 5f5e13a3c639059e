"""What Ray costs: the same loop under torchrun and under Ray Train, two workers of one thread each.

    python -m benchmarks.ray_overhead [--repeats 3] [--epochs 6] [--epoch-ratio] [--quick] [--json]

Both run the product's own loop (`amint_ray.train.loop.train`) on the same data, seeds and settings;
`torchrun` with nothing of Ray or MLflow in its processes. Measured are

- an epoch's time, which is all of the loop's seconds over its epochs, with a checkpoint behind
  each: written to a folder that is thrown away by torchrun, and brought to `storage.path` on the
  same disk under Ray;
- seconds from the command to the end of the first step, and what the product's are made of;
- an epoch's and a step's time while each epoch's checkpoint is brought to an S3 server on this
  machine (which shares its cores) against no checkpoint in between;
- one worker against two, at the same global batch and at the same batch a worker.

Every way is run in turn; with `--epoch-ratio` the first two alone, for more repeats in that time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from infra.local.object_store import ObjectStore

# ResNet-18 at 32 pixels on digits: a checkpoint of 134 MB, and epochs of some seconds.
BATCH = 64
SETTINGS = [
    *("digits", "model.backbone=resnet18", "model.options={}", "data.image_size=32"),
    "data.shares={member: 0.5, withheld: 0.04, external: 0.26, calibration: 0.08, test: 0.12}",
    *("data.confounder_check=false", "mint.taps=middle", f"train.batch_size={BATCH}"),
]
_EPOCHS_LEFT_OUT = 1


class _Notes:
    """A `Watcher` that keeps the time of everything."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []
        self.rates: list[float] = []
        self.first_step: float | None = None

    def phase(self, text: str) -> None:
        self.phases.append((text, _since_start()))

    def event(self, event: Mapping[str, Any]) -> None:
        if self.first_step is None and event["phase"] == "train":
            self.first_step = _since_start()
        if event["phase"] == "epoch":
            self.rates.append(event["train/steps_per_second"])

    def notice(self, text: str) -> None:
        print(text, file=sys.stderr)

    def heartbeat(self) -> None:
        pass

    def document(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        return {
            "rates": self.rates,
            "train_seconds": seconds["train"],
            "first_step": self.first_step,
            "phases": self.phases,
        }


def _since_start() -> float:
    """Seconds since the command was given."""
    return time.time() - float(os.environ["AMINT_BENCHMARK_STARTED"])


def _under_ray(settings: Sequence[str]) -> dict[str, Any]:
    from amint_ray.config.load import load_config
    from amint_ray.launch.train_run import Resume, run_training

    notes = _Notes()
    config = load_config(settings[0], settings[1:])
    done = run_training(config, notes, resume=Resume(), verbose=False)
    return notes.document(done["seconds"])


class _TorchrunContext:
    """The loop's world under torchrun; a checkpoint goes to a folder that is thrown away."""

    def __init__(self, notes: _Notes) -> None:
        import torch

        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        self.progress = notes.event

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        if self.rank == 0 or everywhere:
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(Path(folder))
        return True

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield None


def _under_torchrun(settings: Sequence[str]) -> dict[str, Any]:
    import torch
    from torch import distributed

    from amint_ray.config.load import load_config
    from amint_ray.data.loading import MemoryStreams
    from amint_ray.launch.dataset import find_source, load_here
    from amint_ray.model.joint import plan_architecture
    from amint_ray.train.loop import train

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    notes = _Notes()
    context = _TorchrunContext(notes)
    config, source = find_source(load_config(settings[0], settings[1:]), notes)
    dataset = load_here(config, source, notes)
    assert dataset.images is not None
    streams = MemoryStreams(
        dataset.images,
        dataset.index.manifest,
        config,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
    )
    architecture = plan_architecture(config, num_classes=len(dataset.index.class_names))
    trained = train(config, architecture, streams, context)
    distributed.destroy_process_group()
    return notes.document(trained.seconds) if context.rank == 0 else {}


def _measure(
    way: str, settings: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """One run in processes and a folder of its own."""
    own = [sys.executable, "-m"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    command = [*own, *(torchrun if way == "torchrun" else []), "benchmarks.ray_overhead"]
    clean = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        answer = Path(folder) / "answer.json"
        variables = {
            **clean,
            **(environment or {}),
            "PYTHONPATH": str(Path.cwd()),
            "OMP_NUM_THREADS": "1",
            "AMINT_BENCHMARK_STARTED": str(time.time()),
        }
        done = subprocess.run(
            [*command, "--one", way, str(answer), *settings],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{way} failed:\n{done.stderr}")
        document: dict[str, Any] = json.loads(answer.read_text())
    return document


def _one(way: str, answer: str, settings: Sequence[str]) -> None:
    document = _under_ray(settings) if way == "ray" else _under_torchrun(settings)
    if document:
        Path(answer).write_text(json.dumps(document))


def _rate(document: Mapping[str, Any]) -> float:
    return float(statistics.median(document["rates"][_EPOCHS_LEFT_OUT:]))


def measure_epoch_ratio(repeats: int, epochs: int) -> dict[str, list[float]]:
    """Seconds of an epoch by way, and the ratio of each repeat; who is first changes."""
    base = [*SETTINGS, f"train.epochs={epochs}", "cluster.workers=2", "train.checkpoint_every=1"]
    found: dict[str, list[float]] = {"torchrun": [], "ray": []}
    for repeat in range(repeats):
        for way in ("torchrun", "ray") if repeat % 2 == 0 else ("ray", "torchrun"):
            print(f"{way} …", file=sys.stderr)
            found[way].append(_measure(way, base)["train_seconds"] / epochs)
    ratios = [ray / plain for ray, plain in zip(found["ray"], found["torchrun"], strict=True)]
    return {**found, "ratio": ratios}


def measure(repeats: int, epochs: int) -> dict[str, Any]:
    """All ways in turn, so that a machine whose speed drifts hurts all alike."""
    base = [*SETTINGS, f"train.epochs={epochs}"]
    two, one = "cluster.workers=2", "cluster.workers=1"
    none, each = "train.checkpoint_every=1000", "train.checkpoint_every=1"
    found: dict[str, list[dict[str, Any]]] = {}
    cpu_of_server = []

    def run(name: str, way: str, *settings: str, **more: Any) -> None:
        print(f"{name} …", file=sys.stderr)
        found.setdefault(name, []).append(_measure(way, [*base, *settings], **more))

    for _ in range(repeats):
        run("torchrun", "torchrun", two, each)
        run("Ray", "ray", two, each)
        run("Ray, no checkpoint", "ray", two, none)
        with tempfile.TemporaryDirectory() as folder, ObjectStore(folder) as store:
            store.make_bucket("runs")
            to_s3 = "storage.path=s3://runs/x"
            run("Ray, uploading", "ray", two, each, to_s3, environment=store.environment)
            assert store.pid is not None
            cpu = psutil.Process(store.pid).cpu_times()
            cpu_of_server.append(cpu.user + cpu.system)
        run("Ray, 1 worker", "ray", one, none)
        run("Ray, 1 worker, half the batch", "ray", one, none, f"train.batch_size={BATCH // 2}")
    rates = {name: [_rate(document) for document in runs] for name, runs in found.items()}
    epoch = {name: [run["train_seconds"] / epochs for run in runs] for name, runs in found.items()}

    def ratio(over: Sequence[float], under: Sequence[float], times: float = 1.0) -> list[float]:
        return [times * o / u for o, u in zip(over, under, strict=True)]

    plain = rates["Ray, no checkpoint"]
    return {
        "steps_per_second": rates,
        "epoch_seconds": epoch,
        "ratios": {
            "epoch time, Ray over torchrun": ratio(epoch["Ray"], epoch["torchrun"]),
            "step time, Ray over torchrun": ratio(rates["torchrun"], rates["Ray"]),
            "step time, uploading over not": ratio(plain, rates["Ray, uploading"]),
            "epoch time, uploading over not": ratio(
                epoch["Ray, uploading"], epoch["Ray, no checkpoint"]
            ),
            "speed, 2 workers over 1, same batch": ratio(plain, rates["Ray, 1 worker"]),
            "speed, 2 workers over 1, same batch a worker": ratio(
                plain, rates["Ray, 1 worker, half the batch"], times=2.0
            ),
        },
        "cpu_seconds_of_s3_server": cpu_of_server,
        "seconds_to_first_step": {
            name: [document["first_step"] for document in found[name]]
            for name in ("torchrun", "Ray")
        },
        "phases": [*found["Ray"][-1]["phases"], ("first step", found["Ray"][-1]["first_step"])],
    }


def _table(found: Mapping[str, Any]) -> str:
    lines = ["| way | steps a second | seconds an epoch |", "|---|---|---|"]
    for name, rates in found["steps_per_second"].items():
        lines.append(f"| {name} | {_spread(rates)} | {_spread(found['epoch_seconds'][name])} |")
    lines += ["", "| figure, median (least to most) | value |", "|---|---|"]
    lines += [f"| {name} | {_spread(values)} |" for name, values in found["ratios"].items()]
    for name, values in found["seconds_to_first_step"].items():
        lines.append(f"| seconds to the first step, {name} | {_spread(values)} |")
    lines.append(f"| CPU seconds of the S3 server | {_spread(found['cpu_seconds_of_s3_server'])} |")
    lines += ["", "| begins, last run under Ray | after seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in found["phases"]]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Run, and print Markdown tables or JSON."""
    if sys.argv[1:2] == ["--one"]:
        _one(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--epoch-ratio", action="store_true", help="torchrun and Ray alone")
    parser.add_argument("--quick", action="store_true", help="see whether it runs; no figures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    repeats, epochs = (1, 2) if options.quick else (options.repeats, options.epochs)
    if options.epoch_ratio:
        ratio = measure_epoch_ratio(repeats, epochs)
        told = "\n".join(f"{name}: {_spread(values)}" for name, values in ratio.items())
        print(json.dumps(ratio, indent=2) if options.json else told)
        return
    found = measure(repeats, epochs)
    print(json.dumps(found, indent=2) if options.json else _table(found))


if __name__ == "__main__":
    main()
