"""The model card: what a registered version is, what was measured, and what that cannot show.

Markdown, written from the run's document alone, so that it says nothing that was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amint_ray.config.schema import Config
from amint_ray.contracts import Role
from amint_ray.model.joint import Architecture

CARD = "model_card.md"
"""The run's artifact."""
LONGEST_DESCRIPTION = 5000
"""Characters that MLflow's database takes as a version's description."""
_SHORTENED = f"*Shortened; the whole card is `{CARD}` among the run's artifacts.*\n"
_NOT_REPORTED = "not reported"
_TRAINS = {
    Role.MEMBER: ("yes", "1"),
    Role.WITHHELD: ("yes", "never shown"),
    Role.EXTERNAL: ("no", "0"),
    Role.CALIBRATION: ("no", "never shown"),
    Role.TEST: ("no", "never shown"),
}

Document = Mapping[str, Any]


def model_card(
    document: Document,
    *,
    name: str,
    config: Config,
    architecture: Architecture,
    environment: Mapping[str, Any],
) -> str:
    """The card of a model that is about to be registered.

    Args:
        document: the run's, as `launch.record.record` makes it; `model_uri` is not needed.
        name: of the registered model.
        config: the whole configuration.
        architecture: of the model.
        environment: what `run_log.environment` says.
    """
    sections = [
        _summary(document, name, config, architecture),
        _data(document, config),
        _figures(document),
        _confounders(document["confounders"]),
        _use(document, config, architecture),
        _limits(document, config),
        _loading(document, name, architecture),
        _made_with(environment),
    ]
    return "\n\n".join(sections) + "\n"


def shortened(card: str, longest: int = LONGEST_DESCRIPTION) -> str:
    """A card without its last sections, so that it has at most so many characters and says so."""
    if len(card) <= longest:
        return card
    room = longest - len(_SHORTENED) - 2
    ends = [i for i in range(room + 1) if card.startswith("\n## ", i)]
    return f"{card[: ends[-1] if ends else room].rstrip()}\n\n{_SHORTENED}"


def _summary(document: Document, name: str, config: Config, architecture: Architecture) -> str:
    shape = "×".join(map(str, architecture.input_shape))
    taps = ", ".join(f"`{tap.name}`" for tap in architecture.taps)
    reads = "".join(f" and the task's {what}" for what in architecture.head.inputs)
    head = f"`{architecture.head.kind}`, reads {taps}{reads}"
    head += "; its gradient stops there" if architecture.detach else ""
    if config.uses_key:
        keyed = config.mint.keyed
        says = f"a secret code of {keyed.bits} bits for each image of D ({keyed.head} head)"
        head += f"; says {says if config.mint.objective == 'keyed' else f'membership, and {says}'}"
        head += f"; key with fingerprint `{keyed.fingerprint}`"
    if config.loss.lambda_mint == 0:
        head = "not trained (`loss.lambda_mint` = 0)"
    seeds = document["seeds"]
    return "\n".join(
        [
            f"# {name}",
            "",
            "An image classifier trained together with a membership-inference (MINT) head, which "
            "can be asked whether an image was in the training set."
            if config.loss.lambda_mint > 0
            else "An image classifier trained as usual: its membership-inference (MINT) head was "
            "not, and it cannot be asked about its training set.",
            "",
            f"- Recipe: `{document['recipe']}`, configuration `{document['config_fingerprint']}`",
            f"- Run: `{document['run_id'] or 'not in MLflow'}` ({document['run_name']})",
            f"- Classifier: `{architecture.backbone}`, {shape} pixels, "
            f"{architecture.num_classes:,} classes, {config.train.epochs} epochs",
            f"- MINT head: {head}",
            f"- Seeds: training {seeds['train']}, split {seeds['split']}; {_seed_count(document)}",
        ]
    )


def _seed_count(document: Document) -> str:
    count = document["seeds"]["count"]
    return "one training run" if count == 1 else f"{count} training runs"


