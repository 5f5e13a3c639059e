"""A trained model that is looked at: attacked, or evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import Watcher
from amint_ray.launch.earlier import Earlier, fetch, run_of
from amint_ray.model.joint import Architecture
from amint_ray.tracking.registered import RegisteredModel
from amint_ray.tracking.registry import load
from amint_ray.tracking.versions import open_mlflow


@dataclass(frozen=True)
class Target:
    """The model that is looked at.

    Attributes:
        uri: as the user named it.
        earlier: what MLflow keeps of the run that trained it.
        model: itself.
        digest: hash of its weights.
    """

    uri: str
    earlier: Earlier
    model: RegisteredModel
    digest: str

    @property
    def parts(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """What a process needs to build the model again; the weights on the CPU."""
        model = self.model.model
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        return model.architecture, weights


def find_target(uri: str, overrides: Sequence[str], watcher: Watcher, *, purpose: str) -> Target:
    """The model, and the run that trained it.

    Args:
        uri: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or a run's id.
        overrides: where data, storage and cluster are now.
        watcher: is told that this takes time.
        purpose: what is to be done with the run, as a participle.

    Raises:
        UserError: there is no such model or run, or not enough is left of it.
    """
    watcher.phase(f"fetching {uri}")
    client = open_mlflow()
    return load_target(uri, fetch(client, run_of(client, uri), overrides, purpose=purpose))


def load_target(uri: str, earlier: Earlier) -> Target:
    """The model of a run that was found already.

    Raises:
        UserError: it is gone, or damaged.
    """
    model = load(f"runs:/{uri}/model" if uri == earlier.run_id else uri)
    return Target(uri, earlier, model, model.fingerprint()[:16])


def one_worker(config: Config) -> Config:
    """The run's configuration for trainings of one worker each."""
    cluster = config.cluster.model_copy(update={"workers": 1})
    return config.model_copy(update={"cluster": cluster})
