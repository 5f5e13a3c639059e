"""What an audit costs, and whether its error rates hold.

    python -m benchmarks.audits --rate CIFAR10_FOLDER [--images 4000] [--repeats 5]
    python -m benchmarks.audits --memory
    python -m benchmarks.audits --errors [RECIPE [KEY=VALUE …]] [--seeds 3] [--draws 200]

`--rate`: images a second of one process on one core that asks the MINT head alone, against a plain
loop (read, decode, resize, whole forward pass) over the same files, and the same with images in
memory already. `--memory`: the largest resident size of the driver for 1,000 and for 100,000
suspects. `--errors`: of models of a recipe with other splits and seeds, trained in this process:
false positives among `test` images at several levels, false discoveries in mixtures of members and
`test` images, and how often collections drawn from `test`, from members and from withheld images
are called members.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from amint_ray.audit.suspects import Settings, Suspects
from amint_ray.audit.verdict import Judgement, judge
from amint_ray.audit.yardstick import Yardstick
from amint_ray.config.audit import AuditSettings
from amint_ray.config.data_schema import Data
from amint_ray.config.load import load_config
from amint_ray.config.schema import Config
from amint_ray.contracts import Role
from amint_ray.data.images import decode
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.memory import load_memory
from amint_ray.data.roles import Manifest
from amint_ray.data.sources import Fault, count, open_source
from amint_ray.data.transforms import Views, to_model_input
from amint_ray.evaluation.outputs import Outputs, append_samples, outputs_of, stack_views
from amint_ray.evaluation.reference import Reference, draw_projection, read_reference
from amint_ray.evaluation.views import VIEWS, view
from amint_ray.launch.audit_suspects import Found, find_suspects
from amint_ray.launch.audit_worker import Asked, Examiner
from amint_ray.model.joint import AuditedModel, plan_architecture
from amint_ray.storage import locate
from amint_ray.train.loop import REFERENCE, LocalContext, train

_BATCH = 256
_NAMES = [str(i) for i in range(10)]


class _Nobody:
    """A watcher."""

    def phase(self, text: str) -> None:
        """Nobody looks."""

    def event(self, event: object) -> None:
        """Nobody looks."""

    def notice(self, text: str) -> None:
        """Nobody looks."""

    def heartbeat(self) -> None:
        """Nobody looks."""


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rate(path: str, *, images: int, repeats: int) -> dict[str, Any]:
    """Of the recipes' small ViT and of ResNet-18, at each placement."""
    torch.set_num_threads(1)
    settings = AuditSettings(evidence="head")
    found = find_suspects(path, settings, _NAMES, _Nobody())
    shards = _shards(found, images)
    rows = sum(found.source.shards[shard].rows for shard in shards)
    results: dict[str, Any] = {"images": rows, "total": count(found.source)}
    for name, recipe, overrides in (
        ("vit", "cifar10_vit", ["mint.head=mlp"]),
        ("resnet18", "cifar10_resnet50", ["model.backbone=resnet18", "mint.head=mlp"]),
    ):
        for placement in ("entry", "middle", "output"):
            rest = [*overrides, f"mint.taps={placement}", "mint.pool=4", f"data.path={path}"]
            result = _rate(load_config(recipe, rest), found, shards, rows, repeats)
            results[f"{name}-{placement}"] = result
            print(name, placement, result, file=sys.stderr, flush=True)
    return results


def _shards(found: Found, images: int) -> list[int]:
    chosen, rows = [], 0
    for shard, each in enumerate(found.source.shards):
        if rows >= images:
            break
        chosen.append(shard)
        rows += each.rows
    return chosen


def _rate(
    config: Config, found: Found, shards: list[int], rows: int, repeats: int
) -> dict[str, float]:
    data = config.data
    architecture = plan_architecture(config, 10)
    model = AuditedModel(architecture).eval().requires_grad_(False)
    channels = sum(tap.channels for tap in architecture.taps)
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        asked = Asked(
            found=found,
            data=data,
            evidence="head",
            batch_size=_BATCH,
            projection=draw_projection(channels),
            needs_labels=False,
            place=locate(folder, "audit.folder"),
        )
        examiner = Examiner(asked, architecture, model.state_dict(), torch.device("cpu"))
        held = _read(found, shards[:1], data)[: 4 * _BATCH]
        ours, plain, head_alone, whole = [], [], [], []
        for _ in range(repeats):
            ours.append(_seconds(lambda: examiner.look("part", shards)))
            plain.append(_seconds(lambda: _plain_loop(model, found, shards, data)))
            head_alone.append(_seconds(lambda: _in_memory(model.membership, held)))
            whole.append(_seconds(lambda: _in_memory(model.backbone, held)))
    ratios = [p / o for p, o in zip(plain, ours, strict=True)]
    trunk = [w / h for w, h in zip(whole, head_alone, strict=True)]
    return {
        "audit_per_second": rows / statistics.median(ours),
        "plain_per_second": rows / statistics.median(plain),
        "ratio": statistics.median(ratios),
        "ratio_in_memory": statistics.median(trunk),
        "trunk_share": architecture.taps[-1].depth,
    }


