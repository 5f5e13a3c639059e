"""The end of a run: figures, pictures, artifacts and the registered model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amint_ray.config.load import fingerprint
from amint_ray.contracts import Role
from amint_ray.evaluation.figures import roc_curves, score_histograms
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import read_scores
from amint_ray.tracking import registry
from amint_ray.tracking.run_log import RunLog
from amint_ray.train.loop import SCORES
from amint_ray.train.state import WEIGHTS

if TYPE_CHECKING:
    from amint_ray.launch.train_run import Prepared


def record(prepared: Prepared, checkpoint: Path, log: RunLog) -> dict[str, Any]:
    """Measure, store, and register last, so that a registered version has everything behind it.

    Returns:
        The run's document, as `run_training` describes it.
    """
    config = prepared.config
    table = read_scores(checkpoint / SCORES)
    figures = evaluate(table, config.evaluation)
    log.log_figures(figures, step=config.train.epochs)
    with tempfile.TemporaryDirectory(prefix="amint-artifacts-") as name:
        folder = Path(name)
        prepared.manifest.write(folder / "manifest.parquet")
        (folder / SCORES).write_bytes((checkpoint / SCORES).read_bytes())
        (folder / "figures.json").write_text(json.dumps(figures, indent=2))
        roc_curves(table, figures).savefig(folder / "roc.png", dpi=120)
        score_histograms(table).savefig(folder / "scores.png", dpi=120)
        log.log_folder(folder)
    version = registry.register(
        config.registered_model,
        run_id=log.run_id,
        weights=checkpoint / WEIGHTS,
        architecture=prepared.architecture,
        data=config.data,
        class_names=prepared.images.class_names,
        calibration=table.of(Role.CALIBRATION).mint_logit,
    )
    model_uri = f"models:/{config.registered_model}/{version}"
    return {
        "run_id": log.run_id,
        "run_name": prepared.run_name,
        "tracking_uri": prepared.tracking_uri,
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
