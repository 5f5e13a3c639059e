"""The configuration: typed, frozen, strict. The text under a field is its documentation.

`docs/config.md` is generated from here by `python -m amint_ray.config.reference`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

RESERVED_OPTIONS = {
    *("num_classes", "in_chans", "pretrained", "features_only", "scriptable", "exportable"),
    *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "no_jit"),
}
"""What `model.options` must not hold: what amint_ray sets itself, what would read or fetch a file
(a registered model must not depend on one), and what makes something else than a classifier."""


class Section(BaseModel):
    """What all sections have in common: unknown keys and lax types are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


Share = Annotated[float, Field(ge=0, le=1)]
# YAML has lists only; a tuple cannot be changed behind the frozen config's back.
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Shares(Section):
    """Which share of the pool each role gets; the five must add up to 1."""

    member: Share = 0.36
    """Trains the task, and the MINT head as 1."""
    withheld: Share = 0.04
    """Trains the task; never shown to the MINT head."""
    external: Share = 0.40
    """Trains the MINT head as 0; never the task."""
    calibration: Share = 0.10
    """Thresholds and conformal p-values; trains nothing."""
    test: Share = 0.10
    """Every reported false-positive rate; trains nothing. An official test split is added to it."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Shares:
        total = math.fsum(self.model_dump().values())
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the five shares add up to {total:.6g}, not to 1")
        if self.member == 0:
            raise ValueError("the member share is 0: nothing could be asked about")
        return self


class Data(Section):
    """Where the images come from and who gets which role."""

    source: Literal["digits", "parquet"] = "digits"
    """`digits`: scikit-learn's bundled 8×8 digits. `parquet`: a folder or file in the Hugging Face
    hub's layout (an image column of `{bytes, path}`, a label column)."""
    path: str | None = None
    """Folder or file of a `parquet` source. Files named `test…` or `validation…`, or in a
    folder of that name, are the official test split: all of it gets the role `test`. A test file
    without labels (all −1) is left out."""
    image_column: str | None = None
    """Image column of a `parquet` source; by default the only column that holds images."""
    label_column: str = "label"
    """Label column of a `parquet` source."""
    image_size: Annotated[int, Field(ge=4, le=4096)] = 32
    """Height and width in pixels that the backbone sees. Other sizes are resized when decoded
    (shorter side to this, then the centre)."""
    channels: Literal[1, 3] = 3
    """1: gray, 3: RGB. Images of the other kind are converted."""
    mean: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Subtracted from every pixel after scaling to [0, 1]."""
    std: Annotated[float, Field(gt=0)] = 0.5
    """Every pixel is divided by this afterwards."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first so many images of each official split; all of them by default."""
    memory_gib: Annotated[float, Field(gt=0)] = 8.0
    """Decoded images are held in memory as bytes; a set that needs more than this is refused. While
    they are handed to Ray, twice as much is taken for a moment."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Keys the hash that gives each image its role. No secret: it only makes another split."""
    shares: Shares = Shares()
    """How much of the pool each role gets."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> Data:
        if self.source == "parquet" and self.path is None:
            raise ValueError("source 'parquet' needs data.path=FOLDER with Parquet files")
        if self.source == "digits" and self.path is not None:
            raise ValueError("source 'digits' is bundled and takes no data.path")
        return self


class Model(Section):
    """The audited classifier's backbone."""

    backbone: Annotated[str, Field(min_length=1)] = "resnet18"
    """Any classifier that `timm.list_models()` names."""
    pretrained: bool = False
    """Start from timm's published weights (needs a network or a filled cache). Mind that the
    weights' own training set then belongs to what the model has seen."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed on to `timm.create_model`, for instance `{img_size: 28, patch_size: 4}`. The number
    of classes and of input channels comes from the data."""

    @field_validator("options")
    @classmethod
    def _no_reserved(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key in RESERVED_OPTIONS & options.keys():
            raise ValueError(f"{key!r} is not a user's to set; leave it out")
        return options


class Mint(Section):
    """The membership-inference (MINT) head and where it reads."""

    taps: Annotated[Names, Field(min_length=1)] = ("layer2", "layer3")
    """Names of the backbone's modules whose outputs the head reads, shallowest first. The paper
    found two better than one on a CNN."""
    head: Literal["conv", "tokens"] = "conv"
    """`conv`: the paper's for feature maps. `tokens`: the paper's for ViTs."""
    channels: Annotated[int, Field(ge=1, le=4096)] = 64
    """Filters of each branch's convolutions (`conv`)."""
    hidden: Annotated[int, Field(ge=1, le=65536)] = 128
    """Width of the fully connected layer behind the joined branches (`conv`)."""

    @field_validator("taps")
    @classmethod
    def _distinct(cls, taps: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(taps)) < len(taps):
            raise ValueError("the same tap is named twice")
        return taps


class Loss(Section):
    """L = λ₁·L_task/‖L_task‖ + λ₂·L_MINT/‖L_MINT‖, as in the paper."""

    lambda_task: Annotated[float, Field(gt=0)] = 1.0
    """λ₁."""
    lambda_mint: Annotated[float, Field(ge=0)] = 1.0
    """λ₂. At 0 the model is trained plainly: no external image is loaded, no loss is rescaled."""
    weighting: Literal["initial", "ema", "none"] = "initial"
    """What ‖·‖ is. `initial`: the loss's value in the first batch (the authors' notebooks). `ema`:
    its running mean. `none`: 1."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """How much of the running mean stays at each step (`ema`)."""


class Train(Section):
    """The optimisation."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Initial weights, order of samples, dropout."""
    epochs: Annotated[int, Field(ge=1)] = 50
    """Passes over D."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images of D in one step, all workers together."""
    external_ratio: Annotated[float, Field(gt=0, le=16)] = 1.0
    """Images of E per image of D in one step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """As timm's optimiser factory names them; `sgd` has momentum 0.9."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate; the peak of it under `cosine`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """R(w⁺) of the paper."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to 0 over the whole run."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 10
    """Epochs between two checkpoints; the last epoch always has one. A run whose worker dies goes
    on from the last."""


class Evaluation(Section):
    """How membership is measured."""

    batch_size: Annotated[int, Field(ge=1)] = 512
    """Images in one forward pass when scoring, per worker."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of every interval."""
    threshold_fpr: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """False-positive rate that the calibrated threshold of the balanced accuracy aims at."""
    fprs: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, min_length=1)
    ] = (0.01, 0.001, 0.0001)
    """False-positive rates at which the true-positive rate is reported."""
    priors: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, min_length=1)
    ] = (0.01, 0.1)
    """Shares of members among the suspects at which the precision is reported."""
    min_false_positives: Annotated[float, Field(ge=0)] = 10.0
    """A rate with fewer expected false positives in `test` than this is not reported."""


