"""The nouns that every room shares. Imports nothing of ours, and neither torch, Ray nor MLflow."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # to be imported in no time, before Ctrl-C can be taken care of
    import numpy as np
    import numpy.typing as npt
    import torch


RESERVED_OPTIONS = {
    *("num_classes", "in_chans", "pretrained", "features_only", "scriptable", "exportable"),
    *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "no_jit"),
}
"""What `model.options` must not hold: what amint_ray sets itself, what would read or fetch a file
(a registered model must not depend on one), and what makes something else than a classifier."""


MAYBE_KEY = re.compile(r"\b[0-9a-fA-F]{32,}\b")
"""What may be the key of secret codes itself, in hex, where the name of one is expected; the
shortest key that is taken has as many digits."""
_PLURAL = re.compile(r"(?<![.\w])(image|file|folder)s\b")
_ONE = r"\1"
_SAMPLES = re.compile(r"(?<=samples of the batch: )([^;]+?)(?: and (\d+) more)?(?=;|$)")
_SAMPLES_SHOWN = 3


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, where, and what to do.

    The command line prints the text alone and exits with code 2.
    """


class RunError(Exception):
    """A run that ended for a reason that no check could have foreseen, told in one line.

    The command line prints the text and exits with code 1.
    """


def first_line(error: BaseException) -> str:
    """An exception's text cut to one line; its type's name where it has none.

    Libraries put addresses into their errors, with the password where there is one: not here.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", line)


def numbered(number: int, plural: str) -> str:
    """So many images, or files of some kind: 2,000 images, 1 file without a suffix."""
    one = plural.replace("links to folders", "link to a folder")
    return f"{number:,} {plural if number != 1 else _PLURAL.sub(_ONE, one, count=1)}"


def few_samples(text: str) -> str:
    """A message that names all samples of a batch, as a person is shown it: with three of them."""
    return _SAMPLES.sub(_first_samples, text)


def _first_samples(found: re.Match[str]) -> str:
    names = found[1].split(", ")
    more = int(found[2] or 0) + len(names[_SAMPLES_SHOWN:])
    return ", ".join(names[:_SAMPLES_SHOWN]) + (f" and {more} more" if more else "")


def leaves(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every `{value, low, high}` of a nested document, as `path`, `path.low`, `path.high`."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        name = f"{prefix}{key}"
        if not isinstance(value, dict):
            continue
        if "value" not in value:
            found |= leaves(value, f"{name}.")
        elif value["value"] is not None:
            found |= {name: value["value"]}
            found |= {f"{name}.low": value["low"], f"{name}.high": value["high"]}
    return found


class Role(StrEnum):
    """What a sample is used for; decided once, by its content (`data/roles.py`)."""

    MEMBER = "member"
    """Trains the task; the MINT head learns it as 1."""
    WITHHELD = "withheld"
    """Trains the task; never shown to the MINT head."""
    EXTERNAL = "external"
    """Never trains the task; the MINT head learns it as 0."""
    CALIBRATION = "calibration"
    """Trains nothing; thresholds and conformal p-values come from it."""
    TEST = "test"
    """Trains nothing; every reported false-positive rate comes from it."""

    @property
    def trains_task(self) -> bool:
        """Whether samples of this role belong to D, the audited model's training set."""
        return self in (Role.MEMBER, Role.WITHHELD)


@dataclass(frozen=True)
class Batch:
    """One joint step's samples: rows that train the task first, then rows for the head alone.

    Where the head reads the task's own views, these are D, then E. Where the task is augmented and
    the head reads plain views, they are D augmented, then D plain, then E plain.

    Attributes:
        images: (n, channels, height, width), as the backbone takes them.
        labels: (n,) int64 class indices; those behind `n_task` never reach the task loss.
        n_task: how many leading rows train the task.
        head_from: first row that the head reads.
        membership: (n - head_from,) what the MINT head should say: 1 for D, 0 for E.
        told: (n - head_from,) bool, rows that train the MINT head (false: withheld).
        sample_id: (n,) the source's names.
        task_per_worker: rows of D in the *global* batch, divided by the number of workers. A
            worker divides its summed task loss by this, so that DDP's mean of gradients is the
            gradient of the mean over the global batch, however the rows are dealt out
            (BatchNorm's statistics are still each worker's own).
        told_per_worker: the same for the rows that train the MINT head.
        code: (n - head_from, bits) of 0 and 1, what each row's code is; None: codes are not asked
            for.
        coded: (n - head_from,) bool, rows that train the code: of D, never of E.
        coded_per_worker: the divisor for these rows.
    """

    images: torch.Tensor
    labels: torch.Tensor
    n_task: int
    head_from: int
    membership: torch.Tensor
    told: torch.Tensor
    sample_id: npt.NDArray[np.str_]
    task_per_worker: float
    told_per_worker: float
    code: torch.Tensor | None = None
    coded: torch.Tensor | None = None
    coded_per_worker: float = 0.0

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            membership=self.membership.to(device, non_blocking=True),
            told=self.told.to(device, non_blocking=True),
            code=None if self.code is None else self.code.to(device, non_blocking=True),
            coded=None if self.coded is None else self.coded.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class ScoreBatch:
    """Samples to score, with evaluation transforms applied.

    Attributes:
        images: (n, channels, height, width), as the backbone takes them.
        labels: (n,) int64 class indices.
        sample_id: (n,) the source's names; fewer where the last rows are there to fill up.
        role: `Role` values, one a sample id.
        code: (n, bits) of 0 and 1, one row a sample id; None: not known, or not asked for.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_id: npt.NDArray[np.str_]
    role: npt.NDArray[np.str_]
    code: npt.NDArray[np.uint8] | None = None


class Streams(Protocol):
    """What the training loop reads: this rank's part of the data, in an order set by the seed.

    Attributes:
        steps_per_epoch: joint steps in an epoch.
        task_rows: rows of D in an epoch, of all workers; its steps differ by at most one.
        lost: images that could not be read when their turn came: the reason by sample id.
    """

    steps_per_epoch: int
    task_rows: int

    @property
    def lost(self) -> Mapping[str, str]: ...  # noqa: D102 - above

    def note_lost(self, lost: Mapping[str, str]) -> None:
        """Learn what other ranks, or this run before it was interrupted, could not read.

        Raises:
            RunError: that is too much.
        """

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The joint batches of one epoch (both counted from 0); as many on every rank."""

    def score_batches(
        self, roles: Collection[Role], most: int | None = None
    ) -> Iterator[ScoreBatch]:
        """Every sample of these roles once over all ranks, this rank's part of them.

        Args:
            roles: whose samples.
            most: of each role no more than so many samples; always the same ones.
        """

    def close(self) -> None:
        """End whatever reads ahead."""


