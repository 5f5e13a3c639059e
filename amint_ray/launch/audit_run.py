"""`amint audit`: did these images train that model?"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amint_ray.audit.suspects import Settings
from amint_ray.config.audit import AuditSettings, load_audit
from amint_ray.config.data_schema import Data
from amint_ray.config.schema import Cluster
from amint_ray.contracts import RunError, UserError, Watcher, first_line, numbered
from amint_ray.data.sources import count
from amint_ray.launch.attack_parts import code_fingerprint, fingerprint_of
from amint_ray.launch.audit_key import check_key, given_key
from amint_ray.launch.audit_result import Origin, conclude
from amint_ray.launch.audit_suspects import Found, find_suspects
from amint_ray.launch.audit_worker import Asked, Looker
from amint_ray.launch.claim import alone_at
from amint_ray.launch.cluster import address_of, connect
from amint_ray.launch.room import machines_of_cluster, wait_for_room, wants_gpus
from amint_ray.storage import Location, check_writable, exists, locate
from amint_ray.tracking.registered import RegisteredModel
from amint_ray.tracking.registry import load, run_of_model
from amint_ray.tracking.versions import open_mlflow

_CODE = (
    *("contracts.py", "data", "model", "evaluation/outputs.py", "evaluation/views.py"),
    *("launch/audit_worker.py", "launch/audit_suspects.py"),
)
"""Whatever may change what is found of a suspect."""
_SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True)
class Chunk:
    """Some shards of the suspects, and the file that they become."""

    name: str
    shards: tuple[int, ...]


def run_audit(
    uri: str,
    suspects: str,
    overrides: Sequence[str],
    watcher: Watcher,
    *,
    prior: float = 0.1,
    fdr: float = 0.05,
    key_file: str | None = None,
    key_env: str | None = None,
    every: bool = True,
    verbose: bool = False,
) -> dict[str, Any]:
    """Put suspects to a model, and say which of them, and whether the collection, trained it.

    No label of membership is read. What an audit of the same model and suspects did before it was
    stopped is used again.

    Args:
        uri: of the model (`models:/NAME/VERSION`, `models:/NAME@ALIAS`, `runs:/RUN_ID/model`, a
            folder), or a run's id.
        suspects: a folder of images, one image, or Parquet; local or `s3://`.
        overrides: `audit.KEY=VALUE`, `cluster.KEY=VALUE`.
        watcher: is told how far it is.
        prior: share of members among the suspects at which precision is stated.
        fdr: largest expected share of images not trained on among those called members.
        key_file: file with the key of a model whose head says codes; the verdict rests on it then.
        key_env: environment variable with the key, in place of a file.
        every: whether the document is to have all images; else it has those of the report.
        verbose: let Ray talk.

    Returns:
        The audit's document; docs/audit.md describes it.

    Raises:
        UserError: a mistake of the user's.
        RunError: storage or the cluster failed.
        BaseException: whatever a signal raises; what is done by then is kept.
    """
    started = time.perf_counter()
    settings, cluster = load_audit(overrides)
    key = given_key(key_file=key_file, key_env=key_env)
    judged = Settings(
        alpha=settings.alpha,
        fdr=fdr,
        prior=prior,
        power=settings.power,
        confidence=settings.confidence,
        evidence=settings.evidence,
    )
    storage = locate(settings.folder, "audit.folder", seconds=settings.timeout_seconds)
    watcher.phase(f"fetching {uri}")
    uri = _uri(uri)
    model = load(uri)
    check_key(key, model, settings, watcher, uri=uri)
    origin = _origin(uri)
    data = _preprocessing(uri, model, settings)
    found = find_suspects(suspects, settings, model.preprocessing.class_names, watcher)
    check_writable(storage, "audit.folder")
    asked, chunks = _plan(model, found, data, settings, storage)
    with alone_at(asked.place, "audit", watcher):
        todo = [chunk for chunk in chunks if not _is_done(asked.place, chunk)]
        if len(todo) < len(chunks):
            done = len(chunks) - len(todo)
            watcher.notice(f"goes on: {done} of {len(chunks)} parts were there already")
        looked = time.perf_counter()
        if todo:
            address = address_of(cluster)
            watcher.phase("starting Ray")
            with connect(address, verbose=verbose):
                if address is not None:
                    wait_for_room(cluster.model_copy(update={"workers": 1}), watcher)
                _look(asked, model, todo, cluster, settings, watcher)
        seconds = {
            "looking": time.perf_counter() - looked,
            "total": time.perf_counter() - started,
        }
        return conclude(
            asked,
            [chunk.name for chunk in chunks],
            model,
            judged,
            settings,
            origin,
            watcher,
            key=key,
            uri=uri,
            every=every,
            seconds=seconds,
        )


def _uri(model: str) -> str:
    """A model's URI or folder as it is, and that of a run's model for the run's id.

    Raises:
        UserError: it is none of them.
    """
    if re.fullmatch(r"[0-9a-f]{32}", model):
        return f"runs:/{model}/model"
    if not model or (":/" not in model and not Path(model).is_dir()):
        raise UserError(
            f"{model or 'an empty name'}: no model; give models:/NAME/VERSION, models:/NAME@ALIAS, "
            "a run's id (all 32 signs), runs:/RUN_ID/model or a model's folder"
        )
    return model


def _preprocessing(uri: str, model: RegisteredModel, settings: AuditSettings) -> Data:
    """How images become the model's input, and whether the model can be audited at all.

    Raises:
        UserError: it cannot.
    """
    how = "train it again with this version (`amint train`, `amint reproduce RUN_ID`)"
    if model.reference is None:
        raise UserError(
            f"{uri}: it was registered without what an audit compares suspects with "
            f"(reference.safetensors: evaluation.reference_images); {how}"
        )
    if model.preprocessing.crop_pct is None:
        raise UserError(f"{uri}: an earlier version registered it without its crop_pct; {how}")
    channels, side, _ = model.model.architecture.input_shape
    return Data.model_validate(
        {
            "image_size": side,
            "channels": channels,
            "mean": model.preprocessing.mean,
            "std": model.preprocessing.std,
            "crop_pct": model.preprocessing.crop_pct,
            "max_megapixels": settings.max_megapixels,
        }
    )


def _plan(
    model: RegisteredModel,
    found: Found,
    data: Data,
    settings: AuditSettings,
    storage: Location,
) -> tuple[Asked, list[Chunk]]:
    """What is to be looked at, and where that is kept: by fingerprints, never by a name."""
    assert model.reference is not None
    what = {
        "model": model.fingerprint(),
        "suspects": found.source.identity,
        "classes": None if found.classes is None else found.classes.tolist(),
        "evidence": settings.evidence,
        "data": data.model_dump(mode="json"),
        "code": code_fingerprint(_CODE),
    }
    asked = Asked(
        found=found,
        data=data,
        evidence=settings.evidence,
        batch_size=settings.batch_size,
        projection=model.reference.projection,
        needs_labels=model.needs_labels,
        code_from=None if model.preprocessing.code is None else model.preprocessing.code.code_from,
        place=storage.below(fingerprint_of(what)),
    )
    chunks = [
        Chunk(f"part-{number:06d}", tuple(shards)) for number, shards in enumerate(found.chunks())
    ]
    return asked, chunks


def _is_done(place: Location, chunk: Chunk) -> bool:
    try:
        return exists(place, f"{chunk.name}.npz")
    except OSError as error:
        raise RunError(f"audit.folder: {place.uri}: {first_line(error)}") from error


def _look(
    asked: Asked,
    model: RegisteredModel,
    todo: Sequence[Chunk],
    cluster: Cluster,
    settings: AuditSettings,
    watcher: Watcher,
) -> None:
    """Have as many processes as there is room for look at the chunks.

    Raises:
        RunError: one failed for good.
    """
    import ray
    from ray.util.actor_pool import ActorPool

    shards = asked.found.source.shards
    total = count(asked.found.source)
    rows = {chunk.name: sum(shards[shard].rows for shard in chunk.shards) for chunk in todo}
    machines = machines_of_cluster()
    use_gpu = wants_gpus(cluster, machines)
    gpus = settings.gpus if use_gpu else 0.0
    room = sum(
        int(min(machine.cores / cluster.cpus_per_worker, machine.gpus / gpus if gpus else 1e9))
        for machine in machines
    )
    most = cluster.workers[-1] if isinstance(cluster.workers, tuple) else cluster.workers
    wanted = room if most is None else most
    weights = {name: tensor.cpu() for name, tensor in model.model.state_dict().items()}
    told = [ray.put(asked), ray.put((model.model.architecture, weights))]
    actor = ray.remote(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus,
        max_restarts=settings.retries,
        max_task_retries=settings.retries,
    )(Looker)
    processes = max(1, min(wanted, room, len(todo)))
    lookers = [actor.remote() for _ in range(processes)]
    pool = ActorPool(lookers)
    done = total - sum(rows.values())
    watcher.phase(f"looking at {numbered(total, 'images')}, {processes} at a time")
    try:
        for chunk in todo:
            pool.submit(lambda looker, c: looker.look.remote(told, c.name, c.shards), chunk)
        while pool.has_next():
            watcher.heartbeat()
            try:
                done += pool.get_next_unordered(timeout=_SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                continue
            except Exception as error:  # Ray's, wrapping the process's own
                cause = getattr(error, "cause", None) or error
                raise RunError(
                    f"{first_line(cause)}; what is done is kept, the same command goes on"
                ) from error
            watcher.event({"phase": "read", "done": done, "total": total})
    finally:
        for looker in lookers:
            ray.kill(looker)


def _origin(uri: str) -> Origin:
    """What MLflow knows of the model; nothing of a folder."""
    if not uri.startswith(("models:/", "runs:/")):
        return Origin(None, {}, {})
    client = open_mlflow()
    run_id = run_of_model(client, uri)
    try:
        run: Any = client.get_run(run_id)
    except Exception as error:  # MLflow's, the network's
        raise UserError(f"{uri}: its run {run_id} cannot be read: {first_line(error)}") from error
    metrics: Mapping[str, float] = run.data.metrics
    return Origin(run_id, dict(run.data.tags), dict(metrics))
