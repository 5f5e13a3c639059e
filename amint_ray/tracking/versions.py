"""Versions of a registered model: what there is, and which of them has an alias."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from amint_ray.contracts import UserError, first_line
from amint_ray.tracking.headline import FIGURES, read_figure, told
from amint_ray.tracking.run_log import check_tracking, tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
_GATE = ("task_accuracy", "member_tpr_at_fpr_1pct")
"""Figures that a version must not be below the present holder of an alias in."""
_NEEDED = (*_GATE, "confounders_clean", "manifest_fingerprint")
"""Tags without which a version cannot be compared."""
_MOST_NAMED = 20

T = TypeVar("T")


def open_mlflow() -> MlflowClient:
    """A client of the MLflow that has runs and models; makes nothing where there is none.

    Raises:
        UserError: nobody answers, or there is no database in the working directory.
    """
    uri = tracking_uri()
    check_tracking(uri)
    file = Path(uri.removeprefix("sqlite:///"))
    if urllib.parse.urlsplit(uri).scheme == "sqlite" and not file.is_file():
        raise UserError(
            f"tracking: there is no {file.name} in {file.absolute().parent}; work where the model "
            "was trained, or set MLFLOW_TRACKING_URI (sqlite:////absolute/path/mlflow.db, http://…)"
        )
    import mlflow

    mlflow.set_tracking_uri(uri)
    return asking(mlflow.MlflowClient, uri)


def asking(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What MLflow answers.

    Raises:
        UserError: it answers with an error, or not at all.
    """
    try:
        return call(*arguments, **options)
    except Exception as error:  # MLflow's own, SQLAlchemy's, the network's
        where = without_password(tracking_uri())
        raise UserError(f"tracking: MLflow at {where}: {first_line(error)}") from error


def list_versions(name: str | None) -> list[dict[str, Any]]:
    """Every version of a model, the newest first; without a name, of all models that are ours.

    A model is ours if any of its versions has a tag that begins with `amint.`.

    Returns:
        One object a version: `name`, `version` (a number), `uri`, `aliases`, `status` (READY, if
        it can be loaded), `run_id`, `registered` (ISO 8601), `recipe`, `figures` (by the names of
        `FIGURES`: `{value, low, high}`, with a `note` where there is none), `confounders_clean`
        (true, false; null: not known), `manifest_fingerprint`, `config_fingerprint`.

    Raises:
        UserError: there is no such model, or MLflow does not answer.
    """
    client = open_mlflow()
    aliases = _aliases(client)
    if name is not None and name not in aliases:
        raise UserError(_no_such_model(client, name, aliases))
    found = _versions(client, name)
    if name is None:
        ours = {version.name for version in found if _is_ours(version)}
        found = [version for version in found if version.name in ours]
    found.sort(key=lambda version: (version.name, -int(version.version)))
    return [_described(version, aliases.get(version.name, {})) for version in found]


def _is_ours(version: ModelVersion) -> bool:
    return any(tag.startswith("amint.") for tag in version.tags)


def _described(version: ModelVersion, aliases: Mapping[str, str]) -> dict[str, Any]:
    tags = version.tags
    clean = {"true": True, "false": False}.get(tags.get("amint.confounders_clean", ""))
    registered = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    return {
        "name": version.name,
        "version": int(version.version),
        "uri": f"models:/{version.name}/{version.version}",
        "aliases": sorted(a for a, of in aliases.items() if int(of) == int(version.version)),
        "status": str(version.status),
        "run_id": version.run_id,
        "registered": registered.isoformat(timespec="seconds"),
        "recipe": tags.get("amint.recipe"),
        "figures": {figure: read_figure(figure, tags) for figure in FIGURES},
        "confounders_clean": clean,
        "manifest_fingerprint": tags.get("amint.manifest_fingerprint"),
        "config_fingerprint": tags.get("amint.config_fingerprint"),
    }


def promote(
    name: str, version: str, *, alias: str = CHAMPION, other_data: bool = False
) -> dict[str, Any]:
    """Give a version an alias, if it is worth it.

    The gate: its confounder check was made and is clean; task accuracy and TPR at 1 % FPR (`member`
    against `test`) are not below those of the version that has the alias now, by value; and both
    were measured on the same images and roles. A figure that the holder does not report is not
    compared, which is noted; one that the holder alone reports fails. Of a model without its head,
    registered as NAME-plain, accuracy decides then, and without a holder the confounder check.

    MLflow has no compare-and-set: of two promotions at the same moment both pass against the old
    holder, and the later one has the alias.

    Args:
        name: of the registered model.
        version: its number.
        alias: to be moved.
        other_data: compare figures that come from other images or roles, too.

    Returns:
        `promoted` (whether the alias now stands at the version), `name`, `version`, `alias`,
        `previous` (the holder's number before, or None), `reasons` (each condition that is not
        met, in one line) and `notes`.

    Raises:
        UserError: there is no such model or version, the alias is none, or MLflow does not answer.
    """
    check_alias(alias)
    client = open_mlflow()
    aliases = _aliases(client)
    if name not in aliases:
        raise UserError(_no_such_model(client, name, aliases))
    versions = {str(int(found.version)): found for found in _versions(client, name)}
    number = version.strip().lstrip("0")
    if number not in versions:
        raise UserError(_no_such_version(name, version, versions))
    holder = aliases[name].get(alias)
    previous = None if holder is None else str(int(holder))
    document: dict[str, Any] = {
        "promoted": False,
        "name": name,
        "version": int(number),
        "alias": alias,
        "previous": None if previous is None else int(previous),
        "reasons": [],
        "notes": [],
    }
    if previous == number:
        return document | {"promoted": True, "notes": [f"version {number} is {alias} already"]}
    present = None if previous is None else versions.get(previous)  # deleted in this moment
    reasons, notes = judge(versions[number], present, other_data)
    if present is None:
        notes.append(f"no version was {alias} to compare with")
    if not reasons:
        try:
            asking(client.set_registered_model_alias, name, alias, number)
        except UserError:  # it may have been deleted in this moment
            left = {str(int(found.version)): found for found in _versions(client, name)}
            if number in left:
                raise
            raise UserError(_no_such_version(name, version, left)) from None
    return document | {"promoted": not reasons, "reasons": reasons, "notes": notes}


