"""A search: trials on Ray Tune, each a training on Ray Train, and the winner trained again."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amint_ray.config.schema import Config
from amint_ray.config.search import Search
from amint_ray.config.search_schema import TRIALS_BY_DEFAULT
from amint_ray.contracts import SearchWatcher, UserError
from amint_ray.data.loading import smallest_step
from amint_ray.launch.children import Children, Where
from amint_ray.launch.cluster import address_of, connect, job_tags
from amint_ray.launch.dataset import find_source, index_on_ray, load_here
from amint_ray.launch.ledger import Ledger, TrialRecord, check_outcome
from amint_ray.launch.prepare import (
    STORAGE_ATTEMPTS,
    Checked,
    Prepared,
    check,
    prepare,
    settle_streams,
    share,
    worker_rows,
)
from amint_ray.launch.recording import Recording, data_tags, dataset_fields
from amint_ray.launch.room import (
    machines_of_cluster,
    plan_workers,
    trials_at_a_time,
    wait_for_room,
)
from amint_ray.launch.search_folder import SearchFolder, done_search, open_search, reading, spent
from amint_ray.launch.search_plan import (
    Plan,
    base_of,
    check_on_images,
    plan_search,
    with_its_key,
)
from amint_ray.launch.search_result import conclude, open_parent, shown_again
from amint_ray.launch.time_limit import in_thread
from amint_ray.storage import check_folder, locate

_SECONDS_BETWEEN_POLLS = 0.2
_SECONDS_BETWEEN_SHOWS = 0.5
_SECONDS_BETWEEN_NOTES = 10.0
_SECONDS_TO_STOP = 15.0
_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed reports no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Room:
    """What the trials run on.

    Attributes:
        workers: of each trial.
        use_gpu: whether each worker has one.
        concurrent: trials at a time.
    """

    workers: int | tuple[int, int]
    use_gpu: bool
    concurrent: int


def run_search(
    search: Search, watcher: SearchWatcher, *, new: bool = False, verbose: bool = False
) -> dict[str, Any]:
    """Search, train the winner again, record and register.

    A search of the same file that was cut off goes on: only the trials that were under way are
    taken up again, from their last checkpoints. One that is done gives what it gave.

    Args:
        search: what is searched.
        watcher: is told how far it is.
        new: begin anew in any case.
        verbose: let Ray talk.

    Returns:
        The search's document: `trials`, `front`, `best` and more, as `search_result.conclude`
        describes it.

    Raises:
        UserError: a mistake of the user's.
        RunError: all trials failed, or the plain model did.
        BaseException: whatever a signal raises; the MLflow runs are marked killed.
    """
    for name, value in _TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    search = with_its_key(search)
    if isinstance(search.base.cluster.workers, tuple):
        raise UserError(
            f"search: cluster.workers = {list(search.base.cluster.workers)}: a trial has a fixed "
            "number of workers, or none could tell how many run at a time; give one number"
        )
    storage = locate(search.base.storage.path, "storage.path", attempts=STORAGE_ATTEMPTS)
    check_folder(storage, "storage.path")
    with reading(storage):
        done = None if new else done_search(search, storage)
    if done is not None:
        return shown_again(done, watcher)
    checked = check(base_of(search), watcher)
    plan = plan_search(search, watcher)
    with reading(storage):
        folder = open_search(search, checked.storage, watcher, new=new)
    if folder.record.ended:  # by another command, meanwhile
        return shown_again(folder, watcher)
    with folder.alive() as sign:
        document = _carry_out(plan, checked, folder, watcher, sign=sign.path, verbose=verbose)
        folder.note(ended=True, spent=spent(search), document=document)
    return document


def _carry_out(
    plan: Plan,
    checked: Checked,
    folder: SearchFolder,
    watcher: SearchWatcher,
    *,
    sign: str,
    verbose: bool,
) -> dict[str, Any]:
    """All of a search that nobody else is at work on; gives its document.

    Raises:
        UserError: a mistake of the user's, or another driver began at the same time.
        RunError: all trials failed, or the plain model did.
    """
    config, source = find_source(plan.base, watcher)
    dataset = None
    if config.data.mode == "memory":
        dataset = load_here(config, source, watcher)
        check_on_images(plan, dataset.index.manifest)
    address = address_of(config.cluster)
    watcher.phase("starting Ray")
    with connect(address, verbose=verbose):
        if address is not None:
            wait_for_room(config.cluster, watcher)
        if dataset is None:
            dataset = index_on_ray(config, source, checked.storage, watcher)
            check_on_images(plan, dataset.index.manifest)
        prepared = prepare(config, checked, dataset, watcher)
        room = _room(plan, prepared, watcher, joined=address is not None)
        workers = room.workers if isinstance(room.workers, int) else room.workers[1]
        folder.settle(watcher)
        _same_images(folder, prepared)
        # Ray's object store then has the images, and this process no more.
        data, prepared = share(settle_streams(prepared, workers))
        dataset = None
        ledger = Ledger(folder.trials)
        for trial, reason in ledger.load().items():
            watcher.notice(
                f"WARNING: {folder.trials.uri}/{trial}.json is damaged ({reason}); what is known "
                "of this trial is lost, and one is trained again in its place"
            )
        if folder.record.attempts > 1:
            ended = len(ledger.where(lambda trial: trial.ended))
            watcher.notice(f"going on with {folder.record.name}: {ended} trials have ended")
        tags = {**job_tags(room.workers), "amint.search": folder.record.name}
        with open_parent(plan, prepared, folder, watcher, tags=tags) as parent:
            _search(plan, prepared, data, folder, ledger, parent, room, watcher, sign=sign)
            return conclude(
                plan, prepared, folder, ledger, parent, watcher, verbose=verbose, tags=tags
            )


def _same_images(folder: SearchFolder, prepared: Prepared) -> None:
    """Whether a search that goes on has the images and roles that it began with.

    Raises:
        UserError: it has not.
    """
    manifest = prepared.dataset.index.manifest.fingerprint
    if folder.record.manifest not in ("", manifest):
        raise UserError(
            f"data: the search in {folder.place.uri} began on other images or roles (manifest "
            f"{folder.record.manifest[:12]}, now {manifest[:12]}); bring them back, or begin anew "
            "with --new"
        )
    folder.note(manifest=manifest)


def _room(plan: Plan, prepared: Prepared, watcher: SearchWatcher, *, joined: bool) -> Room:
    """How many workers a trial has, and how many trials the cluster has room for at a time.

    A trial's process itself takes no core, and Ray gives a training its workers all at once or not
    at all: so many trials cannot wait for each other.

    Raises:
        UserError: there is no room for a single trial.
    """
    cluster = plan.base.cluster
    smallest = smallest_step(prepared.dataset.index.manifest, prepared.config)
    rows = worker_rows(prepared.config, prepared.architecture, smallest)
    workers, use_gpu = (
        wait_for_room(cluster, watcher, rows=rows)
        if joined
        else plan_workers(cluster, machines_of_cluster(), rows=rows)
    )
    most = trials_at_a_time(cluster, machines_of_cluster(), workers, use_gpu=use_gpu)
    asked = plan.search.spec.budget.concurrent
    if asked is not None and asked > most:
        watcher.notice(
            f"budget.concurrent = {asked}: the cluster has room for {most} trials at a time"
        )
    concurrent = min(asked or most, most)
    spec = plan.search.spec
    population = spec.budget.trials or TRIALS_BY_DEFAULT
    if spec.algorithm.name == "pbt" and population > concurrent:
        # Those that wait for room would begin when the others are done, and exchange nothing.
        raise UserError(
            f"search: budget.trials = {population}: a population must run all at a time, "
            f"and there is room for {concurrent} trials (budget.concurrent, cluster.workers); ask "
            "for a smaller one"
        )
    return Room(workers, use_gpu, concurrent)


def _search(
    plan: Plan,
    prepared: Prepared,
    data: Mapping[str, Any],
    folder: SearchFolder,
    ledger: Ledger,
    parent: Recording,
    room: Room,
    watcher: SearchWatcher,
    *,
    sign: str,
) -> None:
    """Run all trials that are still to be run.

    Raises:
        RunError: all failed, or the plain model did.
        UserError: MLflow takes no run.
    """
    from amint_ray.launch.follower import Follower, Settings, run_tune
    from amint_ray.launch.orphans import free_all, free_orphans
    from amint_ray.launch.progress import Receiver
    from amint_ray.launch.proposals import Proposals
    from amint_ray.launch.trial import Given

    config, spec = prepared.config, plan.search.spec
    population = spec.algorithm.name == "pbt"
    given = Given(
        name=folder.record.name,
        data=data,
        manifest=prepared.dataset.index.manifest.fingerprint,
        classes=len(prepared.dataset.index.class_names),
        runs=folder.runs,
        workers=room.workers,
        use_gpu=room.use_gpu,
        sign=sign,
        objectives=spec.objective,
        constraint=spec.constraint,
        hand_over=spec.algorithm.perturb_every if population else 0,
        perturbed=spec.algorithm.perturb if population else (),
    )
    where = Where(
        uri=prepared.tracking_uri,
        parent=parent.run_id,
        search=folder.record.name,
        spool=prepared.spool.parent,
        files=folder.place,
        dataset=dataset_fields(config, prepared.dataset.index.manifest),
        tags={
            **data_tags(config, prepared.dataset, prepared.confounders),
            "amint.search": folder.record.name,
        },
    )
    children = Children(where, ledger)
    children.catch_up(watcher)

    def configure(trial: TrialRecord) -> Config:
        return plan.trial(trial, prepared.config)

    proposals = Proposals(plan.search, plan.space, ledger, configure)
    follower = Follower(ledger, children, proposals, configure)
    left = None if spec.budget.hours is None else 3600 * spec.budget.hours - folder.record.seconds
    settings = Settings(
        planned=proposals.planned,
        concurrent=room.concurrent,
        name=f"tune-{folder.record.attempts}",
        folder=folder.place,
        deadline=None if left is None else time.monotonic() + left,
        retries=spec.budget.retries,
    )
    objectives = [(objective.metric, objective.mode) for objective in spec.objective]

    def show() -> None:
        watcher.trials(
            ledger.documents(history=False),
            objectives=objectives,
            planned=settings.planned,
            concurrent=settings.concurrent,
        )

    if proposals.left and (left is None or left > 0):
        watcher.phase("searching")
        running = in_thread(lambda: run_tune(plan.search, given, proposals, follower, settings))
        since = shown = time.monotonic()
        try:
            while not running.done():
                watcher.heartbeat()
                parent.check(watcher)
                children.check(watcher)
                for text in follower.notices():
                    watcher.notice(text)
                now = time.monotonic()
                if now - shown > _SECONDS_BETWEEN_SHOWS:
                    free_orphans()
                    show()
                    shown = now
                if now - since > _SECONDS_BETWEEN_NOTES:
                    with contextlib.suppress(OSError):  # storage may be away for a while
                        ledger.catch_up()
                        folder.note(seconds=folder.record.seconds + now - since)
                        since = now
                time.sleep(_SECONDS_BETWEEN_POLLS)
            running.result()
        except BaseException:
            follower.closed = True
            try:
                children.kill(watcher)
            finally:
                # What Tune's thread asks Ray for once that is down would start another Ray.
                with contextlib.suppress(Exception):
                    running.result(_SECONDS_TO_STOP)
                free_all(_SECONDS_TO_STOP)
            raise
        follower.settle()
        folder.note(seconds=folder.record.seconds + time.monotonic() - since)
        # The winner's trainings want what the last trials had.
        free_all(_SECONDS_TO_STOP)
        show()
        children.finish(watcher, wait_seconds=config.tracking.wait_seconds)
    if (told := proposals.exhausted) is not None:
        watcher.notice(told)
    ledger.catch_up()
    for trial in ledger.where(lambda trial: trial.training is not None):
        Receiver(str(trial.training)).close()  # what workers sent after their trial was stopped
    # A plain model that failed is tried once more by the next command, from where it was.
    kept = ledger.where(lambda trial: trial.baseline and trial.state == "failed")
    folder.clean([trial.id for trial in ledger.where(lambda t: t.ended) if trial not in kept])
    check_outcome(ledger)
