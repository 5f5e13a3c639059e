"""What registering and loading a model costs beside copying its weights.

    python -m benchmarks.registry_speed [--repeats 5] [--quick] [--json]

ViT-B/16 with random weights, the local stack's S3, PostgreSQL and MLflow server, whose clients hold
no S3 keys. In each repeat, in turn:

- boto3 copies the weights file to the same S3 and back;
- the model's folder is registered through the server, loaded by `amint_ray.load`, and fetched once
  more by MLflow's client alone;
- the same with the parts of large files going straight to S3 and back by addresses that the server
  signs (MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD and _DOWNLOAD).

Ratios are those of the same repeat. Writing the folder, which copies the weights and exports the
program, comes before, as it does in a run, and is told apart; so is what loading does when the
files are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from infra.local.stack import LocalStack

_DIRECT = {
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true",
    # MLflow sends files below 500 MB in one part, through the server.
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(50 * 2**20),
}
_WAYS: dict[str, Mapping[str, str]] = {"proxied": {}, "parts": _DIRECT}


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _seconds(call: Callable[[], object]) -> float:
    os.sync()  # what was written before must not be paid for now
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _settle(s3: Any) -> None:
    """Ask for every object's ETag: rclone computes it at the first reading, S3 at the upload."""
    for bucket in ("amint", "mlflow"):
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                s3.head_object(Bucket=bucket, Key=entry["Key"])


def _write(folder: Path, backbone: str, size: int) -> float:
    """Write a model's folder; how long that takes, not counting the model's own making."""
    import numpy as np
    import torch

    from amint_ray.config.data_schema import Data
    from amint_ray.model.joint import AuditedModel, plan
    from amint_ray.model.mint_head import HeadSpec
    from amint_ray.tracking.folder import write_folder
    from amint_ray.train.state import save_weights

    torch.manual_seed(0)
    architecture = plan(
        backbone,
        options={},
        num_classes=1000,
        input_shape=(3, size, size),
        taps=["middle"],
        head=HeadSpec(),
    )
    weights = folder.with_name("trained.safetensors")
    save_weights(AuditedModel(architecture), weights)

    def write() -> None:
        reason = write_folder(
            folder,
            weights=weights,
            architecture=architecture,
            data=Data(image_size=size),
            class_names=[str(number) for number in range(1000)],
            calibration=np.linspace(-3, 3, 1000),
        )
        if reason is not None:
            raise RuntimeError(reason)

    seconds = _seconds(write)
    weights.unlink()
    return seconds


def measure(stack: LocalStack, repeats: int, backbone: str, size: int) -> dict[str, Any]:
    """All ways in turn, so that a machine whose speed drifts hurts all alike."""
    import boto3
    import mlflow

    import amint_ray
    from amint_ray.tracking import registry
    from amint_ray.tracking.registered import read_model

    mlflow.set_tracking_uri(stack.environment["MLFLOW_TRACKING_URI"])
    client = mlflow.MlflowClient()
    folder = stack.folder / "model"
    written = _write(folder, backbone, size)
    weights = folder / "model.safetensors"
    session = boto3.Session(
        stack.environment["AWS_ACCESS_KEY_ID"], stack.environment["AWS_SECRET_ACCESS_KEY"]
    )
    with _variables(stack.environment):
        s3 = session.client("s3", region_name="us-east-1")
    copy = stack.folder / "copy"
    found: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):  # the first warms everything up and is left out
        print(f"repeat {repeat} of {repeats} …", file=sys.stderr)
        seconds: dict[str, float] = {}
        there = partial(s3.upload_file, str(weights), "amint", f"copy-{repeat}")
        back = partial(s3.download_file, "amint", f"copy-{repeat}", str(copy))
        seconds["boto3, there"] = _seconds(there)
        _settle(s3)
        seconds["boto3, back"] = _seconds(back)
        for way, variables in _WAYS.items():
            name = f"{way}-{repeat}"
            run_id = client.create_run("0").info.run_id
            send = partial(registry.register, folder, name, run_id=run_id, tags={}, description="")
            with _variables(variables):
                seconds[f"{way}, registered"] = _seconds(send)
                _settle(s3)
                seconds[f"{way}, loaded"] = _seconds(partial(amint_ray.load, f"models:/{name}/1"))
                with tempfile.TemporaryDirectory() as place:
                    fetch = partial(mlflow.artifacts.download_artifacts, f"models:/{name}/1")
                    seconds[f"{way}, fetched"] = _seconds(partial(fetch, dst_path=place))
        seconds["checked and built"] = _seconds(lambda: read_model(folder))
        for key, value in seconds.items() if repeat else ():
            found.setdefault(key, []).append(value)
        shutil.rmtree(stack.folder / "s3/buckets/mlflow/artifacts", ignore_errors=True)
        s3.delete_object(Bucket="amint", Key=f"copy-{repeat}")
    ratios = {
        f"{way}, {what}": [
            mine / plain
            for mine, plain in zip(found[f"{way}, {what}"], found[f"boto3, {other}"], strict=True)
        ]
        for way in _WAYS
        for what, other in (("registered", "there"), ("fetched", "back"), ("loaded", "back"))
    }
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return {
        "backbone": backbone,
        "seconds": found,
        "ratios": ratios,
        "seconds_to_write_the_folder": written,
        "bytes": {**files, "all": sum(files.values())},
        "bytes_ratio": sum(files.values()) / files["model.safetensors"],
    }


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _table(found: Mapping[str, Any]) -> str:
    lines = ["| median (least to most) | seconds | over boto3 |", "|---|---|---|"]
    for name, values in found["seconds"].items():
        ratio = found["ratios"].get(name)
        lines.append(f"| {name} | {_spread(values)} | {_spread(ratio) if ratio else '–'} |")
    sizes = found["bytes"]
    return "\n".join(
        [
            *lines,
            "",
            f"the folder was written in {found['seconds_to_write_the_folder']:.1f} s; it has "
            f"{sizes['all']:,} bytes, {found['bytes_ratio']:.4f} of the weights' "
            f"{sizes['model.safetensors']:,}; the program has {sizes['program.pt2']:,}",
        ]
    )


def main() -> None:
    """Run, and print a Markdown table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="see whether it runs; no figures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    backbone, size = ("resnet18", 32) if options.quick else ("vit_base_patch16_224", 224)
    repeats = 1 if options.quick else options.repeats
    with (
        tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder,
        LocalStack(folder, ray=False) as stack,
    ):
        found = measure(stack, repeats, backbone, size)
    print(json.dumps(found, indent=2) if options.json else _table(found))


if __name__ == "__main__":
    main()
