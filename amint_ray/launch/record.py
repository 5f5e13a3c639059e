"""The end of a run: figures, pictures, artifacts and the registered model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amint_ray.config.load import fingerprint
from amint_ray.contracts import Role, Watcher
from amint_ray.data.quarantine import write_quarantine
from amint_ray.evaluation.figures import (
    calibration_curve,
    loss_curves,
    roc_curves,
    score_histograms,
)
from amint_ray.evaluation.metrics import Interval
from amint_ray.evaluation.report import evaluate
from amint_ray.evaluation.scores import read_scores, write_scores
from amint_ray.launch.beside import MODEL
from amint_ray.launch.prepare import Prepared
from amint_ray.launch.recording import Recording
from amint_ray.tracking.card import CARD, model_card, shortened
from amint_ray.tracking.folder import Code, Confounders, write_folder
from amint_ray.tracking.headline import headline_tags
from amint_ray.tracking.run_log import environment, without_password
from amint_ray.train.loop import REFERENCE, SCORES
from amint_ray.train.state import WEIGHTS


def record(
    prepared: Prepared,
    checkpoint: Path,
    run: Recording,
    *,
    history: Sequence[Mapping[str, float]],
    lost: Mapping[str, str],
    register: bool,
) -> dict[str, Any]:
    """Measure and store; the model last, so that a registered version has everything behind it.

    Args:
        prepared: the run's settings and data.
        checkpoint: the last one.
        run: is told all of it.
        history: of the epochs.
        lost: images that could not be read when their turn came: the reason by sample id.
        register: the model.

    Returns:
        The run's document, as `run_training` describes it, without what MLflow has yet to say.
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
    told = config.trains_membership
    keyed, code = config.mint.keyed, None
    if config.uses_key:
        assert keyed.fingerprint is not None
        code = Code(keyed.fingerprint, keyed.code_from, keyed.bits, told)
    # A model whose head says nothing must not become the newest version of one whose head does.
    name = config.registered_model + ("" if head_trained else "-plain")
    model = run.new_folder()
    reference = checkpoint / REFERENCE
    no_program = write_folder(
        model,
        weights=checkpoint / WEIGHTS,
        architecture=prepared.architecture,
        data=config.data,
        class_names=index.class_names,
        # Of codes alone nobody has scores to compare with calibration's but who has the key.
        calibration=table.of(Role.CALIBRATION).mint_logit if told else np.empty(0),
        reference=reference if reference.is_file() else None,
        code=code,
        confounders=_confounders(prepared.confounders),
    )
    document = {
        "run_id": run.run_id or None,
        "registered_model": name,
        "no_program": no_program,
        "run_name": prepared.run_name,
        "tracking_uri": without_password(prepared.tracking_uri)
        if config.tracking.enabled
        else None,
        "recipe": config.name,
        **figures,
        "data": {"source": config.data.source, "mode": config.data.mode},
        "counts": index.manifest.counts,
        "duplicates": index.manifest.duplicates,
        "quarantined": len(quarantine),
        "lost": len(lost),
        "manifest_fingerprint": index.manifest.fingerprint,
        "config_fingerprint": fingerprint(config),
        "objective": config.mint.objective,
        "key_fingerprint": keyed.fingerprint if config.uses_key else None,
        "seeds": {"train": config.train.seed, "split": config.data.split_seed, "count": 1},
    }
    card = model_card(
        document,
        name=name,
        config=config,
        architecture=prepared.architecture,
        environment=environment(),
    )
    run.tell_figures(figures, step=config.train.epochs)
    folder = run.new_folder()
    index.manifest.write(folder / "manifest.parquet")
    write_quarantine(quarantine, folder / "quarantine.parquet")
    write_scores(table, folder / SCORES)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2))
    (folder / CARD).write_text(card, encoding="utf-8")
    pictures = {
        "roc": roc_curves(table, figures),
        "scores": score_histograms(table),
        "losses": loss_curves(history),
    }
    if head_trained:
        pictures["calibration"] = calibration_curve(table, figures)
    for picture_name, picture in pictures.items():
        picture.savefig(folder / f"{picture_name}.png", dpi=120)
    run.tell_files(folder)
    if register:
        run.tell_model(model, name, tags=headline_tags(document), description=shortened(card))
    return document


def _confounders(found: Mapping[str, Any] | None) -> Confounders | None:
    """As the registered model keeps it, for whoever has nothing but its folder."""
    if found is None:
        return None
    return Confounders(found["clean"], Interval(**found["comparisons"]["member_vs_test"]["auc"]))


def finish(
    prepared: Prepared, document: Mapping[str, Any], run: Recording, watcher: Watcher
) -> dict[str, Any]:
    """Close the MLflow run; what can be said of it then, to be added to the run's document.

    Returns:
        `model_uri`, `load` (the line that gives the model) and `waiting` (where records wait that
        MLflow did not take); each is None where there is no such thing.
    """
    wait_seconds = prepared.config.tracking.wait_seconds
    versions, waiting = run.finish(watcher, wait_seconds=wait_seconds)
    name = document["registered_model"]
    model_uri = f"models:/{name}/{versions[name]}" if name in versions else None
    load = model_uri
    if not prepared.config.tracking.enabled:
        place = prepared.storage.below(f"{prepared.run_name}/{MODEL}")
        load = place.uri if prepared.storage.remote else place.path
    return {
        "model_uri": model_uri,
        "load": None if load is None else f"amint_ray.load({json.dumps(load)})",
        "waiting": None if waiting is None else str(waiting),
    }
