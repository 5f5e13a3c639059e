"""The training loop: plain PyTorch, one process a rank, told of its world by a `RunContext`."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amint_ray.config.schema import Config
from amint_ray.contracts import Role, RunContext, RunError, ScoreTable, Streams
from amint_ray.evaluation.reference import Reference, write_reference
from amint_ray.evaluation.scores import concatenate, write_scores
from amint_ray.model.blocks import checkpoint_blocks
from amint_ray.model.joint import Architecture, AuditedModel
from amint_ray.model.sync_norm import synchronise_norms
from amint_ray.train.allocator import keep_freed_memory
from amint_ray.train.finite import Step, check_finite
from amint_ray.train.monitor import gather, monitor, score_roles
from amint_ray.train.objective import Objective
from amint_ray.train.parallel import replicate, shard
from amint_ray.train.recent import RecentSteps
from amint_ray.train.reduce import gather_lists, share_buffers
from amint_ray.train.reference import take_reference
from amint_ray.train.state import TrainState, identity_of
from amint_ray.train.step import SUMS, train_step
from amint_ray.train.update import create_update, uncompiled
from amint_ray.train.weighting import create_weighting

SCORES = "scores.parquet"
REFERENCE = "reference.safetensors"
_SECONDS_WORTH_A_CHECKPOINT = 60.0
"""Training of so long is not risked while the samples are scored."""


@dataclass(frozen=True)
class Trained:
    """What a rank brings home.

    Attributes:
        model: the trained model, on the rank's device; this rank's share of it where it is sharded.
        scores: of all samples, on rank 0; empty on the others, and where none were wanted.
        history: one entry an epoch.
        lost: images that some rank could not read when their turn came: the reason by sample id.
        seconds: of `setup`, `train` and `evaluate`.
    """

    model: AuditedModel
    scores: ScoreTable
    history: list[dict[str, float]]
    lost: dict[str, str]
    seconds: dict[str, float]


def train(
    config: Config,
    architecture: Architecture,
    streams: Streams,
    context: RunContext,
    *,
    manifest: str | None = None,
    score: bool = True,
    inherit: Path | None = None,
) -> Trained:
    """Train, score every sample, and commit checkpoints on the way.

    Args:
        config: the whole configuration.
        architecture: planned from it.
        streams: this rank's data.
        context: this rank's world.
        manifest: fingerprint of the roles; a checkpoint under others is not taken.
        score: False for a run that ends behind its last epoch, such as a search's trial: no sample
            is scored, and that epoch has a checkpoint only if `train.checkpoint_every` says so.
        inherit: another run's checkpoint to go on from under this configuration's learning rate,
            weight decay and λ; not read where this run has one of its own.

    Raises:
        FloatingPointError: a loss is no longer finite.
        ValueError: the newest checkpoint is of another configuration, or of other roles; or what
            is to be inherited does not fit.
        RunError: too many images were lost, or the last checkpoint could not be written.
    """
    started = time.perf_counter()
    if context.device.type == "cpu":
        keep_freed_memory()
    state = create_state(
        config,
        architecture,
        streams.steps_per_epoch,
        context.device,
        world_size=context.world_size,
        task_rows=streams.task_rows,
    )
    identity = identity_of(config, manifest)
    with context.latest_checkpoint() as checkpoint:
        if checkpoint is not None:
            state.load(checkpoint, identity=identity)
        elif inherit is not None:
            state.inherit(
                inherit,
                manifest=manifest,
                architecture=architecture.to_json(),
                steps_per_epoch=streams.steps_per_epoch,
            )
    if state.update.done:
        streams.note_lost(state.lost)
        if state.epoch < config.train.epochs:
            context.progress({"phase": "notice", "text": _goes_on(state, context.world_size)})
    assert isinstance(state.model, AuditedModel)
    model = replicate(state.model, context)

    set_up = committed = time.perf_counter()

    def commit(
        metrics: Mapping[str, Any],
        scores: ScoreTable | None = None,
        reference: Reference | None = None,
    ) -> bool:
        nonlocal committed
        write = functools.partial(_write, state, identity, architecture, scores, reference)
        done = context.report(metrics, write, everywhere=state.sharded)
        committed = time.perf_counter()
        return done

    while state.epoch < config.train.epochs:
        _train_epoch(model, state, config, streams, context, commit)
        last = score and state.epoch == config.train.epochs  # its checkpoint holds the scores, too
        if not last and state.epoch % config.train.checkpoint_every == 0:
            commit(state.history[-1])
    trained = evaluated = time.perf_counter()
    scores = concatenate([])
    if score:
        # All must decide alike, and their clocks do not.
        if max(gather_lists([trained - committed])) > _SECONDS_WORTH_A_CHECKPOINT:
            # Without the epoch's metrics: it must not take the place of one that
            # `storage.keep_best` keeps, since the last one will hold the same weights.
            commit({"epoch": state.epoch})
        context.progress({"phase": "evaluate"})
        with uncompiled():
            scores = gather(score_roles(state.model, streams, context, list(Role)), context)
            reference = take_reference(
                state.model,
                streams,
                context,
                most=config.evaluation.reference_images,
                head_trained=state.objective.uses_mint,
                lost=state.lost,
            )
        _share_lost(state, streams)
        evaluated = time.perf_counter()
        if not commit(state.history[-1], scores, reference):
            raise RunError("the last checkpoint, with the trained model, could not be written")
    return Trained(
        model=state.model,
        scores=scores,
        history=state.history,
        lost=state.lost,
        seconds={
            "setup": set_up - started,
            "train": trained - set_up,
            "evaluate": evaluated - trained,
        },
    )


def _goes_on(state: TrainState, workers: int) -> str:
    who = "1 worker goes on" if workers == 1 else f"{workers} workers go on"
    return f"{who} after epoch {state.epoch}" + (f", step {state.step}" if state.step else "")


def create_state(
    config: Config,
    architecture: Architecture,
    steps_per_epoch: int,
    device: torch.device,
    *,
    world_size: int = 1,
    task_rows: int | None = None,
) -> TrainState:
    """A fresh model with its optimiser, drawn from `train.seed`; a share of it under `fsdp`.

    Args:
        config: the whole configuration.
        architecture: planned from it.
        steps_per_epoch: of the streams.
        device: of this worker.
        world_size: how many workers there are.
        task_rows: of the streams; None: every step has `train.batch_size`.
    """
    torch.manual_seed(config.train.seed)
    synchronised = config.train.sync_batchnorm and world_size > 1
    model = AuditedModel(
        architecture,
        pretrained=config.model.pretrained,
        prepare=functools.partial(synchronise_norms, device=device) if synchronised else None,
    )
    objective = Objective(
        lambda_task=config.loss.lambda_task,
        lambda_mint=config.loss.lambda_mint,
        weighting=create_weighting(config.loss),
        warmup_steps=config.loss.warmup_epochs * steps_per_epoch,
        plain_task=architecture.detach,
    )
    if not objective.uses_mint:
        # A head that is not trained must not be decayed either, nor be waited for by DDP.
        model.head.requires_grad_(False)
    if objective.reads_gradients:
        model.watch_gradients(objective.record)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.train.checkpoint_activations:
        checkpoint_blocks(model.backbone, [tap.name for tap in architecture.taps])
    sharded = config.train.parallel == "fsdp"
    if sharded and world_size > 1:
        shard(model, device, world_size)
    else:
        model.to(device)
    if config.train.compile:
        model.compile()
    total = task_rows or config.train.batch_size * steps_per_epoch
    rows = total // steps_per_epoch // world_size, -(-total // steps_per_epoch // world_size)
    update = create_update(model, config.train, steps_per_epoch, rows=rows)
    if architecture.detach and objective.uses_mint:
        update.clip_apart(model.backbone, model.head)
    return TrainState(model, update, objective, sharded=sharded)


def _train_epoch(
    model: nn.Module,
    state: TrainState,
    config: Config,
    streams: Streams,
    context: RunContext,
    commit: Callable[[Mapping[str, Any]], bool],
) -> None:
    """One pass over D; adds its entry to the history."""
    model.train()
    totals = torch.tensor(state.sums or [0.0] * len(SUMS), dtype=torch.float64).to(context.device)
    before: Step | None = None
    recent = RecentSteps(context, wanted=config.tracking.enabled)
    started, first = time.perf_counter(), state.step

    def settle(step: Step | None) -> None:
        try:
            check_finite(step, config)
        except FloatingPointError:
            recent.tell()  # the steps that led there
            raise
        if step is not None:
            recent.add(step)

    batches = streams.train_batches(state.epoch, first)
    for number, batch in enumerate(batches, start=first + 1):
        step = Step(state.epoch * streams.steps_per_epoch + number, state.epoch + 1, batch)
        _seed(step.number, config, context)
        sums = train_step(model, batch.to(context.device), state.objective, state.update)
        step.done(sums)
        totals += sums
        # One step later: reading a loss at once would have the GPU run dry.
        settle(before)
        before = step
        context.progress(
            {
                "phase": "train",
                "epoch": step.epoch,
                "epochs": config.train.epochs,
                "step": step.number,
                "steps": config.train.epochs * streams.steps_per_epoch,
                "lost": len(streams.lost),
            }
        )
        every = config.train.checkpoint_steps
        if every and number % every == 0 and number < streams.steps_per_epoch:
            settle(before)
            recent.tell()
            _share_lost(state, streams)
            state.step, state.sums, before = number, totals.tolist(), None
            share_buffers(state.model)
            commit({"epoch": state.epoch, "step": number})
    settle(before)
    recent.tell()
    share_buffers(state.model)
    entry = epoch_metrics(totals)
    seconds = time.perf_counter() - started
    ended, every = state.epoch + 1, config.evaluation.select_every
    look = every is not None and (ended % every == 0 or ended == config.train.epochs)
    with uncompiled():
        entry |= monitor(
            state.model,
            streams,
            context,
            select=config.evaluation if look else None,
            head_trained=state.objective.uses_mint,
        )
    _share_lost(state, streams)
    if broken := [name for name, value in entry.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"{', '.join(broken)} not finite in epoch {ended}; lower train.lr")
    entry["train/steps_per_second"] = (streams.steps_per_epoch - first) / seconds
    entry["train/lr"] = float(state.update.optimizer.param_groups[0]["lr"])
    state.epoch, state.step, state.sums = ended, 0, []
    entry["epoch"] = state.epoch
    state.history.append(entry)
    context.progress({"phase": "epoch", **entry})


def _share_lost(state: TrainState, streams: Streams) -> None:
    """Tell all ranks what each could not read, so that they stop together if it is too much."""
    state.lost |= dict(gather_lists(list(streams.lost.items())))
    streams.note_lost(state.lost)


def _seed(step: int, config: Config, context: RunContext) -> None:
    """Dropout and the like must not depend on where a run was interrupted, or could have been."""
    torch.manual_seed(config.train.seed + 1_000_003 * step + context.rank)


def epoch_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Means over all ranks' samples from the epoch's `SUMS`."""
    of = dict(zip(SUMS, sums.tolist(), strict=True))
    metrics = {
        "train/task_loss": of["task_loss"] / of["task_rows"],
        "train/task_accuracy": of["task_correct"] / of["task_rows"],
    }
    if of["told_rows"]:
        metrics["train/mint_loss"] = of["mint_loss"] / of["told_rows"]
    if of["code_bits"]:
        metrics["train/code_match_rate"] = of["code_matches"] / of["code_bits"]
    return metrics


