"""What `amint audit` may be told beside the model and the suspects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, ValidationError

from amint_ray.config.load import explain, merge_override
from amint_ray.config.schema import Cluster
from amint_ray.config.section import Section
from amint_ray.contracts import UserError

Probability = Annotated[float, Field(gt=0, lt=1)]


class AuditSettings(Section):
    """How suspects are put to a model; set as `audit.KEY=VALUE`."""

    evidence: Literal["both", "head"] = "both"
    """`head`: the MINT head's alone; then nothing behind the deepest tap is computed, and images
    that were withheld from the head are not noticed."""
    alpha: Probability = 0.01
    """Largest chance that a collection without training images is called `member`."""
    power: Probability = 0.95
    """How surely a collection of training images must have been noticed before `not_member` is a
    verdict."""
    confidence: Probability = 0.95
    """Of every interval."""
    labels: bool = True
    """Whether labels of the suspects are used: their folders' names where these are classes of the
    model, or `label_column`. The model's own prediction stands for a label that is not there."""
    image_column: str | None = None
    """Parquet: the column with the images, as files (PNG, JPEG …): of the hub's form
    `{bytes, path}`, or plain binary. By default the only one of the hub's form; a binary one has to
    be named."""
    label_column: str | None = None
    """Parquet: the column with class indices, or the hub's `ClassLabel` with names; by default none
    is read."""
    folder: str = "amint_audits"
    """Where audits are kept, each in a folder of its own; local or `s3://`."""
    record: bool = True
    """Whether the report goes to the model's MLflow run, too, where it has one."""
    thumbnails: Annotated[int, Field(ge=0, le=12)] = 12
    """Pictures in the report of the most likely, and of the least likely members."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Images in one forward pass."""
    gpus: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a GPU that each process takes, on a cluster with GPUs."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a process is started again that has died."""
    max_megapixels: Annotated[float, Field(gt=0)] = 100.0
    """A larger image is not decoded."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """That object storage may keep silent."""


class _Given(Section):
    """What can be given."""

    audit: AuditSettings = AuditSettings()
    cluster: Cluster = Cluster()


def load_audit(overrides: Sequence[str]) -> tuple[AuditSettings, Cluster]:
    """The settings, and the cluster to run on.

    Args:
        overrides: `audit.KEY=VALUE` and `cluster.KEY=VALUE`.

    Raises:
        UserError: an unknown key or a bad value.
    """
    tree = OmegaConf.create()
    for override in overrides:
        tree = merge_override(tree, override.strip())
    given: Any = OmegaConf.to_container(tree, resolve=True)
    try:
        settings = _Given.model_validate(given)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, _Given))) from error
    return settings.audit, settings.cluster
