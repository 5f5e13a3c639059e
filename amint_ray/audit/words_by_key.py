"""What an audit by key says in words."""

from __future__ import annotations

from typing import Literal

METHOD = "matches of secret codes, weighted by how sure the model is of each bit; exact p-values"
KEY_ASKED = "the key was asked, and the verdict rests on it alone"
SHARE_OF = "images whose codes the model was taught"
SHOWS = (
    "that the model recalls the secret codes of images, which it can only have learned in its "
    "training, wherever the images are from"
)
WITHHELD = {
    "code": "withheld_from_head",
    "text": (
        "training images that were withheld from the head would not be noticed, as it was not "
        "taught their codes"
    ),
    "help": (
        "look at the model's outputs as well, by an audit without the key; a model that was "
        "trained with mint.keyed.head=fixed, or with nothing withheld, can be asked for more"
    ),
}
"""Why a learned head cannot acquit where images were withheld from it, as every result shows."""
NEVER_TAUGHT = {
    **WITHHELD,
    "help": (
        "look at the model's outputs as well, by an audit without the key; a model that was "
        "trained with mint.keyed.head=fixed can be asked for more"
    ),
}
"""What is to be held against `not_member` where none is known to have been."""
_NO_TRACE = "that images were not used: one whose code the model did not keep looks like any other"
_LEARNED = (
    "training images that were withheld from the head, which was not taught their codes, look like "
    "any other"
)
_OF_CONTENT = (
    "an image that was changed, so that the pixels that the model is shown differ, has another code"
)
_OF_LOOKS = "near-duplicates share a code, and one of them may stand for the other"


def cannot_show(*, head: Literal["learned", "fixed"], code_from: str) -> str:
    """What the key does not tell of this model.

    Args:
        head: what says the codes (`mint.keyed.head`).
        code_from: `content` or `perceptual`, what of an image its code is made from.
    """
    parts = [_NO_TRACE, *([_LEARNED] if head == "learned" else [])]
    return "; ".join([*parts, _OF_LOOKS if code_from == "perceptual" else _OF_CONTENT])


def underpowered(*, images: int, needed: int | None, known: int, power: float) -> dict[str, str]:
    """Why there is no verdict where nothing was found: `{code, text, help}`.

    Args:
        images: different images of the collection.
        needed: as many would be noticed if the model was taught their codes; None: not known.
        known: images with known codes that this is judged by.
        power: how surely they would be noticed.
    """
    if needed is None:
        text = (
            f"the collection as a whole shows nothing, and by the {known:,} known image(s) that "
            "the model was taught the codes of, no size is known that would be noticed with a "
            f"chance of {power:.0%}"
        )
        help_ = (
            "ask a model that remembers its codes better (more epochs, a larger loss.lambda_mint), "
            "or that keeps more known images (evaluation.reference_images)"
        )
    else:
        text = (
            f"the {images:,} different image(s) together show nothing, and {needed:,} whose codes "
            f"the model was taught would be needed to be noticed with a chance of {power:.0%}"
        )
        help_ = "give more images of the same source; a larger alpha needs fewer"
    return {"code": "underpowered", "text": text, "help": help_}
