"""MLflow's registry: a model's folder goes there once, and comes back by its URI."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amint_ray.contracts import UserError, first_line
from amint_ray.tracking.folder import MLMODEL, digest, verify
from amint_ray.tracking.run_log import tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

    from amint_ray.tracking.registered import RegisteredModel

DIGEST = "amint.sha256"
"""Tag of a model and of its versions: the folder's `digest`."""
_CALL = "amint.registration"
"""Tag of a version: which call made it."""
_LOGGED = "model"
"""The logged model's name, as in `runs:/RUN_ID/model`."""
_LISTED = 20
"""Names that a message tells at most."""
_FORMS = "models:/NAME/VERSION, models:/NAME@ALIAS, runs:/RUN_ID/model or a folder"


def check_name(name: str) -> None:
    """See that MLflow takes a registered model's name.

    Raises:
        UserError: it does not.
    """
    if not name.strip() or re.search(r"[/:%'\"]", name) or name in (".", ".."):
        raise UserError(
            f"{name!r} cannot be a registered model's name: MLflow takes none that is empty or has "
            "one of / : % ' \" in it"
        )


def register(
    folder: Path, name: str, *, run_id: str, tags: Mapping[str, str], description: str
) -> str:
    """Send a model's folder to MLflow and register it as the next version of `name`.

    Called again for the same run and name, after a failure at any point or none, it goes on where
    it was: it makes no second version, and of the same folder no second copy.

    Args:
        folder: that `folder.write_folder` wrote; its `MLmodel` is told the id that MLflow gives.
        name: of the registered model.
        run_id: of the MLflow run that trained it.
        tags: of the version.
        description: of the version, Markdown.

    Returns:
        The version's number.

    Raises:
        UserError: MLflow takes no such name, or the folder is not as it was written.
        Exception: MLflow's, the network's or the disk's, after which it can be called again.
    """
    from mlflow import MlflowClient

    check_name(name)
    client = MlflowClient()
    version = _version_of_run(client, name, run_id)
    if version is None:
        verify(folder, where=str(folder))
        call = uuid.uuid4().hex
        model_id = _send(client, folder, run_id)
        _make_name(client, name)
        client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            tags={**tags, DIGEST: digest(folder), _CALL: call},
            description=description,
        )
        # Where an answer is lost, MLflow's client asks again and there are two: the first counts.
        made = _versions_of_run(client, name, run_id)
        for surplus in [each for each in made if each.tags.get(_CALL) == call][1:]:
            client.delete_model_version(name, str(surplus.version))
        version = _version_of_run(client, name, run_id)
        assert version is not None
    number = str(version.version)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, number, key, value)
    if version.description != description:
        client.update_model_version(name, number, description)
    return number


def _version_of_run(client: MlflowClient, name: str, run_id: str) -> ModelVersion | None:
    """The first version that a run made, if it made one; somebody may have made more of it."""
    return next(iter(_versions_of_run(client, name, run_id)), None)


def _versions_of_run(client: MlflowClient, name: str, run_id: str) -> list[ModelVersion]:
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return sorted(found, key=lambda version: int(version.version))


def _make_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):  # it is there; if not, the next call says why
        client.create_registered_model(name)


def _send(client: MlflowClient, folder: Path, run_id: str) -> str:
    """Have MLflow keep a folder as a model of a run; its id.

    One that was sent before is used again; one that was half sent is completed.
    """
    from mlflow.entities import LoggedModelStatus

    run = client.get_run(run_id)
    mark = digest(folder)
    found = _sent(client, run.info.experiment_id, run_id)
    same = [model for model in found if model.tags[DIGEST] == mark]
    whole = [model for model in same if model.status == LoggedModelStatus.READY]
    if whole:
        return str(whole[0].model_id)
    if not same:
        client.create_logged_model(
            run.info.experiment_id,
            name=_LOGGED,
            source_run_id=run_id,
            tags={DIGEST: mark},
            params=run.data.params,
        )
        found = _sent(client, run.info.experiment_id, run_id)  # two, if an answer was lost
        same = [model for model in found if model.tags[DIGEST] == mark]
    model = same[0]
    for other in found:
        if other.status != LoggedModelStatus.READY and other.model_id != model.model_id:
            client.delete_logged_model(other.model_id)
    _tell_id(folder, model, run_id)
    client.log_model_artifacts(model.model_id, str(folder))
    _link(client, run_id, model.model_id)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def _link(client: MlflowClient, run_id: str, model_id: str) -> None:
    """Have the run's page name its model. MLflow refuses what it has been told already."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    def linked() -> bool:
        outputs = client.get_run(run_id).outputs
        return outputs is not None and model_id in [one.model_id for one in outputs.model_outputs]

    if not linked():
        try:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        except MlflowException:
            if not linked():
                raise


def _sent(client: MlflowClient, experiment_id: str, run_id: str) -> list[LoggedModel]:
    """Our models of a run, whole or not, the oldest first."""
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    return sorted(
        (model for model in found if DIGEST in model.tags),
        key=lambda model: (model.creation_timestamp, model.model_id),
    )


def _tell_id(folder: Path, model: LoggedModel, run_id: str) -> None:
    """Write into a folder's `MLmodel` what MLflow calls the model; the file is always whole."""
    described: dict[str, Any] = yaml.safe_load((folder / MLMODEL).read_text(encoding="utf-8"))
    described |= {
        "artifact_path": model.artifact_location,
        "model_id": model.model_id,
        "model_uuid": model.model_id,
        "run_id": run_id,
    }
    draft = folder.with_name(f".{folder.name}.{MLMODEL}")
    draft.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    draft.replace(folder / MLMODEL)


