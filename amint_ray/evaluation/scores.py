"""Scoring: what a trained model says of samples, and the table on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from amint_ray.contracts import ScoreBatch, ScoreTable
from amint_ray.evaluation import keyed

CODE_COLUMNS = ("code_bits", "code_matches", "code_p")
"""Of a `ScoreTable`, those that are there only if codes were scored."""


@torch.inference_mode()
def score(model: Any, batches: Iterable[ScoreBatch], device: torch.device) -> ScoreTable:
    """Score samples in evaluation mode.

    Args:
        model: returns (task logits, membership logits) for images and their labels; where the
            latter are (n, …), they are of an `AuditedModel` whose head says codes.
        batches: samples with evaluation transforms applied; rows without a sample id are passed
            through the model and forgotten.
        device: where the model is.
    """
    was_training = model.training
    model.eval()
    parts = []
    for batch in batches:
        labels = batch.labels.to(device)
        logits, membership = model(batch.images.to(device), labels=labels)
        known = labels >= 0  # external images from elsewhere may have none
        loss = F.cross_entropy(logits.double(), labels.clamp(min=0), reduction="none")
        loss = loss.masked_fill(~known, torch.nan)
        rows = len(batch.sample_id)
        said = membership[:rows].double()
        mint: torch.Tensor = said
        of_code: dict[str, npt.NDArray[Any]] = {}
        if said.ndim == 2:
            mint, logits_of_code = model.parted(said)
            if batch.code is not None:
                alone = not model.architecture.head.membership
                mint, of_code = _of_code(mint, logits_of_code, batch.code, alone=alone)
        parts.append(
            ScoreTable(
                sample_id=batch.sample_id,
                role=batch.role,
                label=batch.labels[:rows].numpy(),
                prediction=logits[:rows].argmax(1).cpu().numpy(),
                task_loss=loss[:rows].cpu().numpy(),
                mint_logit=mint.cpu().numpy(),
                **of_code,
            )
        )
    model.train(was_training)
    return concatenate(parts)


def _of_code(
    mint: torch.Tensor, logits: torch.Tensor, code: npt.NDArray[np.uint8], *, alone: bool
) -> tuple[torch.Tensor, dict[str, npt.NDArray[Any]]]:
    """What is kept of what a head says of codes.

    Args:
        mint: (n,) membership logits; NaN where there are none.
        logits: (n, bits) of codes.
        code: (n, bits) of the samples.
        alone: whether the head says codes alone.

    Returns:
        (n,) membership logits, or log-likelihood ratios of the codes where there are none; and the
        columns of codes, by name. NaN where what the head says is not finite.
    """
    said = logits.cpu().numpy()
    finite = np.isfinite(said).all(1)
    sound = np.where(finite[:, None], said, 0.0)
    if alone:
        mint = torch.from_numpy(np.where(finite, keyed.log_likelihood_ratio(sound, code), np.nan))
    return mint, {
        "code_bits": np.full(len(code), code.shape[1], np.int64),
        "code_matches": np.where(finite, keyed.matches(sound, code), 0),
        "code_p": np.where(finite, keyed.soft_p_values(sound, code), np.nan),
    }


def concatenate(parts: Sequence[ScoreTable]) -> ScoreTable:
    """All rows of several tables by sample id, so that the number of workers leaves no trace."""
    # A worker without rows may not know which columns the others have.
    parts = [part for part in parts if len(part)] or list(parts[:1])
    if not parts:
        text, whole, real = np.empty(0, np.str_), np.empty(0, np.int64), np.empty(0, np.float64)
        return ScoreTable(text, text, whole, whole, real, real)
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].columns
    }
    order = np.argsort(columns["sample_id"], kind="stable")
    return ScoreTable(**{name: column[order] for name, column in columns.items()})


def write_scores(table: ScoreTable, path: Path) -> None:
    """Store as Parquet."""
    pq.write_table(pa.table({name: pa.array(c) for name, c in table.columns.items()}), path)


def read_scores(path: Path) -> ScoreTable:
    """Load what `write_scores` stored."""
    table = pq.read_table(path)
    return ScoreTable(
        sample_id=np.array(table["sample_id"].to_pylist(), np.str_),
        role=np.array(table["role"].to_pylist(), np.str_),
        label=table["label"].to_numpy(),
        prediction=table["prediction"].to_numpy(),
        task_loss=table["task_loss"].to_numpy(),
        mint_logit=table["mint_logit"].to_numpy(),
        **{name: table[name].to_numpy() for name in CODE_COLUMNS if name in table.column_names},
    )


def compare_scores(
    saved: ScoreTable, anew: ScoreTable, *, tolerance: float = 1e-3
) -> dict[str, Any]:
    """Whether scores that were made again are those that were saved.

    Another device, or another number of images in a pass, adds up in another order: what differs by
    less than `tolerance`, absolutely or relatively, is the same.

    Args:
        saved: what is to be had again.
        anew: with other samples, too, or fewer.
        tolerance: of MINT logits and task losses.

    Returns:
        `compared` samples; of these `different`, and `predictions` that are others; `missing` saved
        ones; `largest` difference by column; `tolerance`.
    """
    place = {name: row for row, name in enumerate(anew.sample_id.tolist())}
    rows = np.array([place.get(name, -1) for name in saved.sample_id.tolist()], np.int64)
    before = saved.kept(rows >= 0)
    rows = rows[rows >= 0]
    same, largest = np.ones(len(rows), np.bool_), {}
    for column in ("mint_logit", "task_loss"):
        old, new = getattr(before, column), getattr(anew, column)[rows]
        same &= np.isclose(new, old, rtol=tolerance, atol=tolerance, equal_nan=True)
        largest[column] = float(np.nanmax(np.abs(new - old), initial=0.0))
    return {
        "compared": len(rows),
        "missing": len(saved) - len(rows),
        "different": int((~same).sum()),
        "predictions": int((anew.prediction[rows] != before.prediction).sum()),
        "largest": largest,
        "tolerance": tolerance,
    }
