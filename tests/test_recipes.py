"""Every shipped recipe fits together; one of each kind trains as it stands. Without Ray."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from amint_ray.config.load import load_config, recipe_names
from amint_ray.contracts import Role, Streams
from amint_ray.data.index import index_here
from amint_ray.data.loading import MemoryStreams, check_roles
from amint_ray.data.memory import choose_mode, load_memory
from amint_ray.data.sources import count, open_source
from amint_ray.data.streaming import StreamedStreams
from amint_ray.evaluation.report import evaluate
from amint_ray.launch.prepare import step_flops
from amint_ray.model.joint import plan_architecture
from amint_ray.train.loop import LocalContext, train

CLASSES = 3
TRAINED = ("digits", "mnist_vit", "cifar10_mobilenet", "tiny_imagenet_vit")
TRAINED += ("imagenet1k_efficientnet_b0",)


def write_split(path: Path, count: int, *, size: int, seed: int) -> None:
    """Noise as PNGs in the hub's layout."""
    random = np.random.default_rng(seed)
    images, labels = [], random.integers(0, CLASSES, count)
    labels[0] = CLASSES - 1
    for _ in range(count):
        encoded = io.BytesIO()
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(encoded, format="png")
        images.append({"bytes": encoded.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": labels}), path)


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipe_fits_together_and_its_step_is_counted(recipe: str) -> None:
    config = load_config(recipe)
    assert config.name == recipe
    architecture = plan_architecture(config, CLASSES)
    assert architecture.early_exit
    assert architecture.input_shape[1] == config.data.image_size
    flops = step_flops(config, architecture)
    # All D rows, the trunk up to the last tap again for E and for plain views of D, and the head.
    again = (config.external_rows + config.plain_rows) / config.train.batch_size
    trunk = 1 + again * architecture.taps[-1].depth
    assert 0.96 * trunk < flops.ratio < trunk + 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAINED)
def test_recipe_trains_one_epoch_and_is_measured(recipe: str, tmp_path: Path) -> None:
    size = load_config(recipe).data.image_size
    overrides = ["train.epochs=1", "train.warmup_epochs=0", "train.batch_size=4"]
    overrides.append("evaluation.batch_size=8")
    if load_config(recipe).data.source == "parquet":
        write_split(tmp_path / "train-0.parquet", 50, size=size + 2, seed=1)
        write_split(tmp_path / "test-0.parquet", 6, size=size, seed=2)
        overrides.append(f"data.path={tmp_path}")
    else:
        overrides.append("data.limit=60")
    config = load_config(recipe, overrides)
    source = open_source(config.data)
    streams: Streams
    if choose_mode(source, config.data) == "streamed":
        index = index_here(source, config.data, readers=1)
        streams = StreamedStreams(source, index.rows(), config, rank=0, world_size=1, readers=1)
    else:
        images, index = load_memory(source, config.data, readers=1)
        streams = MemoryStreams(images, index.manifest, config, rank=0, world_size=1)
    manifest = index.manifest
    check_roles(manifest, config)
    architecture = plan_architecture(config, len(index.class_names))
    assert architecture.early_exit
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trained = train(config, architecture, streams, LocalContext(tmp_path))
    finally:
        torch.set_num_threads(threads)
        streams.close()
    assert len(trained.scores) == count(source)
    assert len(trained.scores.of(Role.TEST)) == manifest.counts["test"]
    figures = evaluate(trained.scores, config.evaluation)
    assert figures["membership"]["member"]["auc"]["value"] is not None