def load(uri: str) -> RegisteredModel:
    """Load a model that `amint train` registered; no code and no pickle of it is read.

    Args:
        uri: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `runs:/RUN_ID/model`, or a local folder.

    Raises:
        UserError: there is no such model, or its files are not those that were registered.
    """
    if not isinstance(uri, str) or not uri:
        raise UserError(f"{uri!r} is neither a model's URI nor a folder; give {_FORMS}")
    if Path(uri).is_dir():
        return _read(Path(uri), uri, None)
    if re.match(r"(models|runs|mlflow-artifacts|s3|gs|file):/", uri) is None:
        raise UserError(f"{uri}: neither a model's URI nor a folder; give {_FORMS}")
    import mlflow

    needed = uri.startswith(("models:", "runs:"))
    if needed and not os.environ.get("MLFLOW_TRACKING_URI") and not mlflow.is_tracking_uri_set():
        if not Path("mlflow.db").is_file():
            raise UserError(
                f"{uri}: there is no mlflow.db in {Path.cwd()}; work where the model was trained, "
                "or set MLFLOW_TRACKING_URI (sqlite:////absolute/path/mlflow.db, http://…)"
            )
        mlflow.set_tracking_uri(tracking_uri())
    with tempfile.TemporaryDirectory(prefix="amint-model-") as own:
        try:
            exact, expected = _found(mlflow.MlflowClient(), uri)
            folder = mlflow.artifacts.download_artifacts(artifact_uri=exact, dst_path=own)
        except UserError:
            raise
        except Exception as error:  # MLflow's, the network's, a URI that is none
            where = f" from {without_password(mlflow.get_tracking_uri())}" if needed else ""
            raise UserError(f"{uri}: cannot be loaded{where}: {first_line(error)}") from error
        return _read(Path(folder), uri, expected)


def run_of_model(client: MlflowClient, uri: str) -> str:
    """Id of the MLflow run that trained a registered model.

    Args:
        client: of the MLflow that has it.
        uri: `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/RUN_ID/model`.

    Raises:
        UserError: there is no such model, or it has no run.
    """
    if of_run := re.fullmatch(rf"runs:/([0-9a-f]{{32}})(/{_LOGGED})?", uri):
        return of_run[1]
    if not uri.startswith("models:/"):
        raise UserError(
            f"{uri.strip() or 'an empty name'}: not a model of MLflow's, which has a run and its "
            "roles; give models:/NAME/VERSION, models:/NAME@ALIAS, runs:/RUN_ID/model or the id of "
            "a run"
        )
    try:
        exact, _ = _found(client, uri)
        name = exact.removeprefix("models:/")
        if "/" not in name:
            return str(client.get_logged_model(name).source_run_id)
        run_id = client.get_model_version(*name.split("/")).run_id
    except UserError:
        raise
    except Exception as error:  # MLflow's, the network's
        raise UserError(f"{uri}: cannot be found: {first_line(error)}") from error
    if not run_id:
        raise UserError(f"{uri}: was registered without a run; its roles are not known")
    return str(run_id)


def _read(folder: Path, uri: str, expected: str | None) -> RegisteredModel:
    from amint_ray.tracking.registered import read_model  # torch and timm take seconds

    return read_model(folder, where=uri, expected=expected)


def _found(client: MlflowClient, uri: str) -> tuple[str, str | None]:
    """What to fetch (an alias may move meanwhile), and the digest that the registry knows of it."""
    if of_run := re.fullmatch(rf"runs:/([0-9a-f]{{32}})/{_LOGGED}", uri):
        run = client.get_run(of_run[1])
        whole = [m for m in _sent(client, run.info.experiment_id, of_run[1]) if m.status == "READY"]
        if whole:
            return f"models:/{whole[-1].model_id}", whole[-1].tags[DIGEST]
    if not uri.startswith("models:/"):
        return uri, None
    if re.fullmatch(r"models:/m-[0-9a-f]{32}", uri):
        return uri, client.get_logged_model(uri.removeprefix("models:/")).tags.get(DIGEST)
    asked = re.fullmatch(r"models:/([^/@]+)(?:/([^/@]+)|@([^/@]+))", uri)
    if asked is None:
        raise UserError(f"{uri}: no URI of a model, whose name has no slash; give {_FORMS}")
    name, number, alias = asked.groups()
    version = (
        _by_alias(client, uri, name, alias) if alias else _by_number(client, uri, name, number)
    )
    return f"models:/{name}/{version.version}", version.tags.get(DIGEST)


def _by_alias(client: MlflowClient, uri: str, name: str, alias: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    aliases = _registered(client, uri, name).aliases
    if alias not in aliases:
        raise UserError(f"{uri}: {name} has no alias {alias!r}; it has {_listed(aliases)}")
    try:
        return client.get_model_version(name, aliases[alias])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"{uri}: the alias names version {aliases[alias]}, which was deleted"
        ) from error


def _by_number(client: MlflowClient, uri: str, name: str, number: str) -> ModelVersion:
    _registered(client, uri, name)
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    if number == "latest" and versions:
        return versions[max(versions, key=int)]
    if number not in versions:
        there = sorted(versions, key=int, reverse=True)
        raise UserError(f"{uri}: {name} has no version {number}; it has {_listed(there)}")
    return versions[number]


def _registered(client: MlflowClient, uri: str, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    check_name(name)
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in client.search_registered_models(max_results=_LISTED + 1)]
        raise UserError(
            f"{uri}: no model is registered as {name!r}; registered are {_listed(names)}"
        ) from error


def _listed(names: Any) -> str:
    shown = list(names)
    more = ", …" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more if shown else "none"