class Cluster(Section):
    """Where the workers run."""

    address: str | None = None
    """`host:port` of a running Ray cluster; by default RAY_ADDRESS, and without it a cluster of
    this machine alone that ends with the run."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Training processes; by default one a GPU, and without GPUs one a core up to two."""
    cpus_per_worker: Annotated[float, Field(ge=0.01)] = 1
    """Cores that Ray reserves for one worker."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often the run starts again from its last checkpoint when a worker dies."""


class Storage(Section):
    """Where checkpoints go."""

    path: Annotated[str, Field(min_length=1)] = "amint_runs"
    """Folder of the runs' checkpoints, one sub-folder a run; it must be one that all nodes see."""


class Tracking(Section):
    """What MLflow is told.

    The server's address comes from MLFLOW_TRACKING_URI; without it, a SQLite file and an artifact
    folder in the working directory are used.
    """

    experiment: Annotated[str, Field(min_length=1)] = "amint"
    """MLflow experiment of the run."""
    model_name: Annotated[str, Field(min_length=1, pattern=r"^[^/:.%\"']+$")] | None = None
    """Registered model's name; by default `amint-` and the recipe's name, with hyphens."""


class Config(Section):
    """Everything that decides a run."""

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "custom"
    """The recipe's name; part of the run's and of the registered model's name."""
    data: Data = Data()
    model: Model = Model()
    mint: Mint = Mint()
    loss: Loss = Loss()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    cluster: Cluster = Cluster()
    storage: Storage = Storage()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _roles_that_training_needs(self) -> Config:
        if self.loss.lambda_mint > 0 and self.data.shares.external == 0:
            raise ValueError(
                "loss.lambda_mint > 0 needs external images: give data.shares.external a share"
            )
        return self

    @property
    def registered_model(self) -> str:
        """Name under which MLflow's registry keeps the model."""
        return self.tracking.model_name or f"amint-{self.name}".replace("_", "-")
