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
from amint_ray.tracking.card import CARD, model_card, shortened
from amint_ray.tracking.headline import headline_tags
from amint_ray.tracking.run_log import RunLog, environment, without_password
from amint_ray.tracking.versions import describe_version
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
    # A model whose head says nothing must not become the newest version of one whose head does.
    name = config.registered_model + ("" if head_trained else "-plain")
    document = {
        "run_id": log.run_id,
        "run_name": prepared.run_name,
        "tracking_uri": without_password(prepared.tracking_uri),
        "recipe": config.name,
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
    card = model_card(
        document,
        name=name,
        config=config,
        architecture=prepared.architecture,
        environment=environment(),
    )
    log.log_figures(figures, step=config.train.epochs)
    with tempfile.TemporaryDirectory(prefix="amint-artifacts-") as temporary:
        folder = Path(temporary)
        index.manifest.write(folder / "manifest.parquet")
        write_quarantine(quarantine, folder / "quarantine.parquet")
        write_scores(table, folder / SCORES)
        (folder / "figures.json").write_text(json.dumps(figures, indent=2))
        (folder / CARD).write_text(card, encoding="utf-8")
        roc_curves(table, figures).savefig(folder / "roc.png", dpi=120)
        score_histograms(table).savefig(folder / "scores.png", dpi=120)
        log.log_folder(folder)
    version = registry.register(
        name,
        run_id=log.run_id,
        weights=checkpoint / WEIGHTS,
        architecture=prepared.architecture,
        data=config.data,
        class_names=index.class_names,
        calibration=table.of(Role.CALIBRATION).mint_logit if head_trained else np.empty(0),
    )
    describe_version(name, version, tags=headline_tags(document), description=shortened(card))
    model_uri = f"models:/{name}/{version}"
    return {**document, "model_uri": model_uri, "load": f'amint_ray.load("{model_uri}")'}
