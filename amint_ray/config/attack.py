"""What `amint attack` may be told beside where a run's images and storage are now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, ValidationError

from amint_ray.config.load import explain, merge_override
from amint_ray.config.section import Section
from amint_ray.contracts import UserError

_SECTION = "attack"


class AttackSettings(Section):
    """How an audited model is attacked; set as `attack.KEY=VALUE`."""

    shadows: Annotated[int, Field(ge=0, le=100_000)] = 16
    """Shadow models of each kind. 0: only the methods that need none; one alone tells nothing."""
    shadow_loss: Literal["same", "plain"] = "same"
    """What the shadow models are trained by: the run's own joint loss, or λ₂ = 0."""
    compare_plain: bool = True
    """Whether the same recipe with λ₂ = 0 is trained and attacked, too, with as many shadow models
    of its own kind: does aMINT make the model leak more to an outsider?"""
    snapshots: bool = False
    """Whether the trained output attack also reads the run's earlier checkpoints, as far as
    `storage.keep` left them."""
    edits: bool = True
    """Whether suspects are also shown re-encoded, resized, shifted and mirrored."""
    known: Annotated[int, Field(ge=10)] = 300
    """Members that the trained output attack may learn from, half of them at most; they are not
    measured on."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Draws which images each shadow model trains on, and its weights."""
    gpus: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of a GPU that each training takes, on a cluster with GPUs."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a training is begun again whose process or node has died."""


def load_attack(overrides: Sequence[str]) -> tuple[AttackSettings, list[str]]:
    """The settings, and those overrides that are meant for the run's configuration.

    Raises:
        UserError: an unknown key or a bad value.
    """
    tree = OmegaConf.create()
    rest = []
    for override in overrides:
        if override.partition("=")[0].strip().partition(".")[0] == _SECTION:
            tree = merge_override(tree, override.strip())
        else:
            rest.append(override)
    given: Any = OmegaConf.to_container(tree, resolve=True)
    try:
        settings = AttackSettings.model_validate(given.get(_SECTION, {}))
    except ValidationError as error:
        raise UserError(
            "\n".join(f"attack: {line}" for line in explain(error, AttackSettings))
        ) from (error)
    if settings.shadows == 1:
        raise UserError(
            "attack: shadows = 1: models that trained on an image are compared with models that "
            "did not; give 2 or more, or 0 for the methods that need none"
        )
    return settings, rest
