"""From scores to the table: both questions for every method, and how it takes edited suspects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from amint_ray.attacks.evidence import EDITS, Evidence, Mask, Names
from amint_ray.attacks.method import Method
from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, UserError, first_line
from amint_ray.evaluation import metrics
from amint_ray.evaluation.outputs import Scores
from amint_ray.evaluation.report import blank, membership_figures, rates_at

QUESTIONS = (Role.MEMBER, Role.WITHHELD)
"""What is compared with `test`."""
ROBUSTNESS_FPR = 0.01
"""At which the true-positive rate of edited members is given."""

_COLUMNS = ("sample_id", "role", "label", "known")  # of the file of scores, beside the methods


@dataclass(frozen=True)
class AttackScores:
    """The file of scores; all arrays (n,).

    Attributes:
        sample_id: as in `Evidence`.
        role: likewise.
        label: likewise.
        known: likewise.
        scores: by method, NaN where not scored.
    """

    sample_id: Names
    role: Names
    label: npt.NDArray[np.int64]
    known: Mask
    scores: Mapping[str, Scores]


def measure(method: Method, evidence: Evidence, config: Evaluation) -> dict[str, Any]:
    """Every figure of one method on the images as they are.

    Args:
        method: the attack.
        evidence: what it reads.
        config: levels and confidences.

    Returns:
        See `measure_scores`.
    """
    scores, why = method.scores(evidence)
    return measure_scores(method, evidence, scores, config, why=why)


def measure_scores(
    method: Method, evidence: Evidence, scores: Scores, config: Evaluation, *, why: str | None
) -> dict[str, Any]:
    """The same from scores that are at hand.

    Args:
        method: whose they are.
        evidence: tells the roles, and what is known.
        scores: (n,), NaN where not scored.
        config: levels and confidences.
        why: why nothing was scored, or None.

    Returns:
        For `member` and `withheld`, each against `test`, what
        `evaluation.report.membership_figures` gives; and in `compared.left_out` how many
        `positives`, `negatives` and `calibration` images are not in it: not scored, or known to a
        fitted method.
    """
    kept = measured_on(method, evidence, scores)
    figures = {}
    for role in QUESTIONS:
        found = membership_figures(evidence.role[kept], scores[kept], config, of=role)
        left_out = {
            name: int((evidence.of(one) & ~kept).sum())
            for name, one in (
                ("positives", role),
                ("negatives", Role.TEST),
                ("calibration", Role.CALIBRATION),
            )
        }
        found = found if why is None else blank(found, why)
        figures[role.value] = found | {"compared": found["compared"] | {"left_out": left_out}}
    return figures


def measured_on(method: Method, evidence: Evidence, scores: Scores) -> Mask:
    """(n,) which samples a method is measured on: scored, and not what it was fitted to."""
    scored: Mask = np.isfinite(scores)
    return scored & ~evidence.known if method.fitted else scored


def robustness(method: Method, evidence: Evidence, config: Evaluation) -> dict[str, Any]:
    """How well a method sees members that were edited since, among unseen images edited likewise.

    Thresholds are those of the plain calibration images: an auditor does not know of the edit.

    Args:
        method: the attack; one that does not read the suspect has no such figures.
        evidence: what it reads.
        config: confidences.

    Returns:
        For each edit that the model was shown: for `member` and `withheld` `auc`, `tpr` and
        `realised_fpr` at 1 % by calibration. Leaves are `{value, low, high}`.
    """
    if not method.reads_suspect:
        return {}
    plain, _ = method.scores(evidence)
    kept = measured_on(method, evidence, plain) & evidence.of(Role.CALIBRATION)
    found: dict[str, Any] = {}
    for edit in (each for each in EDITS if each in evidence.outputs):
        scores, why = method.scores(evidence, edit)
        compared = measured_on(method, evidence, scores) & ~evidence.of(Role.CALIBRATION)
        figures = {
            role.value: _edited(
                scores[compared & evidence.of(role)],
                scores[compared & evidence.of(Role.TEST)],
                plain[kept],
                config,
            )
            for role in QUESTIONS
        }
        found[edit] = figures if why is None else blank(figures, why)
    return found


def _edited(
    positives: Scores, negatives: Scores, calibration: Scores, config: Evaluation
) -> dict[str, Any]:
    tpr, fpr = rates_at(ROBUSTNESS_FPR, positives, negatives, calibration, config)
    area = metrics.auc(positives, negatives, confidence=config.confidence)
    return {"auc": area.as_dict(), "tpr": tpr.as_dict(), "realised_fpr": fpr.as_dict()}


def write_attack_scores(path: Path, evidence: Evidence, scores: Mapping[str, Scores]) -> None:
    """Store every method's scores as Parquet, one row a sample.

    Args:
        path: of the file.
        evidence: names the samples.
        scores: by method (n,), NaN where not scored.
    """
    columns: dict[str, npt.NDArray[Any]] = {name: getattr(evidence, name) for name in _COLUMNS}
    columns |= scores
    pq.write_table(pa.table({name: pa.array(column) for name, column in columns.items()}), path)


def read_attack_scores(path: Path) -> AttackScores:
    """Load what `write_attack_scores` stored.

    Raises:
        UserError: the file is no such table.
    """
    try:
        table = pq.read_table(path)
        names, roles = (np.array(table[name].to_pylist(), np.str_) for name in _COLUMNS[:2])
        return AttackScores(
            sample_id=names,
            role=roles,
            label=table["label"].to_numpy(),
            known=np.array(table["known"].to_pylist(), np.bool_),
            scores={n: table[n].to_numpy() for n in table.column_names if n not in _COLUMNS},
        )
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{path}: not a table of attack scores: {first_line(error)}") from error
