"""From what the model says of suspects to the verdict: read `judge` first.

NumPy and SciPy only. No suspect's membership is ever read: there is nothing here that could.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.audit.collection import images_for_power, share_error, share_of, telling
from amint_ray.audit.decisions import combined, precision, precision_at_threshold
from amint_ray.audit.evidence import Evidence, Within, head_evidence, output_evidence
from amint_ray.audit.likeness import LIMIT, Composition, Likeness, composition
from amint_ray.audit.output_scores import FEWEST_KNOWN
from amint_ray.audit.suspects import Mask, Settings
from amint_ray.audit.words import BY_NAME, CANNOT_SHOW, INSTEAD, KEY_NEEDED, SHOWS, reason
from amint_ray.audit.yardstick import Measured, Yardstick
from amint_ray.contracts import Role, UserError
from amint_ray.evaluation.calibration import benjamini_hochberg
from amint_ray.evaluation.metrics import Interval
from amint_ray.evaluation.outputs import Scores
from amint_ray.evaluation.reference import Reference

EXIT_CODES = {"not_member": 0, "member": 3, "no_verdict": 4}
"""Of the command; 1 and 2 are failures."""

_TRAINED = (Role.MEMBER, Role.WITHHELD)
_OF = {"head": (Role.MEMBER,), "outputs": (Role.MEMBER, Role.WITHHELD)}
_OF_WORDS = {"head": "members told to the head", "outputs": "training images, told or withheld"}
_POWER_OF = {"head": Role.MEMBER, "outputs": Role.WITHHELD}


@dataclass(frozen=True)
class Judgement:
    """What an audit found.

    Attributes:
        document: every part of the audit's document that follows from arrays alone.
        images: by name (n,) arrays, a row a suspect: `label`, `prediction` (−1: none),
            `head_score`, `outputs_score`, `p_head`, `p_outputs`, `p_value`, `precision` (NaN:
            none), `flagged`, `duplicate_of` (a row; −1: none); of an audit by key `key_matches`
            (−1: none) and `p_key`.
    """

    document: dict[str, Any]
    images: dict[str, npt.NDArray[Any]]


def judge(
    suspects: Measured,
    yardstick: Yardstick,
    calibration: Scores,
    settings: Settings,
    *,
    confounders_clean: bool | None,
    from_mlflow: bool = False,
    needs_labels: bool = False,
    codes_alone: bool = False,
    lines: Mapping[str, Any] | None = None,
) -> Judgement:
    """The verdict on a collection and on each image of it.

    Args:
        suspects: n images.
        yardstick: what they were measured by.
        calibration: MINT logits of all calibration images; none where the head was not trained.
        settings: how sure to be.
        confounders_clean: whether a classifier that never saw the model failed on the same split;
            None: not known.
        from_mlflow: whether MLflow was asked for the model, and so for what its run keeps.
        needs_labels: whether the head says nothing of images without labels.
        codes_alone: whether the head says secret codes and nothing else; then it has no scores.
        lines: figures of the model that the document shows as they are.

    Raises:
        UserError: there is neither a trained head nor an output to judge by.
    """
    reference = yardstick.reference
    originals = suspects.duplicate_of()
    unique = (originals < 0) & suspects.finite
    within, classes = _classes(suspects, unique, reference)
    found, missing = _evidence(
        suspects, unique, yardstick, calibration, settings, within, codes_alone=codes_alone
    )
    alike = yardstick.surroundings.compare(
        suspects.distance[unique], confidence=settings.confidence
    )
    every_p, known_p = [e.p for e in found], [e.known_p for e in found]
    p = combined(every_p)
    flagged = benjamini_hochberg(np.where(originals < 0, p, np.nan), settings.fdr)
    flagged = np.where(originals < 0, flagged, flagged[originals])
    p_values = [e.p_value for e in found if e.p_value is not None]
    p_value = min(1.0, len(found) * min(p_values)) if p_values else None
    powers = {
        e.name: {role: _power(e, role, settings, len(found)) for role in _TRAINED} for e in found
    }
    needed = {
        role.value: min(
            (size for e in powers.values() if (size := e[role]) is not None), default=None
        )
        for role in _TRAINED
    }
    # A model of which no image was withheld from its head has told it all there is to notice.
    withheld = (reference.role == Role.WITHHELD.value).any()
    role = Role.WITHHELD if withheld else Role.MEMBER
    compared = max(e.compared for e in found)
    sizes = [(powers[e.name][role], e.compared) for e in found]
    powered = any(size is not None and images >= size for size, images in sizes)
    silent = int((unique & (suspects.label < 0)).sum()) if needs_labels else 0
    reasons = _reasons(
        compared,
        p_value,
        needed[role.value],
        alike,
        confounders_clean,
        settings,
        powered=powered,
        silent=silent,
        within=within.collection,
        instead=_instead(found, settings),
    )
    if reasons or p_value is None:
        verdict = "no_verdict"
    else:
        verdict = "member" if p_value <= settings.alpha else "not_member"
    reservations = []
    if confounders_clean is None:
        reservations.append(reason("confounders_unknown", instead="" if from_mlflow else BY_NAME))
    if silent and compared:
        reservations.append(reason("labels_needed", silent=silent))
    called = int((flagged & unique).sum())
    if verdict == "not_member" and called:
        reservations.append(reason("flagged", flagged=called, fdr=settings.fdr))
    strange = Interval.unknown("the suspects are unlike the calibration images")
    shares = {e.name: strange if alike.unlike else _share(e, settings) for e in found}
    document = {
        "verdict": verdict,
        "p_value": p_value,
        **{name: getattr(settings, name) for name in ("alpha", "fdr", "prior", "confidence")},
        "reasons": reasons,
        "reservations": reservations,
        "share": _best_share(found, shares),
        "suspects": {
            "unique": int(unique.sum()),
            "not_finite": int((~suspects.finite).sum()),
            "labelled": int((suspects.label >= 0).sum()),
            "flagged": called,
        },
        "evidence": {
            name: missing[name]
            if name in missing
            else _part(next(e for e in found if e.name == name), shares[name], powers[name])
            for name in ("head", "outputs")
        },
        "power": {"target": settings.power, "of": role.value, **needed},
        "unlike": {
            "effect": alike.effect.as_dict(),
            "limit": LIMIT,
            "p_value": alike.p_value,
            "unlike": alike.unlike,
        },
        "classes": {
            "distance": classes.distance if classes else None,
            "p_value": classes.p_value if classes else None,
            "collection_within": within.collection,
            "images_within": within.image,
        },
        "lines": dict(lines or {}),
        "precision": {
            "prior": settings.prior,
            "at_threshold": precision_at_threshold(
                every_p,
                known_p,
                flagged,
                calibration=min(e.fewest for e in found),
                settings=settings,
            ).as_dict(),
        },
    }
    by_name = {e.name: e for e in found}
    nothing = np.full(len(suspects), np.nan)
    images: dict[str, npt.NDArray[Any]] = {
        "label": suspects.label,
        "prediction": suspects.prediction,
        "head_score": by_name["head"].score if "head" in by_name else nothing,
        "outputs_score": by_name["outputs"].score if "outputs" in by_name else nothing,
        "p_head": by_name["head"].p if "head" in by_name else nothing,
        "p_outputs": by_name["outputs"].p if "outputs" in by_name else nothing,
        "p_value": p,
        "p_key": nothing,
        "key_matches": np.full(len(suspects), -1),
        "precision": precision(every_p, known_p, prior=settings.prior),
        "flagged": flagged,
        "duplicate_of": originals,
    }
    return Judgement(document, images)


def _classes(
    suspects: Measured, unique: Mask, reference: Reference
) -> tuple[Within, Composition | None]:
    """Classes of suspects and reference, both by label or both by prediction, and how they differ.

    A head that was asked alone predicts no class; then only labels can tell.
    """
    if (suspects.label >= 0).all():
        ours, theirs = suspects.label, reference.label
    elif (suspects.prediction >= 0).all():
        ours, theirs = suspects.prediction, reference.prediction
    else:
        ours, theirs = np.zeros_like(suspects.label), np.zeros_like(reference.label)
        return Within(ours, theirs, collection=False, image=False), None
    found = composition(ours[unique], theirs[reference.role == Role.CALIBRATION.value])
    return Within(ours, theirs, collection=found.differs, image=found.far), found


def _evidence(
    suspects: Measured,
    unique: Mask,
    yardstick: Yardstick,
    calibration: Scores,
    settings: Settings,
    within: Within,
    *,
    codes_alone: bool,
) -> tuple[list[Evidence], dict[str, dict[str, Any]]]:
    """What there is to judge by, and by name why something is not there."""
    reference = yardstick.reference
    found, missing = [], {}
    if codes_alone:
        missing["head"] = KEY_NEEDED
    elif len(calibration) == 0:
        missing["head"] = "the MINT head was not trained (loss.lambda_mint = 0)"
    else:
        found.append(
            head_evidence(
                suspects,
                unique,
                reference,
                calibration,
                within=within,
                confidence=settings.confidence,
            )
        )
    if settings.evidence == "head" or suspects.outputs is None:
        missing["outputs"] = "only the head was asked for"
    elif not (reference.role == Role.CALIBRATION.value).any():
        missing["outputs"] = "the model was registered without outputs of calibration images"
    else:
        found.append(
            output_evidence(
                suspects, unique, yardstick, within=within, confidence=settings.confidence
            )
        )
    if not found:
        raise UserError(f"nothing to judge by: {missing['head']}, and {missing['outputs']}")
    unavailable = {
        name: {
            "available": False,
            "why_not": why,
            "shows": SHOWS[name],
            "cannot_show": CANNOT_SHOW[name],
        }
        for name, why in missing.items()
    }
    return found, unavailable


def _power(evidence: Evidence, role: Role, settings: Settings, kinds: int) -> int | None:
    known = evidence.shares(role)
    # Images with labels and without are tested apart: neither test has all of them.
    if len(known) < FEWEST_KNOWN or evidence.labels == "mixed":
        return None
    return images_for_power(
        known,
        calibration=evidence.calibration,
        alpha=settings.alpha / kinds,
        target=settings.power,
    )


def _share(evidence: Evidence, settings: Settings) -> Interval:
    found = share_of(
        evidence.mean_share,
        evidence.shares(*_OF[evidence.name]),
        suspects=evidence.compared,
        calibration=evidence.calibration,
        confidence=settings.confidence,
    )
    return telling(found)


def _best_share(found: Sequence[Evidence], shares: Mapping[str, Interval]) -> dict[str, Any]:
    """By whichever kind the reference says to be more precise; what the suspects say is no matter.

    Precision is that of a collection of which one half are training images.
    """
    known = [e for e in found if shares[e.name].value is not None]
    if not known:
        note = "; ".join(f"{name}: {share.note}" for name, share in shares.items())
        return {**Interval.unknown(note).as_dict(), "of": None, "by": None}

    def error(e: Evidence) -> float:
        return share_error(
            0.5, e.shares(*_OF[e.name]), suspects=e.compared, calibration=e.calibration
        )

    best = min(known, key=error)
    return {**shares[best.name].as_dict(), "of": _OF_WORDS[best.name], "by": best.name}


def _part(evidence: Evidence, share: Interval, powers: Mapping[Role, int | None]) -> dict[str, Any]:
    role = _POWER_OF[evidence.name]
    return {
        "available": True,
        "why_not": None,
        "method": evidence.method,
        "labels": evidence.labels,
        "p_value": evidence.p_value,
        "images": evidence.compared,
        "auc": {name: area.as_dict() for name, area in evidence.auc.items()},
        "share": {**share.as_dict(), "of": _OF_WORDS[evidence.name]},
        "power": {
            "images_for_power": powers[role],
            "of": role.value,
        },
        "calibration_images": evidence.fewest,
        "shows": SHOWS[evidence.name],
        "cannot_show": CANNOT_SHOW[evidence.name],
    }


def _reasons(
    compared: int,
    p_value: float | None,
    needed: int | None,
    alike: Likeness,
    confounders_clean: bool | None,
    settings: Settings,
    *,
    powered: bool,
    silent: int,
    within: bool,
    instead: str,
) -> list[dict[str, str]]:
    """Why there is no verdict; none where there is one."""
    found = []
    if confounders_clean is False:
        found.append(reason("confounded"))
    if compared == 0 or p_value is None:
        nothing = reason("labels_needed", silent=silent) if silent else reason("no_images")
        return [*found, nothing]
    if alike.unlike is None:
        found.append(reason("likeness_unknown"))
    elif alike.unlike:
        found.append(reason("unlike", effect=alike.effect.value, limit=LIMIT))
    if p_value > settings.alpha and not powered:
        power = {"needed": needed, "power": settings.power}
        found.append(
            reason("underpowered", instead=instead, compared=compared, within=within, **power)
        )
    return found


def _instead(found: Sequence[Evidence], settings: Settings) -> str:
    """What was not asked of the model and might have been noticed."""
    if settings.evidence == "head":
        return INSTEAD["head"]
    labels = [e.labels for e in found if e.labels is not None]
    return INSTEAD[labels[0]] if labels else ""
