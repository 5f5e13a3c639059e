"""The `data` section: where images come from, who gets which role, how they are read."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from amint_ray.config.section import Section

Share = Annotated[float, Field(ge=0, le=1)]
TORCHVISION = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "GTSRB", "SVHN", "ImageNet")
_SOURCES = ("digits", "folder", "parquet", *(f"torchvision:{name}" for name in TORCHVISION))
Source = Annotated[str, Field(pattern=r"^[A-Za-z0-9:]+$")]


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


class External(Section):
    """A source of its own for E, beside the pool's share. Give it what the main source has."""

    source: Source | None = None
    """As `data.source`; null: E comes from the pool alone. All of it gets the role `external`, but
    what is in the pool, too, is left out. A `folder` needs no class folders here."""
    path: str | None = None
    """As `data.path`."""
    image_column: str | None = None
    """As `data.image_column`."""
    label_column: str | None = None
    """As `data.label_column`; null: no labels are read."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """As `data.limit`."""

    @model_validator(mode="after")
    def _complete(self) -> External:
        if self.source is not None:
            check_source(self.source, self.path, "data.external")
        elif given := [key for key, value in self if value is not None]:
            raise ValueError(f"data.external.{given[0]} needs data.external.source")
        return self


class Data(Section):
    """Where the images come from, who gets which role, and how they are read."""

    source: Source = "digits"
    """`digits`: scikit-learn's bundled 8×8 digits. `folder`: image files in class folders, with
    `train` and `val` or `test` above them or not; ImageNet's and Tiny ImageNet's own layouts, too.
    `parquet`: files in the Hugging Face hub's layout (an image column of `{bytes, path}`, a label
    column), what `amint prepare` writes. `torchvision:NAME`, NAME one of MNIST, FashionMNIST,
    CIFAR10, CIFAR100, GTSRB, SVHN, ImageNet: downloaded to `data.path` where torchvision can."""
    path: str | None = None
    """Folder (or Parquet file), local or `s3://bucket/prefix`; where `torchvision:` keeps its files
    (by default ~/.cache/amint_ray). Parquet files named `test…` or `validation…`, or in a folder of
    that name, are the official test split: all of it gets the role `test`. Test images without
    labels are left out."""
    image_column: str | None = None
    """Image column of a `parquet` source; by default the only column that holds images."""
    label_column: str = "label"
    """Label column of a `parquet` source."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first so many images of each official split (of a folder: a fixed random choice,
    since files are sorted by class); all of them by default."""
    external: External = External()
    """E from elsewhere."""
    image_size: Annotated[int, Field(ge=4, le=4096)] = 32
    """Height and width in pixels that the backbone sees."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """When scored, an image's shorter side is resized to `image_size / crop_pct`, then the centre
    is taken."""
    channels: Literal[1, 3] = 3
    """1: gray, 3: RGB. Images of the other kind are converted."""
    mean: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Subtracted from every pixel after scaling to [0, 1]."""
    std: Annotated[float, Field(gt=0)] = 0.5
    """Every pixel is divided by this afterwards."""
    augment: Literal["none", "crop_flip", "timm"] = "none"
    """How the task sees D in training. `crop_flip`: shifted by up to an eighth of the side on black
    ground, and flipped half the time. `timm`: timm's training transforms of the stored image, one
    by one, which needs streaming. Nothing is augmented when scored."""
    augment_options: dict[str, Any] = Field(default_factory=dict)
    """Passed on to `timm.data.create_transform`, for instance `{auto_augment: rand-m9-mstd0.5,
    scale: [0.2, 1.0]}` (`timm` only)."""
    mode: Literal["auto", "memory", "streamed"] = "auto"
    """`memory`: decoded once, held as bytes (on the GPU if there is room). `streamed`: read and
    decoded anew in each epoch, ahead of need, by processes beside the training. `auto`: memory
    where `memory_gib` allows and `augment` is not `timm`."""
    memory_gib: Annotated[float, Field(gt=0)] = 8.0
    """What decoded images may take. While they are handed to Ray, twice as much is taken for a
    moment."""
    readers: Annotated[int, Field(ge=1, le=256)] | None = None
    """Reading processes of each worker when streaming; by default the cores that Ray reserves for a
    worker (`cluster.cpus_per_worker`), less one, at least one."""
    streams: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Streaming shuffles the row groups and cuts them into so many streams that are read side by
    side. By default 24, or as many more as give each reader of each worker the same number. A run
    keeps its number, since the order of the images depends on it."""
    window: Annotated[int, Field(ge=1)] = 128
    """Images are shuffled within a window of so many in each stream. More mixes better and takes
    more memory: a worker holds its streams times so many encoded images, twice with E."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long object storage may keep silent before a read is tried again."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Images that cannot be used are quarantined: listed with the reason in the run's artifacts. If
    there are more than this share, the run stops."""
    max_megapixels: Annotated[float, Field(gt=0)] = 178.0
    """A larger image is quarantined unopened: decoding it would take gigabytes."""
    near_duplicates: Annotated[int, Field(ge=0, le=8)] | None = None
    """Images whose 64-bit perceptual hashes differ in at most so many bits, directly or through
    others, share one role; null: only exact duplicates do."""
    confounder_check: bool = True
    """Before training, have a classifier that never sees the model try to tell `member` and
    `external` from `test`; where it can, no membership figure of the split can be trusted."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Keys the hash that gives each image its role. No secret: it only makes another split."""
    shares: Shares = Shares()
    """How much of the pool each role gets."""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        check_source(self.source, self.path, "data")
        if self.augment_options and self.augment != "timm":
            raise ValueError("data.augment_options are for data.augment=timm")
        if self.augment == "timm" and self.mode == "memory":
            raise ValueError(
                "data.augment=timm cuts from the stored images, which data.mode=memory does not "
                "keep; take data.mode=streamed, or data.augment=crop_flip"
            )
        return self


def source_names() -> tuple[str, ...]:
    """What `data.source` can be."""
    return _SOURCES


def check_source(source: str, path: str | None, where: str) -> None:
    """Whether there is such a source and it has the path it needs.

    Args:
        source: its name.
        path: its path, if one was given.
        where: the section's name, for the error.

    Raises:
        ValueError: not so.
    """
    if source not in _SOURCES:
        raise ValueError(f"{where}.source = {source!r}: there are {', '.join(_SOURCES)}")
    if source in ("folder", "parquet") and path is None:
        what = "image files" if source == "folder" else "Parquet files"
        raise ValueError(f"source {source!r} needs {where}.path=FOLDER with {what}")
    if source == "digits" and path is not None:
        raise ValueError(f"source 'digits' is bundled and takes no {where}.path")
