"""The end of an attack: the evidence put together, every method's figures, and where they go."""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import PLAIN, Evidence, Shadows, choose_known
from amint_ray.attacks.figures import attack_curves
from amint_ray.attacks.leak import (
    IN_D,
    compare_models,
    leave_one_out,
    outsiders,
    paired_over_targets,
)
from amint_ray.attacks.method import Method
from amint_ray.attacks.shadows import POOL
from amint_ray.attacks.table import QUESTIONS, measure_scores, robustness, write_attack_scores
from amint_ray.contracts import Role, RunError, UserError, Watcher, first_line, leaves
from amint_ray.evaluation.outputs import Outputs, append_samples
from amint_ray.launch.attack_parts import Done, Task, fingerprint_of, read_part
from amint_ray.launch.attack_plan import AttackPlan
from amint_ray.launch.attack_worker import Arrays
from amint_ray.launch.earlier import Earlier
from amint_ray.storage import write_atomically
from amint_ray.tracking.versions import asking, open_mlflow

SCORES = "attack_scores.parquet"
_FIELDS = ("label_confidence", "top_confidence", "entropy", "margin", "right")
_METRICS_AT_ONCE = 500
_FEWEST = 2
"""Shadow models without which nothing can be compared."""


def conclude(
    plan: AttackPlan,
    earlier: Earlier,
    methods: Sequence[Method],
    done: Done,
    watcher: Watcher,
    *,
    uri: str,
) -> dict[str, Any]:
    """Score, measure, draw and record.

    Args:
        plan: whose parts are all done.
        earlier: the run whose model it is.
        methods: in the table's order.
        done: what was run for it now.
        watcher: is told how far it is.
        uri: of the model, as the user named it.

    Returns:
        `model`, `run_id`, `attack` (its name), `settings`; `methods`: by name `title`, `source`,
        `member` and `withheld` (against `test`: figures as a run has them), `robustness` (the same
        by edit, fewer) and `cost` (`seconds` to score, `core_hours` of the trainings it needs);
        `leak` (`pair`: this model and its twin with λ₂ = 0, `trainings`: the same difference over
        pairs of shadow models; None: not compared); `shadows` (`asked`, `used`, `failed`),
        `counts` of images by role, `confidence`, `seeds`, `compared`, `seconds`, `artifacts`
        (folder of the run's artifacts) and `recorded` (whether MLflow has taken them).
    """
    watcher.phase("scoring by all methods")
    config, confidence = plan.config, plan.config.evaluation.confidence
    with tempfile.TemporaryDirectory(prefix="amint-attack-") as scratch:
        evidence = _evidence(plan, done, Path(scratch))
        _tell_of_shadows(evidence, plan, watcher)
        cost_of_shadows = _core_seconds(plan, plan.shadows)
        found: dict[str, Any] = {}
        scores: dict[str, npt.NDArray[np.float64]] = {}
        for method in methods:
            watcher.heartbeat()
            started = time.perf_counter()
            scores[method.name], why = method.scores(evidence)
            seconds = time.perf_counter() - started
            trainings = cost_of_shadows if "shadows" in method.needs else 0.0
            if "passive" in method.needs and plan.passive is not None:
                trainings += _core_seconds(plan, [plan.passive])
            figures = measure_scores(
                method, evidence, scores[method.name], config.evaluation, why=why
            )
            found[method.name] = {
                "title": method.title,
                "source": method.source,
                **figures,
                "robustness": robustness(method, evidence, config.evaluation),
                "cost": {"seconds": seconds, "core_hours": trainings / 3600},
            }
        leak = _leak(plan, done, evidence, Path(scratch) / "plain", watcher)
        document: dict[str, Any] = {
            "model": uri,
            "run_id": earlier.run_id,
            "attack": plan.place.path.rsplit("/", 1)[-1],
            "settings": plan.settings.model_dump(),
            "methods": found,
            "leak": leak,
            "shadows": {
                "asked": plan.settings.shadows if plan.shadows else 0,
                "used": 0 if evidence.shadows is None else len(evidence.shadows),
                "failed": done.failed,
                "loss": "plain" if plan.shadows and plan.shadows is plan.twin_shadows else "same",
            },
            "counts": {role.value: int(evidence.of(role).sum()) for role in POOL},
            "confidence": confidence,
            "seeds": {"train": config.train.seed, "split": config.data.split_seed, "count": 1},
            "compared": [f"{role.value} vs test" for role in QUESTIONS],
            "seconds": {
                "parts": sum(done.seconds.values()),
                "parts_by_name": done.seconds,
                "reused": len(done.reused),
            },
        }
        document |= _record(plan, earlier, methods, evidence, scores, document, watcher)
    return document


