"""What the audit says in words: of each kind of evidence, and where there is no verdict."""

from __future__ import annotations

SHOWS = {
    "head": (
        "that images were among those that the model's own MINT head was taught, during training, "
        "to recognise as training images"
    ),
    "outputs": (
        "that the model is surer of images than it is of images that it was not trained on, "
        "whether or not the head was told of them"
    ),
}
CANNOT_SHOW = {
    "head": (
        "that images were not used: the head attests what it was told, and training images that "
        "were withheld from it look like strangers"
    ),
    "outputs": (
        "which single image was used, as a rule: the trace that one image leaves in the outputs is "
        "faint, and it takes a collection to see it; nor use in a training that left no trace"
    ),
}

KEY_NEEDED = "the head says secret codes alone, which give no p-value without their key"

_REASONS = {
    "no_images": (
        "no image of the collection could be compared",
        "give images that can be read, of the kind that the model is for",
    ),
    "labels_needed": (
        "the model's head reads the task loss and says nothing of images without labels, of which "
        "there are {silent}",
        "give labels: in folders that are called like the model's classes, or by "
        "audit.label_column",
    ),
    "confounded": (
        "the images that the model was trained on can be told from the others without the model, "
        "so what it seems to know may be what anybody can see",
        "train again with images of one source, which are assigned to roles at random",
    ),
    "confounders_unknown": (
        "nobody has looked whether the images that the model was trained on can be told from the "
        "others without it; if they can, what the model seems to know may be what anybody can see",
        "{instead}train it again with data.confounder_check=true",
    ),
    "flagged": (
        "{flagged} image(s) are called members one by one, at a false-discovery rate of {fdr:g}, "
        "though the collection as a whole shows nothing",
        "look at them, and ask about more images of their source",
    ),
    "unlike": (
        "the suspects are unlike the calibration images (effect {effect:.2f}, limit {limit:.2f}), "
        "so no error rate is known for them",
        "give images of the source that the model was trained on, prepared in the same way; or "
        "register a model whose calibration images are such as the suspects",
    ),
    "likeness_unknown": (
        "it could not be tested whether the suspects are like the calibration images",
        "register the model again with images of the role calibration "
        "(data.shares, evaluation.reference_images)",
    ),
    "underpowered": (
        "the {compared} different image(s) together show nothing, and {needed} training images "
        "would be needed to be noticed with a chance of {power:.0%} if the head was not told of "
        "them",
        "give more images of the same source, with their labels; a larger alpha needs fewer",
    ),
    "powerless": (
        "the collection as a whole shows nothing, and no number of training images is known to be "
        "noticed with a chance of {power:.0%} if the head was not told of them",
        "{instead}a model with more calibration and withheld images, of the collection's classes, "
        "too (data.shares), can be asked for more",
    ),
}
INSTEAD = {
    "head": "look at outputs as well as the head (audit.evidence=both), with the labels of the "
    "images; ",
    "prediction": "give the labels of the images: in folders that are called like the model's "
    "classes, or by audit.label_column; ",
    "mixed": "give labels to all images, or use none (audit.labels=false); ",
    "own": "",
}
"""What the same model could still be asked: where `head` alone was, or outputs by these labels."""
BY_NAME = "audit the model by its name in MLflow, whose run may keep that check, or "

_WITHIN = (
    "; its classes are not those of the calibration images, so it is compared within them, with few"
)
_MORE_CLASSES = (
    "give images of all classes, in about the shares that the model was trained with; or register "
    "a model with more calibration images of these classes (data.shares); or "
)


def reason(code: str, *, instead: str = "", **values: object) -> dict[str, str]:
    """Why there is no verdict, or what is to be held against one: `{code, text, help}`.

    Args:
        code: one of those above; not `powerless`.
        instead: what would help as well, in front of what always does.
        **values: what the text names; of `underpowered`, `needed` may be None, and `within` says
            whether the collection was compared within classes.
    """
    key = "powerless" if code == "underpowered" and values.get("needed") is None else code
    text, help_ = _REASONS[key]
    if values.get("within"):
        text, help_ = text + _WITHIN, _MORE_CLASSES + help_
    return {"code": code, "text": text.format(**values), "help": help_.format(instead=instead)}
