"""From what the processes left to an audit's document, its report, and MLflow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from amint_ray.audit.report import REPORT, extremes, write_report
from amint_ray.audit.suspects import Settings, Suspects
from amint_ray.audit.verdict import Judgement, judge
from amint_ray.config.audit import AuditSettings
from amint_ray.contracts import Role, RunError, UserError, Watcher, first_line
from amint_ray.data.images import BadImage, decode, encode_png
from amint_ray.data.sources import Fault
from amint_ray.evaluation.metrics import Interval, auc
from amint_ray.evaluation.outputs import Outputs
from amint_ray.launch.attack_parts import read_arrays
from amint_ray.launch.audit_worker import Asked
from amint_ray.storage import Location, write_atomically
from amint_ray.tracking.folder import Confounders
from amint_ray.tracking.registered import RegisteredModel
from amint_ray.tracking.versions import asking, open_mlflow

_SHOWN = 2000
"""Images that the report's own document lists at most; images.parquet has them all."""
_THUMBNAIL_SIDE = 160


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

    Returns:
        The audit's document.

    Raises:
        UserError: there is nothing to judge by.
        RunError: a file is damaged, or storage does not answer.
    """
    watcher.phase("judging")
    suspects, unreadable = _suspects(asked, parts, trained=len(model.calibration) > 0)
    assert model.reference is not None
    split = _confounders(model, origin)
    judgement = judge(
        suspects,
        model.reference,
        model.calibration,
        judged,
        confounders_clean=split.clean,
        needs_labels=asked.needs_labels,
        lines=_lines(model, split, confidence=judged.confidence),
    )
    document = {
        **judgement.document,
        "suspects": {
            "source": asked.found.uri,
            "images": len(suspects) + unreadable,
            "unreadable": unreadable,
            "left_out": dict(asked.found.left_out),
            **judgement.document["suspects"],
        },
        "model": _model(model, origin, uri),
        "settings": _given(settings),
        "seconds": dict(seconds),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": f"amint_ray {version('amint_ray')}",
    }
    rows = _Rows(asked, parts, judgement, model.preprocessing.class_names)
    watcher.phase("writing the report")
    with TemporaryDirectory(prefix="amint-audit-") as name:
        folder = Path(name)
        shown, pictures = _shown(asked, rows, settings.thumbnails)
        page = {**document, "images": shown}
        write_report(page, folder, pictures, rows=rows.batches())
        try:
            for file in sorted(folder.iterdir()):
                with write_atomically(asked.place, file.name) as kept:
                    kept.write(file.read_bytes())
        except OSError as error:
            raise RunError(f"audit.folder: {asked.place.uri}: {first_line(error)}") from error
        recorded = False
        if settings.record and origin.run_id is not None:
            recorded = _tell_mlflow(asked.place, folder, origin.run_id, document, watcher)
    kept_at = {"report": asked.place.below(REPORT).uri, "recorded": recorded}
    return {**document, **kept_at, "images": list(rows) if every else shown}


def _given(settings: AuditSettings) -> dict[str, Any]:
    """What was set otherwise than by default and changes the result."""
    silent = {"folder", "record", "thumbnails", "batch_size", "gpus", "retries", "timeout_seconds"}
    return settings.model_dump(mode="json", exclude=silent, exclude_defaults=True)


def _suspects(asked: Asked, parts: Sequence[str], *, trained: bool) -> tuple[Suspects, int]:
    """All images that could be read, and how many could not."""
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    total = 0
    for name in parts:
        part = read_arrays(asked.place, name)
        usable = part["problem"] == ""
        total += len(usable)
        if not usable.any():
            continue
        for key, values in part.items():
            if key in ("label", "content"):
                columns.setdefault(key, []).append(values[usable])
            elif key not in ("name", "shard", "row", "problem"):
                columns.setdefault(key, []).append(values)
    if not columns:
        raise UserError(
            f"suspects: {asked.found.uri}: none of the {total:,} images can be read; the first: "
            f"{read_arrays(asked.place, parts[0])['problem'][0]}"
        )
    joined = {
        key: np.concatenate(values, axis=1 if values[0].ndim == 2 and key != "taps" else 0)
        for key, values in columns.items()
    }

    def outputs(which: str) -> Outputs | None:
        if asked.evidence == "head":
            return None
        return Outputs(*(joined[f"{which}.{name}"] for name in Outputs.__dataclass_fields__))

    scores, n = joined["mint_logit"], len(joined["label"])
    suspects = Suspects(
        content=joined["content"],
        label=joined["label"],
        prediction=joined.get("prediction", np.full(n, -1, np.int64)),
        mint_logit=scores if trained else np.full(n, np.nan),
        taps=joined["taps"],
        finite=joined["finite"],
        told=outputs("told"),
        untold=outputs("untold"),
    )
    return suspects, total - n


def _lines(model: RegisteredModel, split: Confounders, *, confidence: float) -> dict[str, Any]:
    """The four lines that go with every result: AUC of members, withheld ones, blind, and loss.

    The first two and the loss are of the reference against its calibration images.
    """
    reference = model.reference
    assert reference is not None

    def against(role: Role, score: npt.NDArray[np.float64]) -> dict[str, Any]:
        positives = score[reference.role == role.value]
        negatives = score[reference.role == Role.CALIBRATION.value]
        return auc(positives, negatives, confidence=confidence).as_dict()

    # φ of the image itself orders images as the loss does.
    loss = reference.told.label_confidence[0].astype(np.float64)
    head = reference.mint_logit
    untrained = Interval.unknown("the MINT head was not trained (loss.lambda_mint = 0)").as_dict()
    trained = len(model.calibration) > 0
    return {
        "member": against(Role.MEMBER, head) if trained else untrained,
        "withheld": against(Role.WITHHELD, head) if trained else untrained,
        "blind": split.blind.as_dict(),
        "loss": against(Role.WITHHELD, loss),
        "loss_member": against(Role.MEMBER, loss),
    }


def _confounders(model: RegisteredModel, origin: Origin) -> Confounders:
    """What the model keeps of it; models of earlier versions keep nothing, but their runs do."""
    if model.confounders is not None:
        return model.confounders
    clean = {"true": False, "false": True}.get(origin.tags.get("amint.confounded", ""))
    key = "confounders.comparisons.member_vs_test.auc"
    if key not in origin.metrics:
        blind = Interval.unknown("no blind classifier's figure is stored with the model")
    else:
        value, low, high = (origin.metrics[f"{key}{end}"] for end in ("", ".low", ".high"))
        blind = Interval(value, low, high)
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


SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "label": pa.int64(),
        "prediction": pa.int64(),
        "class_name": pa.string(),
        "head_score": pa.float64(),
        "outputs_score": pa.float64(),
        "p_head": pa.float64(),
        "p_outputs": pa.float64(),
        "p_value": pa.float64(),
        "precision": pa.float64(),
        "decision": pa.string(),
        "duplicate_of": pa.string(),
        "problem": pa.string(),
    }
)
_BATCH = 10_000
"""Rows of images.parquet that are made at a time."""


class _Rows:
    """Every suspect with its name, in the source's order; names are read from the files anew."""

    def __init__(
        self, asked: Asked, parts: Sequence[str], judgement: Judgement, class_names: Sequence[str]
    ) -> None:
        self._asked, self._parts = asked, parts
        self._found, self._class_names = judgement.images, class_names
        self._copied = set(self._found["duplicate_of"].tolist()) - {-1}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each as the document has it."""
        return (image for image, _ in self.with_places())

    def with_places(self) -> Iterator[tuple[dict[str, Any], tuple[int, int]]]:
        """Each, and the shard and row where it is."""
        names: dict[int, str] = {}  # of images that others are copies of
        row = 0
        for part in self._parts:
            read = read_arrays(self._asked.place, part)
            columns = (read[key].tolist() for key in ("name", "label", "problem", "shard", "row"))
            for name, label, problem, shard, place in zip(*columns, strict=True):
                if problem:
                    image = dict.fromkeys(SCHEMA.names)
                    image |= {"image": name, "label": _index(label), "problem": problem}
                else:
                    if row in self._copied:
                        names[row] = name
                    image = self._image(name, row, names)
                    row += 1
                yield image, (shard, place)

    def _image(self, name: str, row: int, names: Mapping[int, str]) -> dict[str, Any]:
        found = {key: values[row].item() for key, values in self._found.items()}
        figures = {
            key: found[key] if np.isfinite(found[key]) else None
            for key in SCHEMA.names
            if key in found and isinstance(found[key], float)
        }
        label, prediction = _index(found["label"]), _index(found["prediction"])
        shown = prediction if label is None else label
        return {
            "image": name,
            "label": label,
            "prediction": prediction,
            "class_name": None if shown is None else self._class_names[shown],
            **figures,
            "decision": "member" if found["flagged"] else "undecided",
            "duplicate_of": names.get(found["duplicate_of"]),
            "problem": None if figures["p_value"] is not None else self._why(label),
        }

    def _why(self, label: int | None) -> str:
        """An image that could be read has no p-value."""
        if self._asked.needs_labels and label is None:
            return "has no label, which the model's head needs"
        return "no finite answer of the model"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """For Parquet."""
        images = iter(self)
        while some := list(itertools.islice(images, _BATCH)):
            yield pa.RecordBatch.from_pylist(some, schema=SCHEMA)


def _index(value: int) -> int | None:
    return value if value >= 0 else None


def _shown(
    asked: Asked, rows: _Rows, pictures: int
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The images that the report speaks of, and small pictures of the utmost ones, by name."""
    kept: list[tuple[dict[str, Any], tuple[int, int]]] = []
    for each in rows.with_places():
        kept.append(each)
        if len(kept) >= 2 * _SHOWN:
            kept = _utmost(kept)
    if len(kept) > _SHOWN:
        kept = _utmost(kept)
    places = {image["image"]: place for image, place in kept}
    images = [image for image, _ in kept]
    most, least = extremes(images)
    chosen = [*most[:pictures], *least[:pictures]]
    found = {}
    for image in chosen:
        shard, row = places[image["image"]]
        try:
            (raw,) = asked.found.source.read(shard, [row])
            if isinstance(raw, Fault):
                continue
            rgb = decode(raw, max_megapixels=asked.data.max_megapixels)
        except (BadImage, OSError):  # it was there when it was looked at
            continue
        rgb.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        found[image["image"]] = encode_png(rgb)
    return images, found


