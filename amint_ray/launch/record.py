"""The end of a run: figures, pictures, artifacts and the registered model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from amint_ray.config.load import fingerprint
from amint_ray.contracts import Role
from amint_ray.evaluation.figures import roc_curves, score_histograms
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import read_scores
from amint_ray.launch.prepare import Prepared
from amint_ray.tracking import registry
from amint_ray.tracking.run_log import RunLog, without_password
from amint_ray.train.loop import SCORES
from amint_ray.train.state import WEIGHTS


def record(prepared: Prepared, checkpoint: Path, log: RunLog) -> dict[str, Any]:
    """Measure, store, and register last, so that a registered version has everything behind it.

    Returns:
        The run's document, as `run_training` describes it.
    """
    config = prepared.config
    table = read_scores(checkpoint / SCORES)
    head_trained = config.loss.lambda_mint > 0
    figures = evaluate(table, config.evaluation, head_trained=head_trained)
    log.log_figures(figures, step=config.train.epochs)
    with tempfile.TemporaryDirectory(prefix="amint-artifacts-") as name:
        folder = Path(name)
        prepared.manifest.write(folder / "manifest.parquet")
        (folder / SCORES).write_bytes((checkpoint / SCORES).read_bytes())
        (folder / "figures.json").write_text(json.dumps(figures, indent=2))
        roc_curves(table, figures).savefig(folder / "roc.png", dpi=120)
        score_histograms(table).savefig(folder / "scores.png", dpi=120)
        log.log_folder(folder)
    # A model whose head says nothing must not become the newest version of one whose head does.
    name = config.registered_model + ("" if head_trained else "-plain")
    version = registry.register(
        name,
        run_id=log.run_id,
        weights=checkpoint / WEIGHTS,
        architecture=prepared.architecture,
        data=config.data,
        class_names=prepared.class_names,
        calibration=table.of(Role.CALIBRATION).mint_logit if head_trained else np.empty(0),
    )
    model_uri = f"models:/{name}/{version}"
    return {
        "run_id": log.run_id,
        "run_name": prepared.run_name,
        "tracking_uri": without_password(prepared.tracking_uri),
        "recipe": config.name,
        "model_uri": model_uri,
        "load": f'amint_ray.load("{model_uri}")',
        **figures,
        "counts": prepared.manifest.counts,
        "duplicates": prepared.manifest.duplicates,
        "manifest_fingerprint": prepared.manifest.fingerprint,
        "config_fingerprint": fingerprint(config),
        "seeds": {"train": config.train.seed, "split": config.data.split_seed, "count": 1},
    }
