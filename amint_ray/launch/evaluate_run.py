"""`amint evaluate`: everything that is measured of a model, from what MLflow keeps of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amint_ray.contracts import Role, ScoreTable, UserError, Watcher
from amint_ray.evaluation.by_group import group_figures, groups_by, groups_from, read_groups
from amint_ray.evaluation.report import evaluate, four_lines
from amint_ray.evaluation.scores import compare_scores
from amint_ray.evaluation.seeds import groups_over_seeds, over_seeds
from amint_ray.launch.earlier import check_overrides
from amint_ray.launch.evaluate_result import name_evaluation, record_evaluation
from amint_ray.launch.evaluate_saved import PURPOSE, Saved, check_alike, fetch_saved
from amint_ray.tracking.versions import open_mlflow


@dataclass(frozen=True)
class Question:
    """What is asked of each model.

    Attributes:
        by: one of `by_group.BY`; what its groups are.
        groups: a file that gives the groups in its place, or None.
        anew: score all samples again.
        full: make the controls.
        ood: images from elsewhere, for the controls.
    """

    by: str = "label"
    groups: Path | None = None
    anew: bool = False
    full: bool = False
    ood: str | None = None


def run_evaluate(
    models: Sequence[str],
    overrides: Sequence[str],
    question: Question,
    watcher: Watcher,
    *,
    verbose: bool = False,
) -> dict[str, Any]:
    """Measure models; several are taken as seeds of one recipe and combined, too.

    Args:
        models: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or runs' ids.
        overrides: `evaluation.KEY=VALUE`, and where data, storage and cluster are now.
        question: what is asked.
        watcher: is told how far it is.
        verbose: let Ray talk.

    Returns:
        `models`: of each `model`, `run_id`, `recipe`, `seeds`, `counts` (scored images by role),
        `figures` (as `evaluation.report.evaluate` gives them), `lines` (`report.four_lines`),
        `confounders` (what the run found; None: not asked), `groups` (`by`, and what
        `by_group.group_figures` gives), `anew` (`scores.compare_scores`; None: not asked),
        `controls` (None: not asked), the fingerprints, `artifacts` (folder of the run's artifacts)
        and `recorded` (whether MLflow has taken them). `combined`: `figures`, `lines` and `groups`
        over seeds; None for one model. `confidence`, `seconds`.

    Raises:
        UserError: a mistake of the user's.
        RunError: a control failed.
    """
    started = time.perf_counter()
    if question.ood is not None and not question.full:
        raise UserError("--ood is one of the controls; give --full, too")
    check_overrides(overrides, purpose=PURPOSE, also=("evaluation",))
    listed = None if question.groups is None else read_groups(question.groups)
    client = open_mlflow()
    found = []
    for uri in models:
        watcher.phase(f"fetching {uri}")
        found.append(fetch_saved(client, uri, overrides))
    check_alike(found)
    evaluated = [_evaluate(each, question, listed, watcher, verbose=verbose) for each in found]
    documents = [each for each, _ in evaluated]
    confidence = found[0].earlier.config.evaluation.confidence
    document: dict[str, Any] = {
        "models": documents,
        "combined": _combined(documents, confidence) if len(documents) > 1 else None,
        "confidence": confidence,
    }
    artifacts = name_evaluation(document)
    recorded = [record_evaluation(*each, document, artifacts, watcher) for each in evaluated]
    for each, done in zip(documents, recorded, strict=True):
        each |= {"artifacts": artifacts, "recorded": done}
    return {**document, "seconds": {"total": time.perf_counter() - started}}


def _evaluate(
    saved: Saved,
    question: Question,
    listed: Mapping[str, str] | None,
    watcher: Watcher,
    *,
    verbose: bool,
) -> tuple[dict[str, Any], ScoreTable]:
    """One model's document, and the scores that it was made of."""
    table, config = saved.table, saved.earlier.config
    controls = anew = None
    if question.anew or question.full:
        from amint_ray.launch.evaluate_controls import Asked, ask_on_ray  # Ray: seconds

        asked = Asked(anew=question.anew, full=question.full, ood=question.ood)
        answered = ask_on_ray(saved.uri, saved.earlier, table, asked, watcher, verbose=verbose)
        controls = answered.controls
        if answered.table is not None:
            anew = compare_scores(table, answered.table)
            if anew["different"] or anew["missing"]:
                watcher.notice(
                    f"{saved.uri}: of {len(table):,} saved scores {anew['different']:,} are "
                    f"others now and {anew['missing']:,} could not be made anew"
                )
            # An image that was lost to the training has no saved score, and no role that is true.
            known = np.isin(answered.table.sample_id, table.sample_id)
            table = answered.table.kept(known)
    watcher.phase(f"measuring {saved.uri}")
    figures = evaluate(table, config.evaluation, head_trained=saved.head_trained)
    if listed is None:
        by, groups = question.by, groups_by(table, question.by)
    else:
        by = str(question.groups)
        groups = groups_from(table, listed, where=f"--groups={by}")
    lines = four_lines(figures, saved.confounders)
    if saved.confounders is None and controls is not None:
        lines["blind"] = controls["blind"][Role.MEMBER.value]
    document = {
        "model": saved.uri,
        "run_id": saved.earlier.run_id,
        "recipe": config.name,
        "seeds": {"train": config.train.seed, "split": config.data.split_seed, "count": 1},
        "counts": {role.value: int((table.role == role.value).sum()) for role in Role},
        "lines": lines,
        "figures": figures,
        "confounders": saved.confounders,
        "groups": {
            "by": by,
            **group_figures(table, groups, config.evaluation, head_trained=saved.head_trained),
        },
        "anew": anew,
        "controls": controls,
        "manifest_fingerprint": saved.earlier.fingerprint,
        "config_fingerprint": saved.earlier.tags["amint.config_fingerprint"],
    }
    return document, table


def _combined(documents: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """All models as one result, over seeds."""
    return {
        "seeds": [each["seeds"] for each in documents],
        "lines": over_seeds([each["lines"] for each in documents], confidence=confidence),
        "figures": over_seeds([each["figures"] for each in documents], confidence=confidence),
        "groups": {
            "by": documents[0]["groups"]["by"],
            **groups_over_seeds([each["groups"] for each in documents], confidence=confidence),
        },
    }