def _data(document: Document, config: Config) -> str:
    head_trained = config.loss.lambda_mint > 0
    rows = [
        (
            role.value,
            f"{document['counts'][role.value]:,}",
            _TRAINS[role][0],
            _TRAINS[role][1] if head_trained else "no head was trained",
        )
        for role in Role
    ]
    return "\n".join(
        [
            "## Data",
            "",
            f"Source `{document['data']['source']}`; images and roles have the fingerprint "
            f"`{document['manifest_fingerprint']}`. {document['quarantined']:,} images could not "
            f"be used; {document['duplicates']:,} are exact copies of another and share its role.",
            "",
            *_table(("role", "images", "trains the task", "trains the head as"), rows),
        ]
    )


def _figures(document: Document) -> str:
    """Task and membership, each with its interval; beneath them what is not reported, and why."""
    unreported: dict[str, list[str]] = {}
    rows: list[tuple[str, ...]] = []
    for label, figures in _rows(document):
        cells = []
        for figure in figures:
            if figure["value"] is None:
                named = unreported.setdefault(str(figure.get("note")), [])
                named += [label] if label not in named else []
            cells.append(interval(figure))
        if any(cell != _NOT_REPORTED for cell in cells):
            rows.append((label, *cells))
    n = {role: document["membership"][role]["compared"] for role in ("member", "withheld")}
    counted = [f"{c['n_positives']:,} vs {c['n_negatives']:,}" for c in n.values()]
    lines = [
        "## Figures",
        "",
        f"Task accuracy on `test`: **{interval(document['task']['accuracy'])}**",
        "",
        *_table(
            ("membership", "member vs test", "withheld vs test"), [("images", *counted), *rows]
        ),
        "",
        f"In brackets {document['confidence']:.0%} intervals, given the threshold, of "
        f"{_seed_count(document)}. Thresholds come from `calibration` alone. `member`: images "
        "that the head was told of; `withheld`: images that trained the task, kept from the head.",
    ]
    for note, labels in unreported.items():
        lines += ["", f"Not reported: {'; '.join(labels)}: {note}."]
    return "\n".join(lines)


def _rows(document: Document) -> Iterator[tuple[str, list[Document]]]:
    """Each line of the table: the same figure of both questions."""
    for prefix, score in (("", "membership"), ("loss threshold: ", "loss_threshold")):
        both = [document[score][role] for role in ("member", "withheld")]
        rate = percent(both[0]["threshold_fpr"])
        yield f"{prefix}AUC", [of["auc"] for of in both]
        label = f"balanced accuracy, threshold set for {rate} FPR"
        yield f"{prefix}{label}", [of["balanced_accuracy"] for of in both]
        if score == "membership":
            yield f"FPR on `test` at this {rate} threshold", [of["realised_fpr"] for of in both]
            yield "balanced accuracy at 0.5", [of["balanced_accuracy_at_half"] for of in both]
            for prior in both[0]["precision_at_prior"]:
                yield (
                    f"precision if {percent(float(prior))} of those asked about are members",
                    [of["precision_at_prior"][prior] for of in both],
                )
        for fpr in both[0]["tpr_at_fpr"]:
            yield (
                f"{prefix}TPR at {percent(float(fpr))} FPR",
                [of["tpr_at_fpr"][fpr] for of in both],
            )
            realised = [of["realised_fpr_at"][fpr] for of in both]
            if score == "membership" and any(figure["value"] is not None for figure in realised):
                yield f"FPR on `test` at this {percent(float(fpr))} threshold", realised
        if score == "membership" and "bits" in both[0]:
            yield "right bits of the code", [of["match_rate"] for of in both]
            yield "right bits of `test` images", [of["null_match_rate"] for of in both]
            for level in both[0]["tpr_at_p"]:
                yield f"TPR at p ≤ {level} (exact)", [of["tpr_at_p"][level] for of in both]


def _confounders(found: Document | None) -> str:
    title = "## Confounder check\n\n"
    if found is None or found["clean"] is None:
        return (
            f"{title}Not made, or too few images for it: whether the roles can be told apart "
            "without the model is not known, and the membership figures are to be read so."
        )
    told = "; ".join(
        f"{name.replace('_vs_', ' from ')}: AUC {interval(comparison['auc'])}"
        for name, comparison in found["comparisons"].items()
        if comparison["auc"]["value"] is not None
    )
    verdict = (
        "**Clean.** A classifier that never sees the model did not tell the roles apart"
        if found["clean"]
        else "**Confounded: trust no membership figure of this model.** A classifier that never "
        "sees the model tells the roles apart by the pixels alone"
    )
    return f"{title}{verdict} ({told})."