@dataclass(frozen=True)
class ScoreTable:
    """What the trained model says of every sample: all membership metrics come from this.

    One row a sample; all arrays have shape (n,).

    Attributes:
        sample_id: the source's name of the sample.
        role: the sample's `Role`, as a string.
        label: true class index.
        prediction: the task's most likely class.
        task_loss: cross-entropy in nats; NaN where the sample has no label (−1).
        mint_logit: the MINT head's logit; larger means "more likely a member". Of a head that says
            codes alone: the log-likelihood ratio of the sample's own code, in nats; NaN without it.
        code_bits: length of its code; None, as the next two: the model says no codes.
        code_matches: bits of the sample's own code that the model says.
        code_p: the exact p-value of that (`evaluation.keyed.soft_p_values`).
    """

    sample_id: npt.NDArray[np.str_]
    role: npt.NDArray[np.str_]
    label: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.int64]
    task_loss: npt.NDArray[np.float64]
    mint_logit: npt.NDArray[np.float64]
    code_bits: npt.NDArray[np.int64] | None = None
    code_matches: npt.NDArray[np.int64] | None = None
    code_p: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def columns(self) -> dict[str, Any]:
        """Those that are there, by name."""
        return {name: column for name, column in vars(self).items() if column is not None}

    def of(self, role: Role) -> ScoreTable:
        """The rows of one role."""
        return self.kept(self.role == role.value)

    def without(self, sample_ids: Collection[str]) -> ScoreTable:
        """The rows of all other samples."""
        return self.kept(~self._among(sample_ids)) if sample_ids else self

    def kept(self, keep: npt.NDArray[np.bool_]) -> ScoreTable:
        """The rows where `keep`, (n,), is true."""
        return ScoreTable(**{name: column[keep] for name, column in self.columns.items()})

    def _among(self, sample_ids: Collection[str]) -> npt.NDArray[np.bool_]:
        import numpy as np

        return np.isin(self.sample_id, list(sample_ids))


class Watcher(Protocol):
    """Whoever follows a run on a screen."""

    def phase(self, text: str) -> None:
        """The run begins something new."""

    def event(self, event: Mapping[str, Any]) -> None:
        """News from the training loop, as `RunContext.progress` got them."""

    def notice(self, text: str) -> None:
        """Something to be read, whatever is shown next."""

    def heartbeat(self) -> None:
        """Called a few times a second while the run waits; may raise to stop it."""


class SearchWatcher(Watcher, Protocol):
    """Whoever follows a search on a screen."""

    def trials(
        self,
        trials: Sequence[Mapping[str, Any]],
        *,
        objectives: Sequence[tuple[str, str]],
        planned: int,
        concurrent: int,
    ) -> None:
        """How all trials stand; may be called as often as one likes.

        Args:
            trials: as `evaluation.search` takes them.
            objectives: metrics with "max" or "min".
            planned: trials in all.
            concurrent: how many run at a time.
        """


class RunContext(Protocol):
    """All that the training loop knows of the world it runs in.

    `train.loop.LocalContext` is the one for a single process; `launch.context.RayContext` the
    one inside a Ray Train worker.
    """

    rank: int
    world_size: int
    device: torch.device

    def progress(self, event: Mapping[str, Any]) -> None:
        """Tell whoever watches where the run is. Cheap; may be dropped."""

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        """Commit a checkpoint. Every rank calls this; rank 0's `write_checkpoint` fills a folder.

        Args:
            metrics: numbers to keep beside the checkpoint.
            write_checkpoint: called on rank 0 with an empty folder.
            everywhere: call it on every rank, each with a folder of its own, all of which make one
                checkpoint. It must then raise on every rank or on none, and where it is an OSError
                begin its text with the folder and the machine that could not be written to.

        Returns:
            False where the checkpoint could not be written; the run may go on without it.
        """

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The newest committed checkpoint of this run as a local folder, while entered, or None."""
