"""What a person sees of an evaluation: the four lines first, then what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amint_ray.tables import interval

_MOST_GROUPS = 30
_LINES = {
    "member": "member, MINT head",
    "withheld": "withheld, MINT head",
    "blind": "member, blind",
    "loss": "member, task loss",
}
_STRANGERS = {
    "noise": "noise",
    "inverted": "test images, inverted",
    "blurred": "test images, blurred",
    "channels": "test images, channels swapped",
    "given": "images of --ood",
}


def print_evaluation(document: Mapping[str, Any], console: Console) -> None:
    """Of one model, or of several and what they come to together."""
    models, combined = document["models"], document["combined"]
    if combined is None:
        _print_model(models[0], document["confidence"], console)
    else:
        title = f"{len(models)} models, mean over seeds"
        console.print(_figures(combined["figures"], combined["lines"], title))
        console.print(_each(models))
        console.print(_groups(combined["groups"], combined["figures"], title))
        for model in models:
            if model["controls"] is not None:
                console.print(_controls(model["controls"], model["figures"], model["model"]))
        _say(console, _about_seeds(document))
    _say(console, {"seconds": f"{document['seconds']['total']:.1f}"})


def _print_model(model: Mapping[str, Any], confidence: float, console: Console) -> None:
    counts = model["counts"]
    title = (
        f"{model['model']}: {counts['member']} member and {counts['withheld']} withheld images, "
        f"each against {counts['test']} of test"
    )
    console.print(_figures(model["figures"], model["lines"], title))
    console.print(_groups(model["groups"], model["figures"], model["model"]))
    if model["controls"] is not None:
        console.print(_controls(model["controls"], model["figures"], model["model"]))
    seeds = model["seeds"]
    lines = {
        "[…, …]": f"{confidence:.0%} intervals given the threshold; one model (train.seed "
        f"{seeds['train']}, split_seed {seeds['split']})",
        "split": _split(model["confounders"]),
    }
    if model["anew"] is not None:
        lines["scored anew"] = _anew(model["anew"])
    lines["MLflow run"] = _run(model)
    _say(console, lines)


def _run(model: Mapping[str, Any]) -> str:
    where = f"artifacts in {model['artifacts']}" if model["recorded"] else "not told"
    return f"{model['run_id']}, {where}"


def _about_seeds(document: Mapping[str, Any]) -> dict[str, str]:
    """What the intervals count, and where each model's part is."""
    models = document["models"]
    splits = len({model["seeds"]["split"] for model in models})
    counted = (
        f"over {len(models)} trainings and {splits} splits"
        if splits > 1
        else f"over {len(models)} trainings on one split; that other images might have been drawn "
        "is not in them, but in those of each model"
    )
    lines = {"[…, …]": f"{document['confidence']:.0%} Student intervals {counted}"}
    for model in models:
        lines[model["model"]] = _run(model)
        if model["anew"] is not None:
            lines[model["model"]] += f"; {_anew(model['anew'])}"
    return lines


