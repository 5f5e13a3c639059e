"""The joint step of a large ViT on a GPU: images a second, and the share of the card's arithmetic.

Needs torch and timm alone. `python -m benchmarks.step_gpu` takes ViT-B/16 at 224 pixels, bfloat16,
compiled, several batch sizes; the card's own rate is measured on matrix products in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch._dynamo

from amint_ray.model.joint import Architecture, plan
from amint_ray.model.mint_head import HeadSpec
from amint_ray.model.placement import PLACEMENTS
from benchmarks.step_time import Step, build, count

WAYS = ("task", "authors", "concat", "early_exit", "detached", "views")


@dataclass(frozen=True)
class Row:
    """One way at one batch size.

    Attributes:
        placement: of the taps.
        way: as in `step_time`; `task` is the audited-only step.
        rows: images of D in the step, with as many of E.
        seconds: median.
        time_ratio: to `task` at the same batch size.
        flop_ratio: likewise, counted.
        over_floor: time_ratio / flop_ratio.
        images_per_second: of D.
        mfu: FLOPs a second over the card's measured rate. Counted are both passes, forward and
            backward, as eager torch runs them, the head's included; a compiled `authors` does more.
        peak_gib: of allocated memory, weights and optimiser included; 0 where there is no GPU.
    """

    placement: str
    way: str
    rows: int
    seconds: float
    time_ratio: float
    flop_ratio: float
    over_floor: float
    images_per_second: float
    mfu: float
    peak_gib: float


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOPs a second of square matrix products: the best of ten."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, a, out=product)

    times = [seconds(multiply, device) for _ in range(12)][2:]
    return 2 * size**3 / min(times)


def seconds(step: Step, device: str) -> float:
    """One step, the device's work included."""
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - started


def measure(
    placement: str,
    architecture: Architecture,
    rows: int,
    *,
    device: str,
    precision: str,
    compiled: bool,
    rate: float,
    repeats: int,
    ways: Sequence[str],
) -> list[Row]:
    """All ways at one batch size, one after the other: two compiled models may not fit at once."""
    flops = {way: count(build(way, architecture, rows, "meta"))[0] for way in ways}
    found: list[Row] = []
    for way in ways:
        step = build(way, architecture, rows, device, precision=precision, compiled=compiled)
        for _ in range(3):
            step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = statistics.median(seconds(step, device) for _ in range(repeats))
        time_ratio = taken / (found[0].seconds if found else taken)
        flop_ratio = flops[way] / flops["task"]
        found.append(
            Row(
                placement=placement,
                way=way,
                rows=rows,
                seconds=taken,
                time_ratio=time_ratio,
                flop_ratio=flop_ratio,
                over_floor=time_ratio / flop_ratio,
                images_per_second=rows / taken,
                mfu=flops[way] / taken / rate,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
            )
        )
        print(f"step_gpu: {json.dumps(asdict(found[-1]))}", file=sys.stderr)
        # Or else the second batch size would be compiled for any size, unlike a run's one, and the
        # model, which compiling makes part of a cycle, would count into the next way's memory.
        del step
        torch._dynamo.reset()
        gc.collect()
    return found


def where_time_goes(step: Step, device: str) -> str:
    """The ten operations that take longest, as torch's profiler has it."""
    with torch.profiler.profile() as profile:
        step()
        _synchronize(device)
    by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON document on stdout; progress and the profile on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.precision)
    rate = matmul_rate(arguments.device, dtype, 8192 if arguments.device == "cuda" else 512)
    print(f"step_gpu: matrix products at {rate / 1e12:.1f} TFLOP/s", file=sys.stderr)
    found: list[Row] = []
    # The others are told in ratios to the audited-only step.
    ways = list(dict.fromkeys(["task", *arguments.ways]))
    for placement in arguments.placements:
        architecture = plan(
            arguments.model,
            options={},
            num_classes=1000,
            input_shape=(3, arguments.size, arguments.size),
            taps=[placement],
            head=HeadSpec(),
        )
        for rows in arguments.rows:
            print(f"step_gpu: {placement}, {rows} rows", file=sys.stderr)
            found += measure(
                placement,
                architecture,
                rows,
                device=arguments.device,
                precision=arguments.precision,
                compiled=not arguments.eager,
                rate=rate,
                repeats=arguments.repeats,
                ways=ways,
            )
    step = build(
        "early_exit",
        architecture,
        arguments.rows[-1],
        arguments.device,
        precision=arguments.precision,
        compiled=not arguments.eager,
    )
    step()
    print(where_time_goes(step, arguments.device), file=sys.stderr)
    json.dump({"matmul_flops": rate, "rows": [asdict(row) for row in found]}, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