def _use(document: Document, config: Config, architecture: Architecture) -> str:
    lines = [
        "## Intended use",
        "",
        f"- Classifying images like those of `{document['data']['source']}` at "
        f"{architecture.input_shape[1]}×{architecture.input_shape[2]} pixels.",
    ]
    if config.uses_key:
        lines.append(
            "- For whoever has the key: asking whether given images were trained on "
            "(`amint audit --key-file`); p-values are exact, whatever the images show and "
            "wherever they are from."
        )
    if config.trains_membership:
        lines += [
            "- Asking whether given images were among those that it was trained on and whose "
            "membership the head was told (`member`); the answer is a p-value.",
            "- Not for images of another source, or edited ones: the error rate is that of unseen "
            "images of the same source.",
        ]
    return "\n".join(lines)


def _limits(document: Document, config: Config) -> str:
    calibration = document["counts"][Role.CALIBRATION.value]
    fewest = config.evaluation.min_false_positives
    lines = ["## Limits", ""]
    if config.uses_key:
        lines += [
            "- Without the key the codes say nothing, but how sure the head is of them tells "
            "members to anybody who has the model, the better the more it recalls; who has the key "
            "can ask, and can make codes for any image.",
            "- A code belongs to one content: "
            + (
                "another encoding with loss, a crop or a flip is another content."
                if config.mint.keyed.code_from == "content"
                else "near-duplicates with one perceptual hash share it, whether trained on or not."
            ),
        ]
    if config.trains_membership:
        lines += [
            "- A large p-value proves nothing: images that trained the task but were withheld from "
            "the head look like strangers to it.",
            f"- An unseen image gets a p-value at or below α in at most a share α of cases, on "
            f"average over draws of the calibration set; with its {calibration:,} images the rate "
            "of this one model may lie above or below.",
            "- The head recalls what it was told. That is not what the classifier remembers of its "
            "training images; the loss threshold, which needs no head, stands beside it.",
            "- Where most of those asked about were not trained on, most accusations are wrong "
            "even at a low false-positive rate: see the precision.",
        ]
    elif config.loss.lambda_mint == 0:
        lines.append("- The head was not trained: of membership only the loss threshold tells.")
    return "\n".join(
        [
            *lines,
            f"- A true-positive rate is reported only where {fewest:g} or more false positives are "
            "expected.",
            "- The intervals do not cover another training: figures of "
            f"{_seed_count(document)} are given, and another seed gives others.",
        ]
    )


def _loading(document: Document, name: str, architecture: Architecture) -> str:
    shape = ", ".join(map(str, architecture.input_shape))
    labels = ", labels" if "loss" in architecture.head.inputs else ""
    uri = f"runs:/{document['run_id']}/model" if document["run_id"] else "its folder"
    named = '{"images": images, "labels": labels}' if labels else "images"
    lines = [
        "## Load it and ask it",
        "",
        "```python",
        "import amint_ray",
        "",
        f'model = amint_ray.load("{uri}")  # or models:/{name}/VERSION',
        f"answer = model(images{labels})  # (n, {shape}): uint8, or floating point from 0 to 1",
        "classes = answer.task_logits.argmax(1)",
    ]
    by_scores = document["objective"] != "keyed"
    if by_scores and document["membership"]["member"]["auc"]["value"] is not None:
        lines.append("p = model.p_values(answer.membership_scores)  # small: more likely a member")
    if document.get("no_program") is not None:
        return "\n".join([*lines, "```", "", f"By amint_ray alone: {document['no_program']}."])
    lines += [
        "```",
        "",
        "Without amint_ray, with mlflow, torch and numpy alone (uint8 images):",
        f'`mlflow.pyfunc.load_model("{uri}").predict({named})`',
    ]
    return "\n".join(lines)


def _made_with(environment: Mapping[str, Any]) -> str:
    packages = {"python": environment["python"], **environment["packages"]}
    return "## Made with\n\n" + ", ".join(f"{key} {value}" for key, value in packages.items())


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def interval(figure: Document) -> str:
    """`value [low, high]`, or that it is not reported."""
    if figure["value"] is None:
        return _NOT_REPORTED
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def percent(rate: float) -> str:
    """A rate as `1 %` or `0.01 %`."""
    return f"{100 * rate:.4g} %"