def _write(
    state: TrainState,
    identity: Mapping[str, Any],
    architecture: Architecture,
    scores: ScoreTable | None,
    reference: Reference | None,
    folder: Path,
) -> None:
    """Fill a folder with a checkpoint; the last one holds scores and reference, too."""
    if scores is not None:
        state.on_rank_zero(lambda: _write_looks(scores, reference, folder), where=folder)
    final = scores is not None
    state.save(folder, identity=identity, architecture=architecture.to_json(), final=final)


def _write_looks(scores: ScoreTable, reference: Reference | None, folder: Path) -> None:
    write_scores(scores, folder / SCORES)
    if reference is not None:
        write_reference(reference, folder / REFERENCE)


class LocalContext:
    """A `RunContext` for one process without Ray; the newest checkpoint is kept in `folder`."""

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.events: list[dict[str, Any]] = []
        self._folder = folder
        self._count = len(list(folder.glob("checkpoint_*")))

    def progress(self, event: Mapping[str, Any]) -> None:
        """Keep the event."""
        self.events.append(dict(event))

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        """Write the checkpoint beside its place and move it there whole."""
        self._count += 1
        draft = Path(tempfile.mkdtemp(dir=self._folder, prefix="draft_"))
        try:
            write_checkpoint(draft)
        except BaseException:  # a signal, too: no draft is to stay
            shutil.rmtree(draft, ignore_errors=True)
            raise
        draft.rename(self._folder / f"checkpoint_{self._count:06d}")
        return True

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The newest checkpoint; all that are here were moved here whole."""
        yield max(self._folder.glob("checkpoint_*"), default=None)
