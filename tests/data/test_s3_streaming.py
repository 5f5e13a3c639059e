"""Streaming from a real S3 server, also while objects vanish and the server keeps silent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver

import boto3
import numpy as np
import pytest

from amint_ray.config.schema import Config
from amint_ray.contracts import Role, RunError
from amint_ray.data.index import Index, index_here
from amint_ray.data.preparing import (
    mark_finished,
    plan_fingerprint,
    plan_outputs,
    write_output,
)
from amint_ray.data.sources import Source, open_source
from amint_ray.data.streaming import StreamedStreams
from amint_ray.storage import locate
from infra.local.object_store import ObjectStore

BUCKET = "pictures"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A server of this module's own, since its objects are taken away and it is made to hang."""
    folder = tmp_path_factory.mktemp("s3")
    forkserver._forkserver._stop()  # an earlier test's has another environment
    with pytest.MonkeyPatch.context() as patch, ObjectStore(folder) as running:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        running.make_bucket(BUCKET)
        yield running
    forkserver._forkserver._stop()


def put(prefix: str, limit: int) -> str:
    """Digits as Parquet files of 512 and fewer under a prefix; gives the address."""
    config = Config.model_validate({"data": {"limit": limit}})
    source = open_source(config.data)
    outputs = plan_outputs(source, 0.001)
    assert len(outputs) == -(-limit // 512)
    where = locate(f"s3://{BUCKET}/{prefix}", "test")
    for output in outputs:
        fingerprint = plan_fingerprint(source, config.data, outputs)
        write_output(source, config.data, output, where, fingerprint)
    mark_finished(where, {})
    return where.uri


def opened(address: str, **data: object) -> tuple[Config, Source, Index]:
    config = Config.model_validate(
        {
            "data": {
                "source": "parquet",
                "path": address,
                "image_size": 8,
                "channels": 1,
                "mode": "streamed",
                "timeout_seconds": 1.0,
                "window": 8,
                "shares": {
                    "member": 0.4,
                    "withheld": 0.1,
                    "external": 0.3,
                    "calibration": 0.1,
                    "test": 0.1,
                },
                **data,
            },
            "train": {"batch_size": 20, "epochs": 3},
        }
    )
    source = open_source(config.data)
    return config, source, index_here(source, config.data, readers=2)


def streams(config: Config, source: Source, index: Index) -> StreamedStreams:
    return StreamedStreams(source, index.rows(), config, rank=0, world_size=1, readers=2)


def test_each_image_comes_once_an_epoch(store: ObjectStore) -> None:
    config, source, index = opened(put("whole", 1000))
    local = index_here(open_source(Config().data), config.data, readers=1).manifest
    roles = dict(zip(local.content.tolist(), local.role.tolist(), strict=True))
    assert [roles[c] for c in index.manifest.content.tolist()] == index.manifest.role.tolist()
    reading = streams(config, source, index)
    seen: list[str] = []
    for batch in reading.train_batches(0):
        seen += batch.sample_id[: batch.n_task].tolist()
        assert batch.images.shape[1:] == (1, 8, 8)
    trains = np.isin(index.manifest.role, [r.value for r in Role if r.trains_task])
    assert sorted(seen) == sorted(index.manifest.sample_id[trains].tolist())
    assert not reading.lost
    scored = [name for b in reading.score_batches([Role.TEST]) for name in b.sample_id.tolist()]
    expected = index.manifest.sample_id[index.manifest.role == "test"]
    assert sorted(scored) == sorted(expected.tolist())
    reading.close()


def test_objects_that_vanish_are_missing_from_batches_and_told(store: ObjectStore) -> None:
    config, source, index = opened(put("vanish", 1024), max_bad_fraction=0.9)
    reading = streams(config, source, index)
    list(reading.train_batches(0))
    assert not reading.lost
    gone = "train-00000-of-00002.parquet"
    boto3.session.Session().client("s3").delete_object(Bucket=BUCKET, Key=f"vanish/{gone}")
    later = [b for epoch in (1, 2) for b in reading.train_batches(epoch)]
    assert 0 < len(reading.lost) < 1024
    assert all(name.startswith(gone) for name in reading.lost)
    assert all(gone in reason for reason in reading.lost.values())
    d_of_gone = sum(
        name.startswith(gone) and role in ("member", "withheld")
        for name, role in zip(index.manifest.sample_id, index.manifest.role, strict=True)
    )
    last = later[reading.steps_per_epoch :]
    full = round(sum(b.task_per_worker for b in last))
    assert sum(b.n_task for b in last) == full - d_of_gone
    for batch in later:
        assert len(batch.images) == len(batch.labels) == len(batch.sample_id)
        assert len(batch.membership) == len(batch.told) == len(batch.images) - batch.head_from
    reading.close()


def test_too_many_lost_images_stop_the_run_with_one_line(store: ObjectStore) -> None:
    config, source, index = opened(put("stop", 600), max_bad_fraction=0.001)
    for number in (0, 1):
        key = f"stop/train-{number:05d}-of-00002.parquet"
        boto3.session.Session().client("s3").delete_object(Bucket=BUCKET, Key=key)
    reading = streams(config, source, index)
    with pytest.raises(RunError, match=r"can no longer be read.*max_bad_fraction = 0\.001") as told:
        list(reading.train_batches(0))
    assert len(str(told.value).splitlines()) == 1
    assert store.environment["AWS_SECRET_ACCESS_KEY"] not in str(told.value)
    reading.close()


@pytest.mark.slow
def test_a_server_that_keeps_silent_is_not_waited_for_forever(store: ObjectStore) -> None:
    config, source, index = opened(put("silent", 600), max_bad_fraction=1.0)
    reading = streams(config, source, index)
    assert store.pid is not None
    os.kill(store.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RunError, match="storage no longer answers: train-0000") as told:
            list(reading.train_batches(0))
    finally:
        os.kill(store.pid, signal.SIGCONT)
    assert len(str(told.value).splitlines()) == 1
    reading.close()
    again = streams(config, source, index)
    assert sum(b.n_task for b in again.train_batches(0)) > 200
    assert not again.lost
    again.close()
