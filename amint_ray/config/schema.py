"""The configuration: typed, frozen, strict. The text under a field is its documentation.

`docs/config.md` is generated from here by `python -m amint_ray.config.reference`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from amint_ray.config.data_schema import Data
from amint_ray.config.mint_schema import Mint
from amint_ray.config.section import Section
from amint_ray.contracts import RESERVED_OPTIONS


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


class Loss(Section):
    """L = λ₁·s₁·L_task + λ₂·s₂·L_MINT; the paper's scales s are 1/‖L‖."""

    lambda_task: Annotated[float, Field(gt=0)] = 1.0
    """λ₁."""
    lambda_mint: Annotated[float, Field(ge=0)] = 1.0
    """λ₂. At 0 the model is trained plainly: no external image is loaded, no loss is rescaled."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """λ₂ rises from 0 to its value, linearly over the steps of so many epochs."""
    weighting: Literal["initial", "ema", "none", "uncertainty", "gradnorm"] = "initial"
    """What s is. `initial`: 1/loss in the first batch (the authors' notebooks). `ema`: 1/running
    mean of the loss. `none`: 1. `uncertainty`: learned, after Kendall et al. 2018. `gradnorm`:
    equal gradients at the last tap, after Chen et al. 2018. Equations in train/weighting.py."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """How much of a running mean stays at each step (`ema`, `gradnorm`)."""
    uncertainty_lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate of the two log-variances (`uncertainty`)."""
    gradnorm_alpha: Annotated[float, Field(ge=0)] = 1.5
    """How much stronger the task that lags behind is pulled (`gradnorm`); 0: not at all."""


class Train(Section):
    """The optimisation."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Initial weights, order of samples, augmentation, dropout."""
    epochs: Annotated[int, Field(ge=1)] = 50
    """Passes over D."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images of D in one step, all workers together."""
    external_ratio: Annotated[float, Field(gt=0, le=16)] = 1.0
    """Images of E per image of D in one step."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches that one step's batch is computed in, to save memory. The update is the same,
    except that BatchNorm takes its statistics from the smaller batches."""
    micro_batch: Annotated[int, Field(ge=2)] | None = None
    """Largest number of images of D that one worker computes at a time: a step's batch is computed
    in as many micro-batches as that takes, so that it stays the same when there are fewer workers.
    null: `accumulate` alone decides."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker has the whole model. `fsdp`: every worker has its share of each block
    (FSDP2) and of a checkpoint, for backbones that do not fit; scores and losses are the same."""
    sync_batchnorm: bool = False
    """BatchNorm takes its statistics over all workers' rows; then their number leaves no trace."""
    optimizer: Annotated[str, Field(min_length=1)] = "adam"
    """Any name of `timm.optim.list_optimizers()`."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """The optimiser's own further arguments, such as `{betas: [0.9, 0.95]}`."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate, at its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """R(w⁺) of the paper."""
    schedule: Literal["constant", "cosine", "step", "poly", "tanh"] = "constant"
    """timm's schedules, updated at each step. `cosine`, `poly` and `tanh` reach `min_lr` at the
    end; `step` multiplies by `decay_rate` every `decay_epochs`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """The learning rate rises linearly from a thousandth of `lr`, over so many epochs; the schedule
    runs underneath and takes over where it then is."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where `cosine`, `poly` and `tanh` end."""
    decay_epochs: Annotated[float, Field(gt=0)] = 30.0
    """Epochs between two falls (`step`)."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What the learning rate is multiplied by (`step`)."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """`bfloat16` and `float16` compute under autocast, `float16` with loss scaling. Weights, losses
    and scoring are float32 always."""
    channels_last: bool = False
    """Keep feature maps channels-last in memory; quicker for convolutions on many machines."""
    compile: bool = False
    """`torch.compile` the joint step's forward and backward pass: the first step takes a minute,
    the others less time. Needs a C++ compiler."""
    checkpoint_activations: bool = False
    """Compute the insides of the backbone's blocks again in the backward pass instead of keeping
    them: less memory, a third more time."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 10
    """Epochs between two checkpoints; the last epoch always has one. A run whose worker dies goes
    on from the last."""
    checkpoint_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two checkpoints within an epoch, for epochs that take hours; the run goes on at
    the very next sample."""


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
    reference_images: Annotated[int, Field(ge=0)] = 2000
    """Images of `calibration`, of `member` and of `withheld` of which the registered model keeps
    what it says (outputs and activations; no pixels, no names): audits compare with them. 0: none;
    then the model cannot be audited."""
    select_every: Annotated[int, Field(ge=1)] | None = None
    """Epochs between two looks at the figures that a search selects by (`selection.…`), measured on
    `calibration` split in two and never on `test`; the last epoch always has one. null: none."""
    select_images: Annotated[int, Field(ge=1)] = 2000
    """Images of `member`, and of `withheld`, that are scored for it at most; always the same."""


Workers = Annotated[int, Field(ge=1)]


class Cluster(Section):
    """Where the workers run."""

    address: str | None = None
    """`host:port` of a running Ray cluster; by default RAY_ADDRESS, and without it a cluster of
    this machine alone that ends with the run."""
    workers: Workers | Annotated[tuple[Workers, Workers], Field(strict=False)] | None = None
    """Training processes; by default one a GPU, and without GPUs one a core up to two. Two numbers,
    `[1, 3]`: as many as there is room for, fewer when a node is lost, more when it comes back."""
    resize_seconds: Annotated[float, Field(ge=0)] = 60.0
    """How often a run that may have more workers looks whether there is room for them (`workers` of
    two numbers). It then starts again from its last checkpoint."""
    cpus_per_worker: Annotated[float, Field(ge=0.01)] = 1
    """Cores that Ray reserves for one worker."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cuda`: each worker has a GPU; `cpu`: none has; `auto`: each has, where there are any."""
    wait_seconds: Annotated[float, Field(ge=0)] = 60.0
    """How long to wait for a cluster that was joined and is too small, or is used by others, to
    have room for the workers. Its autoscaler, if it has one, is asked for nodes."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """What workers exchange gradients by: `nccl` where they have GPUs, else `gloo`."""
    max_failures: Annotated[int, Field(ge=-1)] = 8
    """How often the run starts again from its last checkpoint when a worker or a node dies; −1:
    always."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number_or_two(cls, value: Any) -> Any:
        """In one line, where the union would give one for each of its kinds."""
        numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        whole = all(type(number) is int and number >= 1 for number in numbers)
        if value is None or (whole and numbers[0] <= numbers[-1]):
            return value
        raise ValueError("write a whole number from 1 on, or two of them, [fewest, most]")


class Storage(Section):
    """Where checkpoints go."""

    path: Annotated[str, Field(min_length=1)] = "amint_runs"
    """Folder of the runs' checkpoints, one sub-folder a run: one that all nodes see, or
    `s3://bucket/prefix`."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints that are kept: the last ones. A second one is there in case that the last is
    damaged."""
    keep_best: Literal["calibration/task_loss", "calibration/task_accuracy"] | None = None
    """Keep those that are best in this, and the last one. The model registered is the last."""


class Tracking(Section):
    """What MLflow is told.

    The server's address comes from MLFLOW_TRACKING_URI; without it, a SQLite file and an artifact
    folder in the working directory are used.
    """

    enabled: bool = True
    """Record the run and register its model. Otherwise files and model go to `storage.path` alone,
    in the run's folder."""

    experiment: Annotated[str, Field(min_length=1)] = "amint"
    """MLflow experiment of the run."""
    model_name: Annotated[str, Field(min_length=1, pattern=r"^[^/:.%\"']+$")] | None = None
    """Registered model's name; by default `amint-` and the recipe's name, with hyphens."""
    parent_run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    """Id of the MLflow run that this one is shown below, such as a search's."""
    steps_per_point: Annotated[int, Field(ge=1)] = 1
    """Losses within an epoch are recorded as means over so many steps."""
    system_seconds: Annotated[float, Field(ge=0)] = 10.0
    """Time between two records of each machine's processor, memory, disk, network and GPUs; 0:
    none."""
    spool: str | None = None
    """Local folder in which records wait while MLflow does not answer; by default `spool` in
    `storage.path`, or `amint_spool` in the working directory where that is on object storage."""
    wait_seconds: Annotated[float, Field(ge=0)] = 60.0
    """How long a run that is done waits for an MLflow that does not answer; then what waits is left
    for `amint sync` to send."""


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
        none = self.data.shares.external == 0 and self.data.external.source is None
        if self.trains_membership and none:
            raise ValueError(
                "loss.lambda_mint > 0 needs external images: give data.shares.external a share, or "
                "a data.external.source, or take mint.objective=keyed, which needs none"
            )
        return self

    @model_validator(mode="after")
    def _warm_ups_within_the_run(self) -> Config:
        for key, epochs in (("loss", self.loss.warmup_epochs), ("train", self.train.warmup_epochs)):
            if epochs > self.train.epochs:
                raise ValueError(
                    f"{key}.warmup_epochs = {epochs:g} is longer than train.epochs = "
                    f"{self.train.epochs}"
                )
        if self.train.accumulate > self.train.batch_size:
            raise ValueError(
                f"train.accumulate = {self.train.accumulate} micro-batches cannot be made of "
                f"train.batch_size = {self.train.batch_size} images"
            )
        if self.train.parallel == "fsdp" and self.train.compile:
            raise ValueError(
                "train.compile=true does not go with train.parallel=fsdp; set one of them otherwise"
            )
        return self

    @model_validator(mode="after")
    def _gradients_that_gradnorm_reads(self) -> Config:
        if self.loss.weighting == "gradnorm" and self.loss.lambda_mint > 0:
            if self.mint.coded and self.mint.keyed.head == "fixed":
                raise ValueError(
                    "loss.weighting=gradnorm balances gradients at the last tap, and "
                    "mint.keyed.head=fixed reads none; use another weighting"
                )
            if self.mint.detach:
                raise ValueError(
                    "loss.weighting=gradnorm balances gradients, and with mint.detach=true the "
                    "head sends none; use another weighting"
                )
            if self.train.compile:
                raise ValueError(
                    "loss.weighting=gradnorm reads gradients inside the backward pass, which "
                    "train.compile=true does not let it; set one of the two otherwise"
                )
        return self

    @property
    def trains_membership(self) -> bool:
        """Whether the head is told of membership, for which it needs E."""
        return self.loss.lambda_mint > 0 and self.mint.objective != "keyed"

    @property
    def uses_key(self) -> bool:
        """Whether images' codes are trained on."""
        return self.loss.lambda_mint > 0 and self.mint.coded

    @property
    def wants_codes(self) -> bool:
        """Whether images' codes are to be had: also where only some of a search's trials do."""
        return self.uses_key or self.mint.names_key

    @property
    def external_rows(self) -> int:
        """Rows of E in a global batch."""
        if not self.trains_membership:
            return 0
        return round(self.train.batch_size * self.train.external_ratio)

    @property
    def plain_rows(self) -> int:
        """Rows of D in a global batch that only the head reads: plain where the task's are not."""
        apart = self.data.augment != "none" and self.mint.views == "plain"
        return self.train.batch_size if apart and self.loss.lambda_mint > 0 else 0

    @property
    def registered_model(self) -> str:
        """Name under which MLflow's registry keeps the model."""
        return self.tracking.model_name or f"amint-{self.name}".replace("_", "-")
