"""What a process of an audit looks at, and what it leaves; without Ray."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launch.silent import Silent
from PIL import Image
from sklearn.datasets import load_digits

from amint_ray.config.audit import AuditSettings
from amint_ray.config.load import load_config
from amint_ray.data.parquet import ParquetSource
from amint_ray.evaluation.reference import draw_projection
from amint_ray.launch.attack_parts import read_arrays
from amint_ray.launch.audit_suspects import find_suspects
from amint_ray.launch.audit_worker import CODE_LOGITS, Asked, Examiner
from amint_ray.model.joint import AuditedModel, plan_architecture
from amint_ray.storage import locate

ROWS = 40
CLASSES = [str(i) for i in range(10)]


def write_parquet(file: Path, labels: list[int]) -> None:
    """Digits in one row group; the fourth is torn."""
    images = []
    for pixels in load_digits().images[: len(labels)]:
        buffer = io.BytesIO()
        Image.fromarray((pixels * 15).astype(np.uint8)).save(buffer, "png")
        images.append(buffer.getvalue())
    images[3] = images[3][:40]
    table = {"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64())}
    pq.write_table(pa.table(table), file)


def look(folder: Path, suspects: Path, *overrides: str, **settings: Any) -> dict[str, np.ndarray]:
    """What an untrained model says of the suspects, a batch of 16 at a time."""
    config = load_config("digits", list(overrides))
    architecture = plan_architecture(config, len(CLASSES))
    torch.manual_seed(0)
    model = AuditedModel(architecture).eval()
    with model.leaving_means() as means:
        model(torch.zeros(1, *architecture.input_shape), labels=torch.zeros(1, dtype=torch.long))
    given = AuditSettings(image_column="image", label_column="label", **settings)
    asked = Asked(
        found=find_suspects(str(suspects), given, CLASSES, Silent()),
        data=config.data,
        evidence=given.evidence,
        batch_size=16,
        projection=draw_projection(means[0].shape[1]),
        needs_labels="loss" in architecture.head.inputs,
        code_from="content" if architecture.head.bits else None,
        place=locate(str(folder), "test"),
    )
    examiner = Examiner(asked, architecture, model.state_dict(), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert examiner.look("part", list(range(len(asked.found.source.shards)))) == ROWS
    torch.set_num_threads(threads)
    return read_arrays(asked.place, "part")


def test_a_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = load_digits().target[:ROWS].tolist()
    write_parquet(tmp_path / "suspects.parquet", labels)
    asked_for = []
    read = ParquetSource.read

    def counted(source: ParquetSource, shard: int, rows: Any) -> Any:
        asked_for.append((shard, len(rows)))
        return read(source, shard, rows)

    monkeypatch.setattr(ParquetSource, "read", counted)
    found = look(tmp_path / "out", tmp_path / "suspects.parquet")
    assert asked_for == [(0, ROWS)]
    assert found["label"].tolist() == labels
    usable = np.arange(ROWS) != 3
    assert ((found["problem"] == "") == usable).all()
    assert found["mint_logit"].shape == (ROWS - 1,)
    assert found["told.entropy"].shape[1] == found["taps"].shape[0] == ROWS - 1


def test_a_head_that_needs_labels_is_silent_without(tmp_path: Path) -> None:
    labels = load_digits().target[:ROWS].tolist()
    labels[10:20] = [-1] * 10
    write_parquet(tmp_path / "suspects.parquet", labels)
    found = look(tmp_path / "out", tmp_path / "suspects.parquet", "mint.inputs=[loss]")
    labelled = found["label"][found["problem"] == ""] >= 0
    assert (~labelled).sum() == 10
    assert (np.isfinite(found["mint_logit"]) == labelled).all()
    assert np.isfinite(found["told.entropy"]).all()  # the outputs speak of all
    both = ("mint.inputs=[loss]", "mint.objective=both")
    coded = look(tmp_path / "codes", tmp_path / "suspects.parquet", *both)
    assert (np.isfinite(coded[CODE_LOGITS]).all(axis=1) == labelled).all()
    unlabelled = look(
        tmp_path / "none", tmp_path / "suspects.parquet", "mint.inputs=[loss]", labels=False
    )
    assert np.isnan(unlabelled["mint_logit"]).all()
