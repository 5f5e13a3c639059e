"""How quickly images reach the training, against a plain `torch.utils.data.DataLoader`.

    python -m benchmarks.data_rate --imagenet FOLDER --cifar10 FOLDER [--repeats 3] [--json]

Every way of reading is measured in a process of its own, in turn, with two reading processes, the
same decoding and transforms. The photographs are repeated by hard links.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from amint_ray.config.schema import Config
from amint_ray.train.allocator import keep_freed_memory

READERS, BATCH, SIZE = 2, 64, 224
_WARM_UP = 4


def photographs(path: str, **data: Any) -> Config:
    """Streaming of 64 + 64 photographs a step, each transformed once."""
    return Config.model_validate(
        {
            "data": {
                "source": "parquet",
                "path": path,
                "image_size": SIZE,
                "augment": "timm",
                "mode": "streamed",
                "shares": {
                    "member": 0.45,
                    "withheld": 0.05,
                    "external": 0.5,
                    "calibration": 0.0,
                    "test": 0.0,
                },
                **data,
            },
            "mint": {"views": "task"},
            "train": {"batch_size": BATCH, "epochs": 1000},
        }
    )


def small_images(path: str) -> Config:
    """CIFAR-10 in memory, cropped and flipped."""
    return Config.model_validate(
        {
            "data": {
                "source": "parquet",
                "path": path,
                "image_size": 32,
                "augment": "crop_flip",
                "shares": {
                    "member": 0.45,
                    "withheld": 0.05,
                    "external": 0.5,
                    "calibration": 0.0,
                    "test": 0.0,
                },
            },
            "mint": {"views": "task"},
            "train": {"batch_size": BATCH, "epochs": 1000},
        }
    )


def streams_of(config: Config) -> Any:
    """The product's streams for one worker, and how long indexing took."""
    from amint_ray.data.index import index_here
    from amint_ray.data.memory import load_memory
    from amint_ray.data.sources import open_source

    source = open_source(config.data)
    if config.data.mode == "streamed":
        from amint_ray.data.streaming import StreamedStreams

        index = index_here(source, config.data, readers=READERS)
        return StreamedStreams(source, index.rows(), config, rank=0, world_size=1, readers=READERS)
    from amint_ray.data.loading import MemoryStreams

    images, index = load_memory(source, config.data, readers=READERS)
    return MemoryStreams(images, index.manifest, config, rank=0, world_size=1)


def rate(batches: Iterator[int], images: int) -> dict[str, float]:
    """Images a second behind the first batches.

    Args:
        batches: how many images each batch has.
        images: to be taken.
    """
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    for _ in range(_WARM_UP):
        next(batches)
    seen, started = 0, time.perf_counter()
    while seen < images:
        seen += next(batches)
    return {"per_second": seen / (time.perf_counter() - started), "first_batch_s": first}


def ours(config: Config, images: int) -> dict[str, float]:
    """The product's streams."""
    keep_freed_memory()  # as the training loop does on a CPU
    streams = streams_of(config)

    def batches() -> Iterator[int]:
        for epoch in range(config.train.epochs):
            for batch in streams.train_batches(epoch):
                yield len(batch.images)

    found = rate(batches(), images)
    streams.close()
    return found


def epoch_start(config: Config) -> dict[str, float]:
    """Seconds to an epoch's first batch: the first epoch's, and the second's."""
    streams = streams_of(config)
    seconds = []
    for epoch in range(2):
        started = time.perf_counter()
        batches = streams.train_batches(epoch)
        next(batches)
        seconds.append(time.perf_counter() - started)
        for _ in batches:
            pass
    streams.close()
    return {"first_s": seconds[0], "second_s": seconds[1]}


def data_loader(config: Config, images: int) -> dict[str, float]:
    """A plain DataLoader over the same files: row groups, or all images where they are small."""
    import torch
    from torch.utils.data import DataLoader

    from benchmarks.plain_loading import RowGroups, Shuffled

    keep_freed_memory()
    if config.data.augment == "timm":
        reference: Any = RowGroups(str(config.data.path), SIZE)
    else:
        reference = Shuffled(str(config.data.path), config.data.image_size)
    loader: Any = DataLoader(
        reference,
        batch_size=2 * BATCH,
        num_workers=READERS,
        prefetch_factor=3,
        shuffle=None if config.data.augment == "timm" else True,
        generator=torch.Generator(),
    )

    def batches() -> Iterator[int]:
        while True:
            for pictures, _ in loader:
                yield len(pictures)

    return rate(batches(), images)


