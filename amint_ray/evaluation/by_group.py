"""How evenly membership shows: by class, by whether the model is right, or by groups of one's own.

A rate that holds over all of `test` may not hold in each part of it: who belongs to a group that is
accused more often than the rest is owed to be told so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable, UserError, first_line
from amint_ray.evaluation import metrics
from amint_ray.evaluation.calibration import threshold_at
from amint_ray.evaluation.metrics import Interval

Names = npt.NDArray[np.str_]
Scores = npt.NDArray[np.float64]

BY = ("label", "prediction-right")
"""Columns that every table of scores has."""
FEWEST = 10
"""Images of either side in a group below which nothing is stated of it."""
NONE = ""
"""Of samples that are in no group."""
_COLUMNS = ("sample_id", "group")
_ROLES = (Role.MEMBER, Role.WITHHELD, Role.TEST)


def groups_by(table: ScoreTable, by: str) -> Names:
    """(n,) each sample's group by one of `BY`.

    Args:
        table: the scores.
        by: `label`, or `prediction-right`: whether the task's most likely class is the label.
    """
    if by == "label":
        return np.where(table.label < 0, NONE, table.label.astype(np.str_))
    if by == "prediction-right":
        known = np.where(table.prediction == table.label, "right", "wrong")
        return np.where(table.label < 0, NONE, known)
    raise ValueError(f"{by!r} is none of {BY}")


def read_groups(path: Path) -> dict[str, str]:
    """Groups by sample id, from a Parquet or CSV file with the columns `sample_id` and `group`.

    Raises:
        UserError: there is no such file, or it is no such table.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise UserError(f"--groups={path}: give a file that ends in .parquet or .csv")
    if not path.is_file():
        raise UserError(f"--groups={path}: there is no such file")
    try:
        if path.suffix == ".csv":
            as_text = pa.csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.string()))
            table = pa.csv.read_csv(path, convert_options=as_text)
        else:
            table = pq.read_table(path)
    except Exception as error:  # Arrow's, for whatever a file leads to
        raise UserError(f"--groups={path}: cannot be read: {first_line(error)}") from error
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise UserError(
            f"--groups={path}: there is no column {missing[0]!r}; it has "
            f"{', '.join(table.column_names) or 'none'}, and must have sample_id and group"
        )
    found: dict[str, str] = {}
    for name, group in zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True):
        if name is None or group is None:
            continue
        if found.setdefault(str(name), str(group)) != str(group):
            raise UserError(
                f"--groups={path}: {name} is in {found[str(name)]!r} and in {str(group)!r}; a "
                "sample can be in one group"
            )
    return found


def groups_from(table: ScoreTable, groups: Mapping[str, str], *, where: str) -> Names:
    """(n,) each sample's group by a list of one's own.

    Args:
        table: the scores.
        groups: as from `read_groups`.
        where: what the list is called, for the error.

    Raises:
        UserError: no sample of the table is in it.
    """
    found = np.array([groups.get(name, NONE) for name in table.sample_id.tolist()], np.str_)
    if not (found != NONE).any():
        listed, known = next(iter(groups), "nothing"), next(iter(table.sample_id.tolist()), "none")
        raise UserError(
            f"{where}: none of the run's samples is in it; it has {listed!r}, the run {known!r}"
        )
    return found


def group_figures(
    table: ScoreTable, groups: Names, config: Evaluation, *, head_trained: bool
) -> dict[str, Any]:
    """Each group's own figures, by the one threshold that is chosen on all of `calibration`.

    Every interval is the group's own; of many groups, some intervals miss the truth. A group counts
    as `apart` only where its false-positive rate's interval at Bonferroni's level, over all groups
    of which one is stated, does not hold the rate of all of `test`.

    Args:
        table: the scores.
        groups: (n,) `NONE` where a sample is in none.
        config: levels and confidences.
        head_trained: False where λ₂ = 0; then nothing is said of the head.

    Returns:
        `groups`: of each `group`, `images` (by role), `member` and `withheld` (AUC of the MINT head
        against the group's own `test`), `loss` (`member`, by the task loss), `realised_fpr` on
        `test` at the calibrated threshold, and `apart` (None: not known). `ungrouped`: samples of
        these roles that are in no group. Leaves are `{value, low, high}`.
    """
    threshold = threshold_at(config.threshold_fpr, table.of(Role.CALIBRATION).mint_logit)
    if not head_trained:
        threshold = None
    found = [
        _figures(table.kept(groups == name), name, threshold, config, head_trained=head_trained)
        for name in _in_order(groups)
    ]
    _tell_apart(found, table, threshold, config)
    counted = np.isin(table.role, [role.value for role in _ROLES])
    return {"groups": found, "ungrouped": int((counted & (groups == NONE)).sum())}


def _in_order(groups: Names) -> Iterator[str]:
    """Names, whole numbers by their size."""
    names = [name for name in np.unique(groups).tolist() if name != NONE]
    if all(name.isascii() and name.isdecimal() for name in names):
        # Not by `int`, which refuses a name of thousands of digits.
        names.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    yield from names


def _figures(
    table: ScoreTable,
    name: str,
    threshold: float | None,
    config: Evaluation,
    *,
    head_trained: bool,
) -> dict[str, Any]:
    images = {role.value: int((table.role == role.value).sum()) for role in _ROLES}

    def area(role: Role, scores: Scores) -> dict[str, Any]:
        for side in (role, Role.TEST):
            if images[side.value] < FEWEST:
                return _too_few(images[side.value], side)
        positives, negatives = (scores[table.role == each.value] for each in (role, Role.TEST))
        return metrics.auc(positives, negatives, confidence=config.confidence).as_dict()

    def of_head(role: Role) -> dict[str, Any]:
        if not head_trained:
            return Interval.unknown("the MINT head was not trained").as_dict()
        return area(role, table.mint_logit)

    tests, accused = images[Role.TEST.value], None
    if not head_trained:
        rate = Interval.unknown("the MINT head was not trained").as_dict()
    elif threshold is None:
        rate = Interval.unknown("too few calibration images for a threshold").as_dict()
    elif tests < FEWEST:
        rate = _too_few(tests, Role.TEST)
    else:
        accused = int((table.of(Role.TEST).mint_logit > threshold).sum())
        rate = metrics.proportion(accused, tests, confidence=config.confidence).as_dict()
    return {
        "group": name,
        "images": images,
        "member": of_head(Role.MEMBER),
        "withheld": of_head(Role.WITHHELD),
        "loss": area(Role.MEMBER, -table.task_loss),
        "realised_fpr": rate,
        "accused": accused,
    }


def _too_few(images: int, role: Role) -> dict[str, Any]:
    return Interval.unknown(f"{images} {role} images, {FEWEST} needed").as_dict()


def _tell_apart(
    found: list[dict[str, Any]], table: ScoreTable, threshold: float | None, config: Evaluation
) -> None:
    """Add to each group whether its rate is another one than that of all."""
    stated = sum(group["accused"] is not None for group in found)
    corrected = 1 - (1 - config.confidence) / max(1, stated)
    test = table.of(Role.TEST).mint_logit
    for group in found:
        accused = group.pop("accused")
        group["apart"] = None
        if accused is not None and threshold is not None:
            tests = group["images"][Role.TEST.value]
            limits = metrics.proportion(accused, tests, confidence=corrected)
            assert limits.low is not None and limits.high is not None
            group["apart"] = not limits.low <= float((test > threshold).mean()) <= limits.high
