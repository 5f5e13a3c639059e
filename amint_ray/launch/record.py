"""The end of a run: figures, pictures, artifacts and the registered model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amint_ray.config.load import fingerprint
from amint_ray.contracts import Role
from amint_ray.data.quarantine import write_quarantine
from amint_ray.evaluation.figures import roc_curves, score_histograms
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import read_scores, write_scores
from amint_ray.launch.prepare import Prepared
from amint_ray.tracking import registry
from amint_ray.tracking.folder import write_folder
from amint_ray.tracking.run_log import RunLog, without_password
from amint_ray.train.loop import SCORES
from amint_ray.train.state import WEIGHTS


def record(
    prepared: Prepared, checkpoint: Path, log: RunLog, *, lost: Mapping[str, str]
) -> dict[str, Any]:
    """Measure, store, and register last, so that a registered version has everything behind it.

    Args:
        prepared: the run's settings and data.
        checkpoint: the last one.
        log: the MLflow run.
        lost: images that could not be read when their turn came: the reason by sample id.

    Returns:
        The run's document, as `run_training` describes it.
    """
    config = prepared.config
    table = read_scores(checkpoint / SCORES)
    # What no step may have seen must not be measured as a member.
    table = table.without(lost)
    head_trained = config.loss.lambda_mint > 0
    figures = evaluate(table, config.evaluation, head_trained=head_trained)
    figures["confounders"] = prepared.confounders
    index = prepared.dataset.index
    quarantine = [*index.quarantine, *lost.items()]
    log.log_figures(figures, step=config.train.epochs)
    with tempfile.TemporaryDirectory(prefix="amint-artifacts-") as name:
        folder = Path(name)
        index.manifest.write(folder / "manifest.parquet")
        write_quarantine(quarantine, folder / "quarantine.parquet")
        write_scores(table, folder / SCORES)
        (folder / "figures.json").write_text(json.dumps(figures, indent=2))
        roc_curves(table, figures).savefig(folder / "roc.png", dpi=120)
        score_histograms(table).savefig(folder / "scores.png", dpi=120)
        log.log_folder(folder)
    # A model whose head says nothing must not become the newest version of one whose head does.
    name = config.registered_model + ("" if head_trained else "-plain")
    with tempfile.TemporaryDirectory(prefix="amint-model-") as parent:
        model = Path(parent) / "model"
        no_program = write_folder(
            model,
            weights=checkpoint / WEIGHTS,
            architecture=prepared.architecture,
            data=config.data,
            class_names=index.class_names,
            calibration=table.of(Role.CALIBRATION).mint_logit if head_trained else np.empty(0),
        )
        version = registry.register(model, name, run_id=log.run_id, tags={}, description="")
    model_uri = f"models:/{name}/{version}"
    return {
        "run_id": log.run_id,
        "run_name": prepared.run_name,
        "tracking_uri": without_password(prepared.tracking_uri),
        "recipe": config.name,
        "model_uri": model_uri,
        "load": f'amint_ray.load("{model_uri}")',
        "no_program": no_program,
        **figures,
        "data": {"source": config.data.source, "mode": config.data.mode},
        "counts": index.manifest.counts,
        "duplicates": index.manifest.duplicates,
        "quarantined": len(quarantine),
        "lost": len(lost),
        "manifest_fingerprint": index.manifest.fingerprint,
        "config_fingerprint": fingerprint(config),
        "seeds": {"train": config.train.seed, "split": config.data.split_seed, "count": 1},
    }