def ray_data(config: Config, images: int) -> dict[str, float]:
    """Ray Data over the same files, decoding and transforms, on as many cores."""
    import io

    import numpy as np
    import ray
    from PIL import Image

    ray.init(address="local", num_cpus=READERS, include_dashboard=False, log_to_driver=False)

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        from timm.data import create_transform

        transform = create_transform((3, SIZE, SIZE), is_training=True, interpolation="bicubic")
        pictures = [
            transform(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")).numpy()
            for cell in batch["image"]
        ]
        return {"image": np.stack(pictures), "label": batch["label"]}

    rows = ray.data.read_parquet(str(config.data.path), columns=["image", "label"])
    rows = rows.map_batches(decode, batch_size=BATCH).iter_torch_batches(batch_size=2 * BATCH)
    try:
        return rate((len(batch["image"]) for batch in rows), images)
    finally:
        ray.shutdown()


def waiting(config: Config, steps: int) -> dict[str, float]:
    """Share of a ResNet-50's joint step at 224 pixels that waits for the batch."""
    import torch

    from amint_ray.model.joint import plan_architecture
    from amint_ray.train.loop import create_state
    from amint_ray.train.step import train_step

    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"backbone": "resnet50"}),
            "train": config.train.model_copy(update={"batch_size": 8}),
        }
    )
    streams = streams_of(config)
    architecture = plan_architecture(config, num_classes=1000)
    state = create_state(config, architecture, streams.steps_per_epoch, torch.device("cpu"))
    batches = streams.train_batches(0)
    next(batches)
    waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        train_step(state.model, batch, state.objective, state.update)
    streams.close()
    return {"share": waited / (time.perf_counter() - started)}


def memory(config: Config, images: int) -> dict[str, float]:
    """Proportional set size of training process and readers, in MiB, after so many images."""
    streams = streams_of(config)
    seen, most = 0, 0.0
    for batch in streams.train_batches(0):
        seen += len(batch.images)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        most = max(most, sum(p.memory_full_info().pss for p in processes) / 2**20)
        if seen >= images:
            break
    streams.close()
    return {"mib": most}


MEASURES: dict[str, Callable[[Config, int], dict[str, float]]] = {
    "ours": ours,
    "data_loader": data_loader,
    "ray_data": ray_data,
    "epoch_start": lambda config, images: epoch_start(config),
    "waiting": waiting,
    "memory": memory,
}


def measure(
    name: str, config: Config, amount: int, environment: dict[str, str]
) -> dict[str, float]:
    """One measurement in a process of its own."""
    arguments = ["--measure", name, "--config", config.model_dump_json(), "--amount", str(amount)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.data_rate", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(name, config.data.path, found, file=sys.stderr)
    return found


def repeated(prepared: Path, folder: Path, images: int) -> str:
    """A folder with the prepared file as often as it takes."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    (file,) = prepared.glob("*.parquet")
    times = -(-images // pq.ParquetFile(file).metadata.num_rows)
    for i in range(times):
        (folder / f"train-{i:05d}-of-{times:05d}.parquet").hardlink_to(file)
    (folder / "prepared.json").write_text("{}")
    return str(folder)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, in turn."""
    from amint_ray.data.preparing import plan_outputs, write_output
    from amint_ray.data.sources import open_source
    from amint_ray.storage import locate
    from infra.local.object_store import ObjectStore

    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        root = Path(name)
        source = open_source(photographs(options.imagenet).data)
        (output,) = plan_outputs(source, 1024)
        place = locate(str(root / "prepared"), "scratch")
        write_output(source, photographs(options.imagenet).data, output, place, "benchmark")
        with ObjectStore(root / "s3") as store:
            store.make_bucket("images")
            local = repeated(root / "prepared", root / "20k", options.images)
            large = repeated(root / "prepared", root / "100k", 5 * options.images)
            small = repeated(root / "prepared", root / "10k", options.images // 2)
            repeated(root / "prepared", store.folder / "buckets" / "images" / "20k", options.images)
            plain: dict[str, str] = {}
            ways: dict[str, tuple[str, Config, int, dict[str, str]]] = {
                "224 px, DataLoader": ("data_loader", photographs(local), options.take, plain),
                "224 px, amint_ray, local": ("ours", photographs(local), options.take, plain),
                "224 px, amint_ray, S3": (
                    "ours",
                    photographs("s3://images/20k"),
                    options.take,
                    dict(store.environment),
                ),
                "224 px, Ray Data": ("ray_data", photographs(local), options.take, plain),
                "CIFAR-10, DataLoader": (
                    "data_loader",
                    small_images(options.cifar10),
                    10 * options.take,
                    plain,
                ),
                "CIFAR-10, amint_ray": (
                    "ours",
                    small_images(options.cifar10),
                    50 * options.take,
                    plain,
                ),
                "epoch start": ("epoch_start", photographs(local, limit=1000), 0, plain),
                "share of a ResNet-50 step that waits": ("waiting", photographs(local), 6, plain),
                "memory, 10,000 images": ("memory", photographs(small), options.take, plain),
                "memory, 100,000 images": ("memory", photographs(large), options.take, plain),
            }
            for _ in range(options.repeats):
                for way, arguments in ways.items():
                    found.setdefault(way, []).append(measure(*arguments))
    return {
        way: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for way, runs in found.items()
    }


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imagenet", help="folder of Parquet files with photographs")
    parser.add_argument("--cifar10", help="folder of Parquet files with CIFAR-10")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--take", type=int, default=4_000, help="photographs in one measurement")
    parser.add_argument("--scratch", help="folder for temporary files")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    parser.add_argument("--amount", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        config = Config.model_validate_json(options.config)
        print(json.dumps(MEASURES[options.measure](config, options.amount)))
        return
    found = run(options)
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        return
    print("| way | figure | ratio |\n|---|---|---|")
    for way, figures in found.items():
        base = found.get(f"{way.split(',')[0]}, DataLoader", {}).get("per_second")
        ratio = f"{figures['per_second'] / base:.2f}" if base and "per_second" in figures else ""
        text = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
        print(f"| {way} | {text} | {ratio} |")


if __name__ == "__main__":
    main()
