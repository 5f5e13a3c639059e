"""From what the processes left to an audit's document, its report, and MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.audit.report import REPORT, write_report
from amint_ray.audit.suspects import Settings
from amint_ray.audit.verdict import judge
from amint_ray.audit.yardstick import Yardstick
from amint_ray.config.audit import AuditSettings
from amint_ray.contracts import Role, RunError, UserError, Watcher, first_line
from amint_ray.evaluation.metrics import Interval, auc
from amint_ray.evaluation.reference import ROLES
from amint_ray.launch.attack_parts import fingerprint_of
from amint_ray.launch.audit_images import Images, read_parts
from amint_ray.launch.audit_key import judge_codes
from amint_ray.launch.audit_worker import Asked
from amint_ray.storage import Location, write_atomically
from amint_ray.tracking.folder import Confounders
from amint_ray.tracking.registered import RegisteredModel
from amint_ray.tracking.versions import asking, open_mlflow


@dataclass(frozen=True)
class Origin:
    """What MLflow knows of a model.

    Attributes:
        run_id: of the run that trained it; None: it is not in MLflow.
        tags: of the run.
        metrics: the run's, the last value of each.
    """

    run_id: str | None
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


def conclude(
    asked: Asked,
    parts: Sequence[str],
    model: RegisteredModel,
    judged: Settings,
    settings: AuditSettings,
    origin: Origin,
    watcher: Watcher,
    *,
    uri: str,
    every: bool,
    seconds: Mapping[str, float],
    key: bytes | None = None,
) -> dict[str, Any]:
    """Judge the suspects, write the report, and tell MLflow of it.

    Args:
        asked: what was looked at.
        parts: names of all files.
        model: the audited one.
        judged: how sure to be.
        settings: of the report.
        origin: of the model.
        watcher: is told how far it is.
        uri: of the model.
        every: whether the document is to have all images, and not those alone that are shown.
        seconds: that it took so far.
        key: the verdict rests on it, if there is one.

    Returns:
        The audit's document.

    Raises:
        UserError: there is nothing to judge by.
        RunError: a file is damaged, or storage does not answer.
    """
    watcher.phase("judging")
    given = _given(settings)
    assert model.reference is not None
    yardstick = Yardstick(model.reference)
    read = read_parts(asked, parts, yardstick, trained=len(model.calibration) > 0)
    split = _confounders(model, origin)
    code = model.preprocessing.code
    lines = _lines(model, origin, split, confidence=judged.confidence)
    if key is not None:
        judgement = judge_codes(asked.place, parts, key, model, judged, lines)
    else:
        judgement = judge(
            read.measured,
            yardstick,
            model.calibration,
            judged,
            confounders_clean=split.clean,
            from_mlflow=origin.run_id is not None,
            needs_labels=asked.needs_labels,
            codes_alone=code is not None and not code.membership,
            lines=lines,
        )
    images = Images(asked, read, judgement, model.preprocessing.class_names)
    document = {
        **judgement.document,
        "suspects": {
            "source": asked.found.uri,
            "images": len(images),
            "unreadable": len(read.problems),
            "left_out": dict(asked.found.left_out),
            **judgement.document["suspects"],
        },
        "model": _model(model, origin, uri),
        "settings": given,
        "seconds": dict(seconds),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": f"amint_ray {version('amint_ray')}",
    }
    watcher.phase("writing the report")
    # What was found of the suspects is the same whatever it is judged by; the report is not.
    by = {"model": uri, "suspects": asked.found.uri, **asdict(judged), **given}
    if key is not None and code is not None:
        by["key"] = code.fingerprint
    place = asked.place.below(fingerprint_of(by)[:8])
    with TemporaryDirectory(prefix="amint-audit-") as name:
        folder = Path(name)
        chosen = images.chosen()
        shown = images.at(chosen)
        pictures = images.pictures(chosen, settings.thumbnails)
        write_report({**document, "images": shown}, folder, pictures, rows=images.batches())
        try:
            for file in sorted(folder.iterdir()):
                with write_atomically(place, file.name) as kept, file.open("rb") as made:
                    shutil.copyfileobj(made, kept)
        except OSError as error:
            raise RunError(f"audit.folder: {place.uri}: {first_line(error)}") from error
        recorded = False
        if settings.record and origin.run_id is not None:
            recorded = _tell_mlflow(place, folder, origin.run_id, document, watcher)
    kept_at = {"report": place.below(REPORT).uri, "recorded": recorded}
    return {**document, **kept_at, "images": images.every() if every else shown}


def _given(settings: AuditSettings) -> dict[str, Any]:
    """What was set otherwise than by default and changes the result."""
    silent = {"folder", "record", "thumbnails", "batch_size", "gpus", "retries", "timeout_seconds"}
    return settings.model_dump(mode="json", exclude=silent, exclude_defaults=True)


def _lines(
    model: RegisteredModel, origin: Origin, split: Confounders, *, confidence: float
) -> dict[str, Any]:
    """The four lines that go with every result: AUC of members, withheld ones, blind, and loss.

    The first two and the loss are of the reference against its calibration images. A model that
    says codes alone keeps no losses of images that trained it: those are its run's.
    """
    reference = model.reference
    assert reference is not None
    # φ of the image itself orders images as the loss does.
    loss = reference.told.label_confidence[0].astype(np.float64)
    scores: dict[str, Mapping[str, npt.NDArray[Any]]] = {
        name: {role.value: values[reference.role == role.value] for role in ROLES}
        for name, values in (("head", reference.mint_logit), ("loss", loss))
    }
    untrained = Interval.unknown("the MINT head was not trained (loss.lambda_mint = 0)").as_dict()
    trained = len(model.calibration) > 0
    if not trained and reference.code_matches is not None:
        # Of a head that says codes alone what counts is how many bits of a known one are right.
        scores["head"], trained = reference.code_matches, True

    def against(role: Role, name: str) -> dict[str, Any]:
        of = scores[name]
        return auc(of[role.value], of[Role.CALIBRATION.value], confidence=confidence).as_dict()

    def by_loss(role: Role) -> dict[str, Any]:
        key = f"loss_threshold.{role.value}.auc"
        if len(scores["loss"][role.value]) or key not in origin.metrics:
            return against(role, "loss")
        return _figure(origin, key).as_dict()

    return {
        "member": against(Role.MEMBER, "head") if trained else untrained,
        "withheld": against(Role.WITHHELD, "head") if trained else untrained,
        "blind": split.blind.as_dict(),
        "loss": by_loss(Role.WITHHELD),
        "loss_member": by_loss(Role.MEMBER),
    }


def _figure(origin: Origin, key: str) -> Interval:
    """A figure of the run, as its metrics have it."""
    value, low, high = (origin.metrics[f"{key}{end}"] for end in ("", ".low", ".high"))
    return Interval(value, low, high)


def _confounders(model: RegisteredModel, origin: Origin) -> Confounders:
    """What the model keeps of it; models of earlier versions keep nothing, but their runs do."""
    if model.confounders is not None:
        return model.confounders
    clean = {"true": False, "false": True}.get(origin.tags.get("amint.confounded", ""))
    key = "confounders.comparisons.member_vs_test.auc"
    if key not in origin.metrics:
        blind = Interval.unknown("no blind classifier's figure is stored with the model")
    else:
        blind = _figure(origin, key)
    return Confounders(clean, blind)


def _model(model: RegisteredModel, origin: Origin, uri: str) -> dict[str, Any]:
    """Which model this was."""
    accuracy = {
        end: origin.metrics.get(f"task.accuracy{key}")
        for end, key in (("value", ""), ("low", ".low"), ("high", ".high"))
    }
    return {
        "uri": uri,
        "digest": model.fingerprint(),
        "registered": model.registered,
        "run_id": origin.run_id,
        "manifest_fingerprint": origin.tags.get("amint.manifest_fingerprint"),
        "config_fingerprint": origin.tags.get("amint.config_fingerprint"),
        "task_accuracy": accuracy,
        "calibration_images": len(model.calibration),
        "reference_images": 0 if model.reference is None else len(model.reference),
    }


def _tell_mlflow(
    place: Location, folder: Path, run_id: str, document: Mapping[str, Any], watcher: Watcher
) -> bool:
    """Add the report to the model's run; what MLflow does not take is said."""
    audit, settings = place.path.rsplit("/", 2)[1:]
    artifacts = f"audits/{audit[:8]}-{settings}"
    try:
        asking(open_mlflow().log_artifacts, run_id, str(folder), artifacts)
    except UserError as error:
        watcher.notice(f"{error}; the report is kept in {place.uri}")
        return False
    return True
