"""The `mint` section: the head, where it reads, and what it learns."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from amint_ray.config.section import Names, Section, listed
from amint_ray.contracts import MAYBE_KEY


class Keyed(Section):
    """The secret code of each image of D (`mint.objective` of `keyed` or `both`)."""

    head: Literal["learned", "fixed"] = "learned"
    """What says the code. `learned`: the MINT head, from its taps; images withheld from it say
    nothing. `fixed`: a fixed random projection of what the classifier's last layer reads: no
    parameters, and images that are withheld from the head carry their code all the same."""
    bits: Annotated[int, Field(ge=1, le=64)] = 32
    """Length of the code. One image can be told at p = 2^-bits at best; each bit more is more to be
    remembered of each image."""
    code_from: Literal["content", "perceptual"] = "content"
    """What the code is the HMAC of. `content`: the pixels as they are scored (decoded, turned by
    EXIF, RGB or gray, resized, 8 bits), so that copies without loss have it, too. `perceptual`: the
    64-bit perceptual hash of the decoded image, which most copies that were compressed or resized
    share, and near-duplicates as well."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the key. A run writes it here; one that is given must be that of the key."""


class Mint(Section):
    """The membership-inference (MINT) head and where it reads."""

    objective: Literal["binary", "keyed", "both"] = "binary"
    """What is learned of D. `binary`: D is 1, E is 0 (the paper's). `keyed`: each image's own code,
    which nobody knows who has not the key; what is not trained on has its bits right half the
    time, exactly. It needs no E: a shipped recipe's share of it goes to `member`, unless
    `data.shares` is given on the command line, and its `loss.lambda_mint` is 0.3 at most, unless
    that is given. `both`: the two losses added up."""
    key_file: Annotated[str, Field(min_length=1)] | None = None
    """File with the key (`amint key new FILE`); whoever has it can ask, and nobody else. The key
    itself is in no configuration, record or model."""
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable with the key, in place of a file."""
    keyed: Keyed = Keyed()
    """The code."""
    taps: Annotated[Names, Field(min_length=1)] = ("middle",)
    """Where the head reads: `entry`, `middle` or `output`, which mean two modules each on any
    backbone (`amint taps BACKBONE` shows them), or names and globs of modules, in any order.
    The paper found two better than one on a CNN. The deeper the last one, the dearer the step, and
    the more the two tasks disturb each other."""
    head: Literal["mlp", "attention", "conv", "tokens"] = "mlp"
    """`mlp`: a hidden layer over coarse maps or tokens, for any backbone. `conv`: the paper's for
    CNNs. `tokens`: the paper's for ViTs, one linear layer over all that the taps give.
    `attention`: learned queries over positions or tokens; slow to learn (docs/benchmarks.md)."""
    channels: Annotated[int, Field(ge=1, le=4096)] = 64
    """Features a position is projected to (`attention`); filters of each convolution (`conv`)."""
    queries: Annotated[int, Field(ge=1, le=256)] = 8
    """Learned queries a tap (`attention`)."""
    hidden: Annotated[int, Field(ge=1, le=65536)] = 128
    """Width of the fully connected layer behind the joined taps (all but `tokens`). A wider one
    recalls more of each code, and tells more to who has no key as well (docs/benchmarks.md)."""
    pool: Annotated[int, Field(ge=1)] | None = 4
    """Larger maps are averaged to this many positions a side first (all but `tokens`; `mlp` and
    `conv` do so with a square of tokens, too); null: never, as in the paper, which on large maps
    can cost more than the backbone."""
    inputs: Annotated[
        tuple[Literal["logits", "loss"], ...], Field(strict=False), BeforeValidator(listed)
    ] = ()
    """What else the head reads, in training as in scoring: the task's `logits`, the task `loss`
    (whoever asks the model must then give labels). E's rows must then pass the whole backbone, its
    BatchNorm statistics included; no gradient goes back through these inputs."""
    detach: bool = False
    """Stop the head's gradient at the taps: the backbone is then trained plainly, bit for bit (λ₁
    and the weighting apply to the head alone), and E's rows cost a third. Where training and
    evaluation mode differ (BatchNorm, dropout), D passes the trunk once more for the head."""
    views: Literal["plain", "task"] = "plain"
    """What the head sees where `data.augment` changes what the task sees. `plain`: D and E as they
    will be scored, D in rows of its own. `task`: D and E augmented alike, in the task's rows."""

    @field_validator("taps", "inputs")
    @classmethod
    def _distinct(cls, items: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(items)) < len(items):
            raise ValueError("the same name stands there twice")
        return items

    @field_validator("key_file", "key_env")
    @classmethod
    def _no_key_itself(cls, name: str | None) -> str | None:
        if name is not None and MAYBE_KEY.fullmatch(name):
            raise ValueError(
                "a key itself, by the look of it, which would be recorded; give the name of what "
                "holds it"
            )
        return name

    @model_validator(mode="after")
    def _code_that_can_be_had(self) -> Mint:
        if self.key_file is not None and self.key_env is not None:
            raise ValueError(
                "mint.key_file and mint.key_env both name a key; give one of them (null takes one "
                "out)"
            )
        if self.objective == "binary" or self.keyed.head == "learned":
            return self
        if self.objective == "keyed" and self.inputs:
            raise ValueError(
                "mint.keyed.head=fixed reads the classifier's features alone; leave mint.inputs out"
            )
        if self.detach:
            raise ValueError(
                "mint.keyed.head=fixed has no parameters: with mint.detach=true nothing would "
                "learn the code; take mint.keyed.head=learned, or mint.detach=false"
            )
        return self

    @property
    def names_key(self) -> bool:
        """Whether it is said where the key is."""
        return self.key_file is not None or self.key_env is not None

    @property
    def coded(self) -> bool:
        """Whether images have a code that is learned."""
        return self.objective != "binary"


SET_FOR_CODES = ("data.shares", "loss.lambda_mint")
"""What a shipped recipe that is to learn codes alone does not keep, unless it is given."""
_LAMBDA = 0.3
"""λ₂ at which a head recalls most of its codes and the task loses nothing that was seen
(docs/benchmarks.md)."""


def set_for_codes(values: Any, told: Collection[str]) -> Any:
    """A shipped recipe's values with what suits `mint.objective=keyed`, where it asks for that.

    It needs no E, whose share trains the task.

    Args:
        values: a configuration that nobody has checked yet.
        told: which of `SET_FOR_CODES` the user gave.
    """
    try:
        if values["mint"]["objective"] != "keyed":
            return values
        shares, loss = values["data"]["shares"], values.setdefault("loss", {})
        if "data.shares" not in told and shares["external"] > 0:
            # Rounded: 0.16 + 0.14 must be written as 0.3.
            member = round(shares["member"] + shares["external"], 12)
            shares |= {"member": member, "external": 0.0}
        if "loss.lambda_mint" not in told:
            loss["lambda_mint"] = min(loss.get("lambda_mint", _LAMBDA), _LAMBDA)
    except (KeyError, TypeError, AttributeError):  # it is wrong, which others will tell
        pass
    return values
