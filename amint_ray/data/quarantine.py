"""What cannot be used: how much of it is allowed, and the list that is kept with a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.data.index import Index
from amint_ray.data.sources import Source, count, external_from


def _fractions(source: Source, index: Index) -> tuple[float, float]:
    """Shares of pool and external source that cannot be used; neither must hide the other's."""
    edge = external_from(source)
    rows = [sum(s.rows for s in part) for part in (source.shards[:edge], source.shards[edge:])]
    used = np.bincount((index.shard >= edge).astype(int), minlength=2)
    used[1] += index.overlap
    return tuple((n - u) / max(n, 1) for n, u in zip(rows, used.tolist(), strict=True))


def bad_fraction(source: Source, images: float) -> float:
    """The largest share that cannot be used, whole files included.

    How many images a file had that cannot be opened is unknown; its bytes tell about. Files of the
    pool and of the external source are weighed among their own.

    Args:
        source: whose files they are.
        images: share of the images in all other files.
    """
    edge, shares = external_from(source), [images]
    for external, shards in ((False, source.shards[:edge]), (True, source.shards[edge:])):
        lost = sum(file.size for file in source.unreadable if file.external == external)
        shares.append(lost / max(lost + sum(shard.size for shard in shards), 1))
    return max(shares)


def check_quarantine(source: Source, index: Index, config: Data) -> None:
    """Whether too much had to be left out.

    Raises:
        UserError: more than `data.max_bad_fraction`.
    """
    bad, total = len(index.quarantine) - len(source.unreadable), count(source)
    fraction = bad_fraction(source, max(_fractions(source, index)))
    if fraction > config.max_bad_fraction:
        first, reason = index.quarantine[0]
        files = f" and {len(source.unreadable)} whole files" if source.unreadable else ""
        raise UserError(
            f"data: {bad:,} of {total:,} images{files} cannot be used, more than "
            f"data.max_bad_fraction = {config.max_bad_fraction:g} allows; the first: {first}: "
            f"{reason}; `amint data` lists them; mend them, or allow more"
        )


def write_quarantine(quarantine: Sequence[tuple[str, str]], path: Path) -> None:
    """Store what could not be used, and why, as Parquet."""
    names, reasons = [name for name, _ in quarantine], [reason for _, reason in quarantine]
    columns = {"sample_id": pa.array(names, pa.string()), "reason": pa.array(reasons, pa.string())}
    pq.write_table(pa.table(columns), path)
