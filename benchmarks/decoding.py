"""What an image costs before it is trained on: ways of decoding, and of transforming.

    python -m benchmarks.decoding --imagenet FOLDER [--repeats 5] [--json]

One thread, all ways in turn on the same photographs, in each repeat; ratios are to what the product
does. Every way ends with the same 224-pixel training transform but for what its name says.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from amint_ray.config.data_schema import Data
from amint_ray.data.images import decode
from amint_ray.data.transforms import Views

SIZE = 224
_VIEWS = Views(Data(image_size=SIZE, augment="timm", mode="streamed"))
_ON_TENSORS = v2.Compose(
    [
        v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4),
    ]
)


def product(encoded: bytes) -> None:
    """Pillow, then timm's transforms, as `data/reading.py` has it."""
    _VIEWS.task(decode(encoded, max_megapixels=178), seed=0)


def decode_alone(encoded: bytes) -> None:
    """The product's decoding without a transform."""
    decode(encoded, max_megapixels=178)


def drafted(encoded: bytes) -> None:
    """Pillow in draft mode: scaled in the DCT where twice the size is still there."""
    image = Image.open(io.BytesIO(encoded))
    image.draft("RGB", (SIZE, SIZE))
    _VIEWS.task(image.convert("RGB"), seed=0)


def torchvision_decoder(encoded: bytes) -> None:
    """Torchvision's decoder, turned into a Pillow image for the same transforms."""
    pixels = _tensor(encoded).permute(1, 2, 0).numpy()
    _VIEWS.task(Image.fromarray(pixels), seed=0)


def tensors_throughout(encoded: bytes) -> None:
    """Torchvision's decoder and torchvision's transforms on uint8 tensors."""
    torch.manual_seed(0)
    _ON_TENSORS(_tensor(encoded))


def _tensor(encoded: bytes) -> Any:
    return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)


WAYS: dict[str, Callable[[bytes], None]] = {
    "Pillow, timm's transforms (the product)": product,
    "the same, decoding alone": decode_alone,
    "Pillow in draft mode": drafted,
    "torchvision's decoder, then Pillow": torchvision_decoder,
    "torchvision's decoder and transforms": tensors_throughout,
}


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imagenet", required=True, help="folder of Parquet files with JPEGs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = pq.read_table(sorted(Path(options.imagenet).glob("*.parquet")), columns=["image"])
    images = [cell["bytes"] for cell in table["image"].to_pylist()]
    images = [encoded for encoded in images if encoded.startswith(b"\xff\xd8")]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(options.repeats + 1):
        for way, call in WAYS.items():
            started = time.perf_counter()
            for encoded in images:
                call(encoded)
            if repeat:  # the first warms up
                seconds[way].append(time.perf_counter() - started)
    base = next(iter(seconds.values()))
    found = {
        way: {
            "ms": 1000 * statistics.median(taken) / len(images),
            "ratio": statistics.median(t / b for t, b in zip(taken, base, strict=True)),
        }
        for way, taken in seconds.items()
    }
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        return
    print("| way | ms an image | of the product's time |\n|---|---|---|")
    for way, figures in found.items():
        print(f"| {way} | {figures['ms']:.2f} | {figures['ratio']:.2f} |")


if __name__ == "__main__":
    main()