def _each(models: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Each model: AUC against test")
    table.add_column("train.seed, split_seed")
    for heading in (*_LINES.values(), "task accuracy"):
        table.add_column(heading, justify="right")
    for model in models:
        table.add_row(
            f"{model['seeds']['train']}, {model['seeds']['split']}",
            *(interval(model["lines"][name]) for name in _LINES),
            interval(model["figures"]["task"]["accuracy"]),
        )
    return table


def _say(console: Console, lines: Mapping[str, str]) -> None:
    for label, text in lines.items():
        console.print(f"{label:<23} {text}", highlight=False, markup=False, soft_wrap=True)


def _figures(figures: Mapping[str, Any], lines: Mapping[str, Any], title: str) -> Table:
    table = Table(title=escape(title))
    table.add_column("")
    table.add_column("AUC", justify="right")
    rates = [fpr for fpr in figures["membership"]["member"]["tpr_at_fpr"] if _stated(figures, fpr)]
    headings = [f"TPR at {float(fpr):.4g} FPR" for fpr in rates]
    for heading in (*headings, "balanced accuracy", "realised FPR"):
        table.add_column(heading, justify="right")
    question = {
        "member": figures["membership"]["member"],
        "withheld": figures["membership"]["withheld"],
        "loss": figures["loss_threshold"]["member"],
    }
    for name, label in _LINES.items():
        cells = [interval(lines[name])]
        if name in question:
            found = question[name]
            cells += [interval(found["tpr_at_fpr"][fpr]) for fpr in rates]
            cells += [interval(found["balanced_accuracy"]), interval(found["realised_fpr"])]
        table.add_row(label, *cells)
    threshold = figures["membership"]["member"]["threshold_fpr"]
    table.add_row("task accuracy on test", interval(figures["task"]["accuracy"]))
    table.caption = f"thresholds from calibration; the last two columns at {threshold:.3g} FPR"
    return table


def _stated(figures: Mapping[str, Any], fpr: str) -> bool:
    """Whether any of the questions has a rate there."""
    found = (figures["membership"]["member"], figures["loss_threshold"]["member"])
    return any(each["tpr_at_fpr"][fpr]["value"] is not None for each in found)


def _groups(found: Mapping[str, Any], figures: Mapping[str, Any], title: str) -> Table:
    """Of many groups those whose false-positive rate is highest."""
    whole = figures["membership"]["member"]["realised_fpr"]
    table = Table(title=escape(f"{title}: by {found['by']}"))
    table.add_column("group", overflow="fold")
    for heading in ("test", "member: AUC", "withheld: AUC", "loss: AUC", "realised FPR", ""):
        table.add_column(heading, justify="right" if heading else "left")
    groups = sorted(
        range(len(found["groups"])),
        key=lambda at: found["groups"][at]["realised_fpr"]["value"] or -1.0,
        reverse=True,
    )[:_MOST_GROUPS]
    for at in sorted(groups):
        group = found["groups"][at]
        table.add_row(
            escape(group["group"]),
            _number(group["images"]["test"]),
            *(interval(group[name]) for name in ("member", "withheld", "loss", "realised_fpr")),
            "apart" if group["apart"] is True else "",
        )
    left = len(found["groups"]) - len(groups)
    table.add_section()
    table.add_row("all", "", "", "", "", interval(whole), "")
    notes = []
    if left:
        notes.append(f"{left} groups with lower rates are in --json alone")
    if any(
        group[name]["value"] is None
        for group in found["groups"]
        for name in ("member", "withheld", "realised_fpr")
    ):
        notes.append("–: not stated, --json says why")
    table.caption = "; ".join(notes) or None
    return table


def _number(value: Any) -> str:
    """A count, or those of several models."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _controls(controls: Mapping[str, Any], figures: Mapping[str, Any], title: str) -> Table:
    table = Table(title=escape(f"{title}: controls"))
    table.add_column("control", overflow="fold", min_width=50)
    table.add_column("figure", overflow="fold", max_width=32)
    table.add_column("should be", overflow="fold")
    plain = controls["plain"]
    if "note" in plain:
        table.add_row("λ₂ = 0", plain["note"], "")
    else:
        table.add_row(
            "task accuracy, this model less λ₂ = 0",
            interval(plain["difference"]),
            "near 0",
        )
        table.add_row("    λ₂ = 0 alone", interval(plain["plain_accuracy"]), "")
    shuffled = controls["shuffled"]
    if "note" in shuffled:
        table.add_row("head told shuffled roles", shuffled["note"], "")
    else:
        table.add_row(
            "head told shuffled roles: AUC, images not shown",
            _judged(shuffled["auc"], shuffled["chance"]),
            "0.5",
        )
        table.add_row(
            "    images shown as member, against test",
            interval(shuffled["told"]),
            "below that of member",
        )
    blind = controls["blind"]
    for name in ("member", "withheld"):
        table.add_row(f"blind classifier: {name} vs test, AUC", interval(blind[name]), "0.5")
    _add_duplicates(table, controls["near_duplicates"])
    _add_strangers(table, controls["strangers"], figures)
    return table


def _judged(figure: Mapping[str, Any], chance: bool | None) -> str:
    return interval(figure) + (" NOT CHANCE" if chance is False else "")


def _add_duplicates(table: Table, found: Mapping[str, Any]) -> None:
    pairs = f"{sum(found['pairs'].values()):,} pairs, {found['test_near_trained']:,} of test near D"
    table.add_row(f"near-duplicates across roles (≤ {found['distance']} bits)", pairs, "few")
    if found["pairs"]:
        for name, area in found["without"].items():
            table.add_row(f"    {name} vs test without these, AUC", interval(area), "as with them")


def _add_strangers(table: Table, found: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    if "note" in found:
        table.add_row("strangers", found["note"], "")
        return
    promised = figures["membership"]["member"]["threshold_fpr"]
    for kind, rate in found.items():
        table.add_row(
            f"realised FPR on {_STRANGERS[kind]} ({rate['n']:,})",
            interval(rate["realised_fpr"]),
            f"≤ {promised:.3g}; nothing promises it",
        )


def _split(confounders: Mapping[str, Any] | None) -> str:
    if confounders is None or confounders["clean"] is None:
        return "no confounder check was made"
    if confounders["clean"]:
        return "clean: no classifier tells the roles apart without the model"
    return "CONFOUNDED: trust no membership figure"


def _anew(found: Mapping[str, Any]) -> str:
    largest = found["largest"]["mint_logit"]
    if not found["different"] and not found["missing"]:
        return f"all {found['compared']:,} agree with the saved ones (largest apart {largest:.2g})"
    return (
        f"{found['different']:,} of {found['compared']:,} differ from the saved ones (largest "
        f"apart {largest:.2g}), {found['missing']:,} are missing"
    )
