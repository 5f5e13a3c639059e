"""The end of an evaluation: pictures, and what the model's run is told of it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amint_ray.contracts import ScoreTable, UserError, Watcher
from amint_ray.evaluation.figures import (
    calibration_curve,
    group_intervals,
    roc_curves,
    score_histograms,
)
from amint_ray.tracking.versions import asking, open_mlflow

DOCUMENT = "evaluation.json"


def name_evaluation(document: Mapping[str, Any]) -> str:
    """The folder of an evaluation among its runs' artifacts.

    It is named by what the document says: the same evaluation is recorded once.
    """
    return f"evaluations/{hashlib.sha256(_text(document).encode()).hexdigest()[:12]}"


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2)


def record_evaluation(
    one: Mapping[str, Any],
    table: ScoreTable,
    document: Mapping[str, Any],
    artifacts: str,
    watcher: Watcher,
) -> bool:
    """Draw a model's pictures, and add them and the whole document to its run's artifacts.

    Args:
        one: the model's part of the document.
        table: the scores it was made of.
        document: of all models, the same for each of them.
        artifacts: the folder.
        watcher: is told where MLflow does not take them.

    Returns:
        Whether it did.
    """
    from mlflow.entities import RunTag

    watcher.phase("recording")
    head_trained = one["figures"]["membership"]["member"]["auc"]["value"] is not None
    with tempfile.TemporaryDirectory(prefix="amint-evaluation-") as name:
        folder = Path(name)
        (folder / DOCUMENT).write_text(_text(document))
        pictures = {"scores": score_histograms(table), "roc": roc_curves(table, one["figures"])}
        if head_trained:
            pictures["calibration"] = calibration_curve(table, one["figures"])
            pictures["groups"] = group_intervals(one["groups"], one["figures"])
        for picture, figure in pictures.items():
            figure.savefig(folder / f"{picture}.png", dpi=120)
        try:
            client = open_mlflow()
            asking(client.log_artifacts, one["run_id"], str(folder), artifacts)
            tags = [RunTag("amint.evaluated", artifacts)]
            asking(client.log_batch, one["run_id"], tags=tags)
        except UserError as error:
            watcher.notice(f"{error}; the same command records the evaluation again")
            return False
    return True