def _utmost(
    images: Sequence[tuple[dict[str, Any], tuple[int, int]]],
) -> list[tuple[dict[str, Any], tuple[int, int]]]:
    """The most and the least likely members, and some of those that cannot be judged."""
    silent = [each for each in images if each[0]["p_value"] is None]

    def order(each: tuple[dict[str, Any], tuple[int, int]]) -> tuple[float, ...]:
        scores = (each[0]["head_score"], each[0]["outputs_score"])
        return (each[0]["p_value"], *(-score for score in scores if score is not None))

    ordered = sorted(
        (i for i in images if i[0]["p_value"] is not None and i[0]["duplicate_of"] is None),
        key=order,
    )
    half = _SHOWN // 2 - _SHOWN // 20
    return [*ordered[:half], *ordered[half:][-half:], *silent[: _SHOWN // 10]]


def _tell_mlflow(
    place: Location, folder: Path, run_id: str, document: Mapping[str, Any], watcher: Watcher
) -> bool:
    """Add the report to the model's run; what MLflow does not take is said."""
    artifacts = f"audits/{place.path.rsplit('/', 1)[-1][:12]}"
    try:
        asking(open_mlflow().log_artifacts, run_id, str(folder), artifacts)
    except UserError as error:
        watcher.notice(f"{error}; the report is kept in {place.uri}")
        return False
    return True