def _read(found: Found, shards: list[int], data: Data) -> torch.Tensor:
    views, pixels = Views(data), []
    for shard in shards:
        for raw in found.source.read(shard, range(found.source.shards[shard].rows)):
            assert not isinstance(raw, Fault)
            pixels.append(views.plain(decode(raw, max_megapixels=data.max_megapixels)))
    return to_model_input([torch.stack(pixels)], data)


@torch.inference_mode()
def _plain_loop(model: AuditedModel, found: Found, shards: list[int], data: Data) -> None:
    """What one would write: decode, resize, and the whole network."""
    views = Views(data)
    for shard in shards:
        rows = found.source.shards[shard].rows
        for first in range(0, rows, _BATCH):
            pixels = []
            for raw in found.source.read(shard, range(first, min(first + _BATCH, rows))):
                assert not isinstance(raw, Fault)
                pixels.append(views.plain(decode(raw, max_megapixels=data.max_megapixels)))
            model.backbone(to_model_input([torch.stack(pixels)], data))


@torch.inference_mode()
def _in_memory(forward: Callable[[torch.Tensor], object], images: torch.Tensor) -> None:
    for batch in torch.split(images, _BATCH):
        forward(batch)


def errors(recipe: str, overrides: list[str], *, seeds: int, draws: int) -> list[dict[str, Any]]:
    """A row a seed, which sets split and training."""
    rows = []
    for seed in range(seeds):
        own = [f"train.seed={seed}", f"data.split_seed={seed}", "cluster.workers=1"]
        row = _errors(load_config(recipe, [*overrides, *own]), draws=draws)
        rows.append({"seed": seed, **row})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _errors(config: Config, *, draws: int) -> dict[str, Any]:
    source = open_source(config.data)
    images, index = load_memory(source, config.data, readers=2)
    architecture = plan_architecture(config, len(index.class_names))
    streams = MemoryStreams(images, index.manifest, config, rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as name:
        folder = Path(name)
        trained = train(config, architecture, streams, LocalContext(folder))
        reference = read_reference(max(folder.glob("checkpoint_*")) / REFERENCE)
    calibration = trained.scores.of(Role.CALIBRATION).mint_logit
    looked = {
        role: _suspects(trained.model, images, index.manifest, role, config, reference)
        for role in (Role.TEST, Role.MEMBER, Role.WITHHELD)
    }

    yardstick = Yardstick(reference)

    def judged(suspects: Suspects) -> Judgement:
        measured = yardstick.measure(suspects)
        return judge(measured, yardstick, calibration, Settings(), confounders_clean=True)

    random = np.random.default_rng(config.train.seed)
    test, member = looked[Role.TEST], looked[Role.MEMBER]
    whole = judged(test)
    false_positives = {
        f"{name}@{level:g}": float(np.mean(whole.images[name] <= level))
        for name in ("p_head", "p_outputs", "p_value")
        for level in (0.05, 0.01)
    }
    discoveries = []
    for _ in range(draws):
        size = min(len(member), len(test)) // 2
        mixed = _joined(_drawn(member, size, random), _drawn(test, size, random))
        flagged = judged(mixed).images["flagged"]
        discoveries.append((int(flagged[size:].sum()), int(flagged.sum()), size))
    collections = {}
    for role, suspects in looked.items():
        for size in (10, 30, 100):
            if size > len(suspects) // 2:
                continue
            called = [
                (judged(_drawn(suspects, size, random)).document["p_value"] or 1.0)
                for _ in range(draws)
            ]
            collections[f"{role.value}-{size}"] = {
                f"{level:g}": float(np.mean(np.array(called) <= level)) for level in (0.05, 0.01)
            }
    return {
        "counts": index.manifest.counts,
        "false_positives": false_positives,
        "false_discovery_rate": float(np.mean([f / max(1, n) for f, n, _ in discoveries])),
        "called_of_members": float(np.mean([(n - f) / size for f, n, size in discoveries])),
        "collections": collections,
        "power": whole.document["power"],
        "unlike": whole.document["unlike"]["unlike"],
    }


@torch.inference_mode()
def _suspects(
    model: AuditedModel,
    images: npt.NDArray[np.uint8],
    manifest: Manifest,
    role: Role,
    config: Config,
    reference: Reference,
) -> Suspects:
    """What the model says of all images of a role, without labels, as if nobody knew more."""
    model.eval()
    at = np.flatnonzero(manifest.role == role.value)
    parts, scores, taps = [], [], []
    nobody = np.full(len(at), -1, np.int64)
    for some in np.array_split(at, max(1, len(at) // _BATCH)):
        pixels = to_model_input([torch.from_numpy(images[some])], config.data)
        labels = torch.from_numpy(manifest.label[some])
        with model.leaving_means() as means:
            seen = [model(view(pixels, number), labels=labels) for number in range(VIEWS)]
        scores.append(seen[0][1].double().numpy())
        taps.append(means[0].numpy() @ reference.projection)
        logits = [each.double().numpy() for each, _ in seen]
        views = stack_views([outputs_of(each, nobody[: len(some)]) for each in logits])
        parts.append((views, logits[0].argmax(1)))
    outputs = append_samples([views for views, _ in parts])
    return Suspects(
        content=manifest.content[at],
        label=nobody,
        prediction=np.concatenate([prediction for _, prediction in parts]),
        mint_logit=np.concatenate(scores),
        taps=np.concatenate(taps),
        finite=np.ones(len(at), np.bool_),
        told=outputs,
        untold=outputs,
    )


def _drawn(suspects: Suspects, size: int, random: np.random.Generator) -> Suspects:
    rows = random.permutation(len(suspects))[:size]
    kept: dict[str, Any] = {
        name: values.kept(rows) if isinstance(values, Outputs) else values[rows]
        for name, values in vars(suspects).items()
    }
    return Suspects(**kept)


def _joined(first: Suspects, second: Suspects) -> Suspects:
    def join(name: str) -> Any:
        parts = [getattr(first, name), getattr(second, name)]
        return append_samples(parts) if isinstance(parts[0], Outputs) else np.concatenate(parts)

    return Suspects(**{name: join(name) for name in vars(first)})


def memory() -> dict[str, Any]:
    """Each number of suspects in a process of its own."""
    import subprocess

    found = {}
    for suspects in (1_000, 100_000):
        command = [sys.executable, "-m", "benchmarks.audits", "--memory-of", str(suspects)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(suspects)] = json.loads(done.stdout)
        print(suspects, found[str(suspects)], file=sys.stderr, flush=True)
    return found


def memory_of(suspects: int) -> dict[str, float]:
    """Largest resident size, in MiB, of the driver of an audit of so many images of 8 pixels."""
    from amint_ray.launch.audit_run import run_audit
    from benchmarks.attacks import amint

    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as folder:
        run = amint(folder, ["train", "digits", "train.epochs=2", "data.confounder_check=false"])
        model = Path(folder) / "mlruns"
        (registered,) = {p.parent for p in model.rglob("reference.safetensors")}
        file = Path(folder) / "suspects.parquet"
        with pq.ParquetWriter(file, pa.schema({"image": pa.binary()})) as writer:
            for first in range(0, suspects, 1000):
                rows = [_png(random) for _ in range(min(1000, suspects - first))]
                writer.write_table(pa.table({"image": pa.array(rows, pa.binary())}))
        settings = [f"audit.folder={folder}/audits", "audit.image_column=image"]
        document = run_audit(str(registered), str(file), settings, _Nobody(), every=False)
        assert document["suspects"]["images"] == suspects, run["run_id"]
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "driver_mib": largest,
        "seconds": document["seconds"]["total"],
        "looking": document["seconds"]["looking"],
    }


def _png(random: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    pixels: npt.NDArray[np.uint8] = random.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Run, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("recipe", nargs="?", default="digits")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--rate", metavar="FOLDER")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.errors:
        json.dump(
            errors(options.recipe, options.overrides, seeds=options.seeds, draws=options.draws),
            sys.stdout,
            indent=1,
        )
        return
    if options.memory_of:
        found: dict[str, Any] = memory_of(options.memory_of)
    elif options.memory:
        found = memory()
    else:
        found = rate(options.rate, images=options.images, repeats=options.repeats)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
