"""What MLflow keeps of a model that is evaluated, and whether several are seeds of one recipe."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amint_ray.config.schema import Config
from amint_ray.contracts import ScoreTable, UserError, first_line
from amint_ray.evaluation.scores import read_scores
from amint_ray.launch.earlier import Earlier, fetch, run_of
from amint_ray.tracking.versions import asking

if TYPE_CHECKING:
    from mlflow import MlflowClient

PURPOSE = "evaluated"
_SCORES, _FIGURES = "scores.parquet", "figures.json"
_SEEDS = ("train.seed", "data.split_seed")
_NOT_COMPARED = ("cluster", "storage", "tracking", "name", "registered_model")
_READING = ("path", "memory_gib", "readers", "timeout_seconds", "mode", "streams")
"""Keys, the latter of `data`, in which models that are combined may differ beside the seeds."""


@dataclass(frozen=True)
class Saved:
    """What MLflow keeps of one model.

    Attributes:
        uri: as the user named it.
        earlier: its run.
        table: the scores that the run ended with.
        confounders: what the run found of its split; None: it was not asked.
    """

    uri: str
    earlier: Earlier
    table: ScoreTable
    confounders: Mapping[str, Any] | None

    @property
    def head_trained(self) -> bool:
        """Whether the MINT head says anything."""
        return self.earlier.config.loss.lambda_mint > 0


def fetch_saved(client: MlflowClient, uri: str, overrides: Sequence[str]) -> Saved:
    """What MLflow keeps of a model, without the model.

    Args:
        client: of the MLflow that has it.
        uri: of the model, or a run's id.
        overrides: what is given anew.

    Raises:
        UserError: there is no such model, or its scores are gone.
    """
    run_id = run_of(client, uri)
    earlier = fetch(client, run_id, overrides, purpose=PURPOSE)
    there = {file.path for file in asking(client.list_artifacts, run_id)}
    if _SCORES not in there:
        raise UserError(
            f"run {run_id}: its artifact {_SCORES} is missing; it cannot be {PURPOSE} without"
        )
    with tempfile.TemporaryDirectory(prefix="amint-evaluate-") as name:
        file = asking(client.download_artifacts, run_id, _SCORES, name)
        try:
            table = read_scores(Path(file))
        except Exception as error:  # Arrow's, for whatever a damaged file leads to
            reason = first_line(error).replace(file, _SCORES)
            raise UserError(f"run {run_id}: {_SCORES} cannot be read: {reason}") from error
        confounders = None
        if _FIGURES in there:
            figures = asking(client.download_artifacts, run_id, _FIGURES, name)
            try:
                confounders = json.loads(Path(figures).read_text())["confounders"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"run {run_id}: {_FIGURES} is none that amint_ray wrote: {first_line(error)}"
                ) from error
    return Saved(uri, earlier, table, confounders)


def check_alike(found: Sequence[Saved]) -> None:
    """Whether several models are several seeds of one recipe on one pool of images.

    Raises:
        UserError: they are not.
    """
    first = found[0]
    seeds: dict[tuple[int, int], str] = {}
    for each in found:
        config = each.earlier.config
        pair = (config.train.seed, config.data.split_seed)
        if pair in seeds:
            raise UserError(
                f"{each.uri}: has the seeds of {seeds[pair]} (train.seed = {pair[0]}, "
                f"data.split_seed = {pair[1]}); give each training once"
            )
        seeds[pair] = each.uri
        ours, theirs = _settings(first.earlier.config), _settings(config)
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        if differing:
            told = ", ".join(f"{key} = {theirs.get(key)} and {ours[key]}" for key in differing[:3])
            raise UserError(
                f"{each.uri} and {first.uri} are not of one recipe: {told}; only models that "
                "differ in nothing but train.seed and data.split_seed can be combined"
            )
        pools = [one.earlier.manifest for one in (first, each)]
        contents = [None if pool is None else set(pool.content.tolist()) for pool in pools]
        if None not in contents and contents[0] != contents[1]:
            raise UserError(
                f"{each.uri} and {first.uri} were trained on different images; only seeds of one "
                "recipe on one set of images can be combined"
            )


def _settings(config: Config) -> dict[str, Any]:
    """All that must be the same, flat."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                found |= flat(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value
        return found

    exclude: dict[str, Any] = dict.fromkeys(_NOT_COMPARED, True)
    exclude["data"] = dict.fromkeys(_READING, True)
    values = flat(config.model_dump(mode="json", exclude=exclude))
    return {key: value for key, value in values.items() if key not in _SEEDS}