def judge(
    version: ModelVersion, holder: ModelVersion | None, other_data: bool
) -> tuple[list[str], list[str]]:
    """Why a version must not take a holder's place, one line a reason; and what is to be noted."""
    reasons: list[str] = []
    notes: list[str] = []
    if str(version.status) != "READY":
        reasons.append(f"version {version.version} is not ready: {version.status}")
    for one in (version, holder):
        missing = [f"amint.{key}" for key in _NEEDED if one and f"amint.{key}" not in one.tags]
        if one is not None and missing:
            which = "the holder, " if one is holder else ""
            reasons.append(
                f"{which}version {one.version} has no figures to compare: it lacks the tags "
                f"{', '.join(missing)}"
            )
    if reasons:
        return reasons, notes
    clean = version.tags["amint.confounders_clean"]
    if clean == "false":
        reasons.append(
            "confounder check: not clean: a classifier that never sees the model tells the roles "
            "apart, so no membership figure can be trusted"
        )
    elif clean != "true":
        reasons.append("confounder check: not made, or too few images for it; clean is needed")
    if holder is None:
        return reasons, notes
    ours, theirs = (one.tags["amint.manifest_fingerprint"] for one in (version, holder))
    if ours != theirs:
        text = (
            f"data: version {version.version} was measured on other images or roles than version "
            f"{holder.version} (manifest {ours[:12]}, {theirs[:12]})"
        )
        if not other_data:
            reasons.append(f"{text}; --other-data compares them all the same")
            return reasons, notes
        notes.append(f"{text}; compared all the same")
    for key in _GATE:
        label = FIGURES[key][0]
        new, old = (read_figure(key, one.tags) for one in (version, holder))
        if old["value"] is None:
            notes.append(
                f"{label}: not compared, as version {holder.version} has none ({old['note']})"
            )
        elif new["value"] is None:
            reasons.append(
                f"{label}: not reported ({new['note']}); version {holder.version} has {told(old)}"
            )
        elif new["value"] < old["value"]:
            reasons.append(f"{label}: {told(new)}, below {told(old)} of version {holder.version}")
    return reasons, notes


def mark_challenger(client: MlflowClient, name: str, version: str) -> bool:
    """Let the newest version be `challenger`; a later one that has the alias keeps it.

    Returns:
        Whether the alias now stands at this version.

    Raises:
        UserError: MLflow does not answer, or the version is gone.
    """
    holder = asking(client.get_registered_model, name).aliases.get(CHALLENGER)
    if holder is not None and int(holder) > int(version):
        return False
    asking(client.set_registered_model_alias, name, CHALLENGER, version)
    return True


def check_alias(alias: str) -> None:
    """Whether MLflow would take it.

    Raises:
        UserError: it would not.
    """
    legal = re.fullmatch(r"[A-Za-z0-9_-]{1,255}", alias)
    if not legal or alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            f"alias {alias!r}: use letters, digits, - and _ (255 at most), and neither `latest` "
            "nor a version such as v1"
        )


def _aliases(client: MlflowClient) -> dict[str, dict[str, str]]:
    """Of every registered model: the version by alias."""
    models = _all_pages(client.search_registered_models)
    return {model.name: dict(model.aliases) for model in models}


def _versions(client: MlflowClient, name: str | None) -> list[ModelVersion]:
    if name is None:
        return _all_pages(client.search_model_versions)
    quote = '"' if "'" in name else "'"
    return _all_pages(client.search_model_versions, filter_string=f"name={quote}{name}{quote}")


def _all_pages(search: Callable[..., Any], **options: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = asking(search, page_token=token, **options)
        found += page
        token = page.token
        if not token:
            return found


def _no_such_model(client: MlflowClient, name: str, known: Mapping[str, object]) -> str:
    ours = {version.name for version in _versions(client, None) if _is_ours(version)}
    names = _shortened(sorted(ours) or sorted(known))
    where = without_password(tracking_uri())
    there = f"there are {names}" if names else "no model is registered there"
    return f"there is no registered model {name!r} in {where}; {there}"


def _no_such_version(name: str, version: str, known: Mapping[str, object]) -> str:
    numbers = _shortened(sorted(known, key=int, reverse=True))
    there = f"there are {numbers}" if numbers else "it has none"
    return f"{name} has no version {version!r}; {there}"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