def _evidence(plan: AttackPlan, done: Done, scratch: Path) -> Evidence:
    """All that methods may read of the audited model."""
    own = [read_part(task.part) for task in plan.own]
    outputs = {edit: append_samples([_outputs(part, edit) for part in own]) for edit in plan.edits}
    positions = plan.positions
    sample_id, role = plan.manifest.sample_id[positions], plan.manifest.role[positions]
    in_d = np.isin(role, [each.value for each in IN_D])
    pixels = {edit: np.concatenate([part[f"pixels/{edit}"] for part in own]) for edit in plan.edits}
    known_pixels = pixels[PLAIN][in_d]
    known_pixels = known_pixels[known_pixels != 0]  # 0: of an image that could not be had
    mint = None
    if plan.config.trains_membership:
        mint = {edit: np.concatenate([part[f"mint/{edit}"] for part in own]) for edit in plan.edits}
    members = int((role == Role.MEMBER.value).sum())
    passive = None
    if plan.passive is not None and plan.passive.part.name not in done.failed:
        part = read_part(plan.passive.part)
        passive = {edit: part[f"mint/{edit}"] for edit in plan.edits}
    snapshots = None
    if plan.snapshots:
        looks = [read_part(task.part) for task in plan.snapshots]
        snapshots = {edit: [_outputs(part, edit) for part in looks] for edit in plan.edits}
    return Evidence(
        sample_id=sample_id,
        role=role,
        label=plan.manifest.label[positions],
        outputs=outputs,
        known=choose_known(
            plan.manifest.content[positions],
            role,
            members=min(plan.settings.known, members // 2),
            seed=plan.settings.seed,
        ),
        mint_logit=mint,
        passive_logit=passive,
        listed={edit: np.isin(pixels[edit], known_pixels) for edit in plan.edits},
        blind=None if plan.blind is None else read_part(plan.blind.part)["blind"],
        shadows=_shadows(plan, plan.shadows, done, scratch, plan.edits),
        snapshots=snapshots,
    )


def _outputs(part: Arrays, edit: str) -> Outputs:
    return Outputs(**{field: part[f"{edit}/{field}"] for field in _FIELDS})


def _shadows(
    plan: AttackPlan, tasks: Sequence[Task], done: Done, scratch: Path, edits: Sequence[str]
) -> Shadows | None:
    """What the shadow models say, on disk: one of them is in memory at a time."""
    kept = [i for i, task in enumerate(tasks) if task.part.name not in done.failed]
    if len(kept) < _FEWEST:
        return None
    scratch.mkdir(parents=True, exist_ok=True)
    shape = (len(kept), len(plan.positions))
    tables = {
        edit: np.lib.format.open_memmap(scratch / f"{edit}.npy", "w+", np.float32, shape)
        for edit in edits
    }
    for row, number in enumerate(kept):
        part = read_part(tasks[number].part)
        for edit in edits:
            tables[edit][row] = part[f"{edit}/label_confidence"][0]
    return Shadows(plan.inside[kept], tables)


def _tell_of_shadows(evidence: Evidence, plan: AttackPlan, watcher: Watcher) -> None:
    if not plan.shadows:
        return
    if evidence.shadows is None:
        watcher.notice("fewer than two shadow models came to something: nothing is compared")
        return
    inside = evidence.shadows.inside
    fewest, fewest_without = (int(of.sum(axis=0).min()) for of in (inside, ~inside))
    few = []
    if fewest < _FEWEST:
        few.append(f"some images train only {fewest}" if fewest else "some images train none")
    if fewest_without < _FEWEST:
        few.append(f"some train all but {fewest_without}" if fewest_without else "some train all")
    if few:
        watcher.notice(
            f"attack.shadows = {plan.settings.shadows}: {' and '.join(few)} of the {len(inside)} "
            "shadow models; a method that needs more with an image, or without it, leaves that "
            "image out"
        )


def _leak(
    plan: AttackPlan, done: Done, evidence: Evidence, scratch: Path, watcher: Watcher
) -> dict[str, Any] | None:
    """Whether joint training tells an outsider more; None where it is not asked."""
    if plan.twin is None:
        return None
    if plan.twin.part.name in done.failed:
        watcher.notice("the model with λ₂ = 0 came to nothing: what aMINT leaks is not known")
        return None
    twin = read_part(plan.twin.part)
    shadows = _shadows(plan, plan.twin_shadows, done, scratch, [PLAIN])
    plain = replace(evidence, outputs={PLAIN: _outputs(twin, PLAIN)}, shadows=shadows)
    methods = outsiders(evidence, plain)
    pair = compare_models(evidence, plain, methods, plan.config.evaluation)
    trainings = None
    if plan.shadows is not plan.twin_shadows and plan.shadows:
        trainings = _over_trainings(plan, done, scratch, evidence, methods)
    return {"pair": pair, "trainings": trainings}


def _over_trainings(
    plan: AttackPlan, done: Done, scratch: Path, evidence: Evidence, methods: Sequence[Method]
) -> dict[str, Any] | None:
    """The same difference with each pair of shadow models as the models that are attacked."""
    failed = done.failed
    pairs = [
        i
        for i, (one, other) in enumerate(zip(plan.shadows, plan.twin_shadows, strict=True))
        if one.part.name not in failed and other.part.name not in failed
    ]
    kinds = {}
    for kind, tasks in (("joint", plan.shadows), ("plain", plan.twin_shadows)):
        paired = replace(plan, inside=plan.inside[pairs])
        chosen = _shadows(paired, [tasks[i] for i in pairs], done, scratch / kind, [PLAIN])
        if chosen is None:
            return None
        kinds[kind] = leave_one_out(chosen, evidence.label, methods=methods)
    confidence = plan.config.evaluation.confidence
    return {
        method.name: {
            "auc": paired_over_targets(
                kinds["joint"][method.name], kinds["plain"][method.name], confidence=confidence
            ),
            # JSON has no NaN.
            **{
                kind: [area if np.isfinite(area) else None for area in areas[method.name].tolist()]
                for kind, areas in kinds.items()
            },
        }
        for method in methods
    }


def _core_seconds(plan: AttackPlan, tasks: Sequence[Task]) -> float:
    """Core seconds that trainings took, whenever that was."""
    cores = plan.config.cluster.cpus_per_worker
    return cores * sum(float(read_part(task.part)["seconds"]) for task in tasks)


def _record(
    plan: AttackPlan,
    earlier: Earlier,
    methods: Sequence[Method],
    evidence: Evidence,
    scores: Mapping[str, npt.NDArray[np.float64]],
    document: Mapping[str, Any],
    watcher: Watcher,
) -> dict[str, Any]:
    """Keep table, scores and pictures with the attack, and tell the model's run of them."""
    watcher.phase("recording")
    asked = {"settings": document["settings"], "methods": [method.name for method in methods]}
    artifacts = f"attacks/{document['attack'][:8]}-{fingerprint_of(asked)[:8]}"
    with tempfile.TemporaryDirectory(prefix="amint-attack-") as name:
        folder = Path(name)
        (folder / "attack.json").write_text(json.dumps(document, indent=2))
        _write_table(folder / "attack.csv", document["methods"])
        write_attack_scores(folder / SCORES, evidence, scores)
        for question in QUESTIONS:
            picture = attack_curves(
                methods, evidence, scores, document["methods"], question=question
            )
            picture.savefig(folder / f"roc_{question.value}.png", dpi=120)
        try:
            for file in sorted(folder.iterdir()):
                beside = f"{artifacts.partition('/')[2]}/{file.name}"
                with write_atomically(plan.place, beside) as kept:
                    kept.write(file.read_bytes())
        except OSError as error:
            raise RunError(f"{plan.place.uri}: {first_line(error)}") from error
        recorded = _tell_mlflow(earlier.run_id, folder, artifacts, document, watcher)
    return {
        "artifacts": artifacts,
        "kept": plan.place.below(artifacts.partition("/")[2]).uri,
        "recorded": recorded,
    }


def _write_table(path: Path, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """A row a method and question, with every figure and its limits."""
    rows = [
        {"method": name, "question": question.value, **leaves(method[question.value])}
        for name, method in methods.items()
        for question in QUESTIONS
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _tell_mlflow(
    run_id: str, folder: Path, artifacts: str, document: Mapping[str, Any], watcher: Watcher
) -> bool:
    """Add files, metrics and a tag to the model's run; what MLflow does not take is said."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    values = {
        f"attack.{name}.{question.value}.{figure}": value
        for name, method in document["methods"].items()
        for question in QUESTIONS
        for figure, value in leaves(method[question.value]).items()
    }
    try:
        client = open_mlflow()
        asking(client.log_artifacts, run_id, str(folder), artifacts)
        metrics = [Metric(name, value, now, 0) for name, value in values.items()]
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            asking(client.log_batch, run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
        asking(client.log_batch, run_id, tags=[RunTag("amint.attacked", artifacts)])
    except UserError as error:
        watcher.notice(f"{error}; the results are kept in storage, the same command records them")
        return False
    return True
