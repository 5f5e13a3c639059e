"""The model card: what it states is what was measured, and it says what it cannot show."""

from __future__ import annotations

import re
from typing import Any

from tracking.documents import CLEAN, COUNTS, a_document

from amint_ray.config.load import load_config
from amint_ray.config.schema import Config
from amint_ray.contracts import Role
from amint_ray.model.joint import plan_architecture
from amint_ray.tracking.card import LONGEST_DESCRIPTION, model_card, shortened
from amint_ray.tracking.run_log import environment

HEADINGS = [
    *("Data", "Figures", "Confounder check", "Intended use", "Limits"),
    *("Load it and ask it", "Made with"),
]


def card_of(document: dict[str, Any], config: Config | None = None) -> str:
    config = config or load_config("digits")
    return model_card(
        document,
        name="amint-digits",
        config=config,
        architecture=plan_architecture(config, 10),
        environment=environment(),
    )


def row(card: str, label: str) -> list[str]:
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def shown(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def test_every_figure_stands_with_its_interval_in_its_column() -> None:
    document = a_document()
    card = card_of(document)
    assert f"**{shown(document['task']['accuracy'])}**" in card
    for prefix, score in (("", "membership"), ("loss threshold: ", "loss_threshold")):
        both = [document[score][role] for role in ("member", "withheld")]
        assert row(card, f"{prefix}AUC") == [shown(of["auc"]) for of in both]
        assert row(card, f"{prefix}TPR at 1 % FPR") == [
            shown(of["tpr_at_fpr"]["0.01"]) for of in both
        ]
        assert row(card, f"{prefix}balanced accuracy, threshold set for 5 % FPR") == [
            shown(of["balanced_accuracy"]) for of in both
        ]
    assert row(card, "precision if 1 % of those asked about are members") == [
        shown(document["membership"][role]["precision_at_prior"]["0.01"])
        for role in ("member", "withheld")
    ]
    assert row(card, "images") == ["300 vs 1,100", "80 vs 1,100"]


def test_what_is_not_reported_has_no_row_but_its_reason() -> None:
    card = card_of(a_document())
    assert "| TPR at 0.1 % FPR |" not in card
    line = next(line for line in card.splitlines() if line.startswith("Not reported:"))
    assert "TPR at 0.1 % FPR" in line and "1.1 false positives expected among 1100" in line


def test_a_figure_of_one_column_alone_is_called_not_reported_in_the_other() -> None:
    document = a_document()
    document["membership"]["withheld"]["auc"] = {
        **dict.fromkeys(("value", "low", "high")),
        "note": "no withheld images",
    }
    card = card_of(document)
    assert row(card, "AUC")[1] == "not reported"
    assert "Not reported: AUC: no withheld images." in card


def test_headings_data_model_and_packages() -> None:
    card = card_of(a_document())
    assert card.startswith("# amint-digits\n")
    assert re.findall("^## (.*)$", card, re.MULTILINE) == HEADINGS
    for part in (
        "Recipe: `digits`, configuration `cccccccccccccccc`",
        "`convnext_atto`, 1×8×8 pixels, 10 classes, 40 epochs",
        "`conv`, reads `stages.1`, `stages.2`",
        "one training run",
        f"`{'f' * 64}`",
        "2 images could not be used; 3 are exact copies",
        f"torch {environment()['packages']['torch']}",
    ):
        assert part in card
    for role, images in COUNTS.items():
        assert row(card, role)[0] == f"{images:,}"
    assert row(card, "withheld")[1:] == ["yes", "never shown"]


def test_limits_say_what_a_p_value_cannot_show() -> None:
    limits = card_of(a_document()).split("## Limits")[1].split("## ")[0]
    for part in ("A large p-value proves nothing", "look like strangers", "its 200 images", "seed"):
        assert part in limits


def test_the_verdict_on_confounders() -> None:
    check = "## Confounder check\n\n"
    assert f"{check}**Clean.**" in card_of(a_document())
    assert "member from test: AUC 0.510 [0.460, 0.560]" in card_of(a_document())
    found = card_of(a_document(confounders={**CLEAN, "clean": False}))
    assert f"{check}**Confounded: trust no membership figure of this model.**" in found
    for none in (None, {"clean": None, "comparisons": {}}):
        assert f"{check}Not made" in card_of(a_document(confounders=none))


def test_a_model_without_its_head_promises_no_p_values() -> None:
    card = card_of(a_document(head_trained=False), load_config("digits", ["loss.lambda_mint=0"]))
    assert "MINT head: not trained" in card
    assert "p_values" not in card and "p-value" not in card
    assert "cannot be asked about its training set" in card
    assert [row(card, role.value)[-1] for role in Role] == ["no head was trained"] * len(Role)
    assert row(card, "loss threshold: AUC")[0].startswith("0.")
    assert "| AUC |" not in card


def test_a_head_that_reads_the_loss_is_asked_with_labels() -> None:
    assert "model(images, labels)" in card_of(
        a_document(), load_config("digits", ["mint.inputs=[loss]"])
    )


def test_a_card_fits_into_mlflows_database() -> None:
    card = card_of(a_document())
    assert shortened(card) == card, "the usual card needs no shortening"
    for longest in (4000, 2500, 1000, 500):
        text = shortened(card, longest)
        assert len(text) <= longest
        assert text.endswith("the whole card is `model_card.md` among the run's artifacts.*\n")
        body = text.rsplit("\n\n", 1)[0]
        assert card.startswith(body)
        if longest > 1000:  # whole sections
            assert card[len(body) :].lstrip("\n").startswith("## ")
    assert len(shortened("x" * 9000)) == LONGEST_DESCRIPTION


def test_a_head_that_says_codes_is_asked_with_a_key() -> None:
    config = load_config("digits", ["mint.objective=keyed", f"mint.keyed.fingerprint={'ab' * 32}"])
    card = card_of({**a_document(), "objective": "keyed"}, config)
    assert "a secret code of 32 bits for each image of D (learned head)" in card
    assert f"key with fingerprint `{'ab' * 32}`" in card
    assert "`amint audit --key-file`" in card
    assert "model.p_values" not in card
    assert "the answer is a p-value" not in card
