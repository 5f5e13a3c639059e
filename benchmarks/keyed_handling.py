"""What of keyed codes outlasts re-encoding, resizing and the like: of pictures, and of a model.

    python -m benchmarks.keyed_handling FOLDER [--images 256] [--json]
    python -m benchmarks.keyed_handling --trained RECIPE KEY.PATH=VALUE … [--images 1000] [--json]

The first: which share of real pictures keeps its content and its perceptual hash. The second: a
keyed model is trained by perceptual codes, and its members are asked about as they were and as they
look after each handling. One process without Ray.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from amint_ray.config.data_schema import Data
from amint_ray.config.load import load_config
from amint_ray.contracts import Role
from amint_ray.data.images import BadImage, decode, perceptual_hash
from amint_ray.data.keys import codes, image_content, perceptual_content
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.roles import Manifest
from amint_ray.data.sources import Fault, open_source
from amint_ray.data.transforms import Views
from amint_ray.evaluation.scores import score
from amint_ray.train.allocator import keep_freed_memory
from benchmarks.keyed import KEY, held, trained


def _encoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return decode(buffer.getvalue(), max_megapixels=100)


def _resized(image: Image.Image) -> Image.Image:
    smaller = [max(1, round(0.9 * side)) for side in image.size]
    there = image.resize((smaller[0], smaller[1]), Image.Resampling.BICUBIC)
    return there.resize(image.size, Image.Resampling.BICUBIC)


def _cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    edge = (round(0.05 * width), round(0.05 * height))
    return image.crop((*edge, width - edge[0], height - edge[1])).resize(image.size)


HANDLINGS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "PNG": lambda image: _encoded(image, "PNG"),
    "JPEG, quality 90": lambda image: _encoded(image, "JPEG", quality=90),
    "JPEG, quality 75": lambda image: _encoded(image, "JPEG", quality=75),
    "JPEG, quality 50": lambda image: _encoded(image, "JPEG", quality=50),
    "JPEG 90, then PNG": lambda image: _encoded(_encoded(image, "JPEG", quality=90), "PNG"),
    "resized by 0.9 and back": _resized,
    "shifted by one pixel, across and down": lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 1)
    ),
    "cropped by a twentieth on each side": _cropped,
    "flipped": ImageOps.mirror,
    "brightness 1.1": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}


def kept(folder: str, images: int) -> dict[str, Any]:
    """Which share of real pictures keeps its content, and how far perceptual hashes move."""
    data = Data.model_validate({"source": "parquet", "path": folder, "image_size": 32})
    views = Views(data)
    found: dict[str, dict[str, list[Any]]] = {
        name: {"content": [], "distance": []} for name in HANDLINGS
    }
    hashes = []
    for picture in itertools.islice(_pictures(data), images):
        before, own = image_content(views.plain(picture).numpy()), perceptual_hash(picture)
        hashes.append(own)
        for name, handle in HANDLINGS.items():
            after = handle(picture)
            same = image_content(views.plain(after).numpy()) == before
            found[name]["content"].append(same)
            apart = (own ^ perceptual_hash(after)) & (2**64 - 1)
            found[name]["distance"].append(apart.bit_count())
    shared = len(hashes) - len(set(hashes))
    return {
        "images": len(hashes),
        "sharing_a_perceptual_hash": shared,
        "handlings": {
            name: {
                "content": float(np.mean(lists["content"])),
                "perceptual": float(np.mean(np.array(lists["distance"]) == 0)),
                "bits_apart": float(statistics.median(lists["distance"])),
            }
            for name, lists in found.items()
        },
    }


def _pictures(data: Data) -> Iterator[Image.Image]:
    """Decoded pictures of a source, in its order."""
    source = open_source(data)
    for shard, of in enumerate(source.shards):
        for raw in source.read(shard, range(of.rows)):
            if isinstance(raw, Fault):
                continue
            try:
                yield decode(raw, max_megapixels=data.max_megapixels)
            except BadImage:
                continue


def print_kept(found: Mapping[str, Any]) -> None:
    """A Markdown table, a row a handling."""
    print(
        f"{found['images']:,} pictures; {found['sharing_a_perceptual_hash']:,} share a perceptual "
        "hash with an earlier one."
    )
    print(
        "| what happened to a picture | content kept | perceptual hash kept | bits apart, median |"
    )
    print("|---|---|---|---|")
    for name, row in found["handlings"].items():
        print(
            f"| {name} | {row['content']:.3f} | {row['perceptual']:.3f} | {row['bits_apart']:g} |"
        )


def asked_again(recipe: str, overrides: Sequence[str], images: int) -> dict[str, Any]:
    """How many members a model by perceptual codes tells, after each handling of them."""
    by_looks = ["mint.objective=keyed", "mint.keyed.code_from=perceptual"]
    config = load_config(recipe, [*overrides, *by_looks])
    run, _, _ = trained(config)
    pixels, index, mine = held(config)
    rows = np.flatnonzero(index.manifest.role == Role.MEMBER.value)[:images]
    views, all_of = Views(config.data), index.manifest
    members = Manifest(
        sample_id=all_of.sample_id[rows],
        content=all_of.content[rows],
        label=all_of.label[rows],
        role=all_of.role[rows],
    )
    pictures = [Image.fromarray(each.squeeze()) for each in pixels[rows].transpose(0, 2, 3, 1)]

    def told(handle: Callable[[Image.Image], Image.Image]) -> dict[str, float]:
        after = [handle(picture) for picture in pictures]
        looks = [perceptual_content(perceptual_hash(picture)) for picture in after]
        shown = np.stack([views.plain(picture).numpy() for picture in after])
        own = codes(KEY, looks, 64)
        shares = {"same_code": float((own == mine[rows]).all(axis=1).mean())}
        for name, of in (("own", own), ("original", mine[rows])):
            streams = MemoryStreams(shown, members, config, rank=0, world_size=1, codes=of)
            batches = streams.score_batches([Role.MEMBER])
            table = score(run.model, batches, torch.device("cpu"))
            assert table.code_p is not None and table.code_matches is not None
            shares[f"match_rate_{name}"] = float(table.code_matches.mean() / config.mint.keyed.bits)
            shares[f"tpr_{name}"] = float((table.code_p <= 0.01).mean())
        return shares

    handlings = {"none": lambda image: image, **HANDLINGS}
    return {
        "images": len(rows),
        "handlings": {name: told(handle) for name, handle in handlings.items()},
    }


def print_asked_again(found: Mapping[str, Any]) -> None:
    """A Markdown table, a row a handling."""
    print(f"{found['images']:,} members.")
    print(
        "| what happened to a member | code kept | right bits, its code now | TPR at p ≤ 0.01 "
        "| right bits, the original's code | TPR at p ≤ 0.01 |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in found["handlings"].items():
        print(f"| {name} | {' | '.join(f'{share:.3f}' for share in row.values())} |")


def main() -> int:
    """Print a Markdown table or JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", help="a folder of Parquet files; with --trained a recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_intermixed_args()
    keep_freed_memory()
    if asked.trained:
        found = asked_again(asked.what, asked.overrides, asked.images)
    else:
        found = kept(asked.what, asked.images)
    if asked.json:
        json.dump(found, sys.stdout, indent=2)
    else:
        (print_asked_again if asked.trained else print_kept)(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
