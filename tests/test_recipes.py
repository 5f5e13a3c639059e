"""Every shipped recipe trains as it stands, on images of its kind; without Ray."""

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
from amint_ray.contracts import Role
from amint_ray.data.loading import MemoryStreams, check_roles
from amint_ray.data.sources import load_source
from amint_ray.evaluation.report import evaluate
from amint_ray.model.joint import plan_architecture
from amint_ray.train.loop import LocalContext, train

CLASSES = 3


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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_recipe_trains_one_epoch_and_is_measured(recipe: str, tmp_path: Path) -> None:
    size = load_config(recipe).data.image_size
    overrides = ["train.epochs=1", "train.batch_size=4", "evaluation.batch_size=8"]
    if load_config(recipe).data.source == "parquet":
        write_split(tmp_path / "train-0.parquet", 30, size=size + 2, seed=1)
        write_split(tmp_path / "test-0.parquet", 6, size=size, seed=2)
        overrides.append(f"data.path={tmp_path}")
    else:
        overrides.append("data.limit=60")
    config = load_config(recipe, overrides)
    source = load_source(config.data)
    manifest = source.manifest(config.data)
    check_roles(manifest, config)
    architecture = plan_architecture(config, len(source.class_names))
    assert architecture.early_exit
    streams = MemoryStreams(source.images, manifest, config, rank=0, world_size=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trained = train(config, architecture, streams, LocalContext(tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert len(trained.scores) == len(source.sample_id)
    assert len(trained.scores.of(Role.TEST)) == manifest.counts["test"]
    figures = evaluate(trained.scores, config.evaluation)
    assert figures["membership"]["member"]["auc"]["value"] is not None
