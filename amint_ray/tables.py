"""What a person sees of a result: tables and lines on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_document(
    document: Any,
    show: Callable[[Any, Console], None],
    stdout: TextIO,
    *,
    as_json: bool,
) -> None:
    """A result, as JSON or for a person.

    JSON has no word for a number that is not finite: it is null there.
    """
    if as_json:
        json.dump(_finite(document), stdout, indent=2, allow_nan=False)
        stdout.write("\n")
    else:
        show(document, Console(file=stdout, width=None if stdout.isatty() else 120))
    stdout.flush()  # nobody closes it: something that was caught may hold this frame for long


def _finite(part: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(part, Mapping):
        return {key: _finite(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_finite(value) for value in part]
    return None if isinstance(part, float) and not math.isfinite(part) else part


def print_result(document: Mapping[str, Any], console: Console) -> None:
    """The run's figures, its record, and how to load the model."""
    counts = document["counts"]
    table = Table(
        title=f"{document['recipe']}: the MINT head, against {counts['test']} test images"
    )
    for heading in ("", "member vs test", "withheld vs test"):
        table.add_column(heading, justify="left" if not heading else "right")
    member, withheld = (document["membership"][role] for role in ("member", "withheld"))
    loss = document["loss_threshold"]
    threshold = f"{member['threshold_fpr']:.0%}"
    table.add_row("images", str(counts["member"]), str(counts["withheld"]))
    rows = {
        "AUC": "auc",
        f"balanced accuracy, threshold calibrated to {threshold} FPR": "balanced_accuracy",
        "balanced accuracy at 0.5": "balanced_accuracy_at_half",
    }
    for label, key in rows.items():
        table.add_row(label, interval(member[key]), interval(withheld[key]))
    for fpr in member["tpr_at_fpr"]:
        cells = [interval(question["tpr_at_fpr"][fpr]) for question in (member, withheld)]
        if any(cell != _NO_VALUE for cell in cells):
            table.add_row(f"TPR at {float(fpr):.4g} FPR (threshold from calibration)", *cells)
            realised = [interval(q["realised_fpr_at"][fpr]) for q in (member, withheld)]
            table.add_row("    realised FPR on test", *realised)
    for row in _code_rows(member, withheld):
        table.add_row(*row)
    table.add_row(
        "for comparison: loss threshold, AUC",
        interval(loss["member"]["auc"]),
        interval(loss["withheld"]["auc"]),
    )
    console.print(table)
    lines = {
        "task accuracy on test": interval(document["task"]["accuracy"]),
        "[…, …]": f"{document['confidence']:.0%} intervals given the threshold; one training seed",
        "images left out": _left_out(document),
        "confounder check": _confounders(document["confounders"]),
        **_recorded(document),
        "joint step": _flops(document["flops"]),
        "seconds": "  ".join(f"{name} {value:.1f}" for name, value in document["seconds"].items()),
    }
    for label, text in lines.items():
        console.print(f"{label:<23} {text}", highlight=False, markup=False, soft_wrap=True)


def _code_rows(
    member: Mapping[str, Any], withheld: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """What a head that says codes adds; nothing of another."""
    if "bits" not in member:
        return
    both = (member, withheld)
    label = f"right bits of the code, of {member['bits']}"
    yield label, interval(member["match_rate"]), interval(withheld["match_rate"])
    null = interval(member["null_match_rate"])
    yield "    of test images, which is ½ but for chance", null, null
    for level in member["tpr_at_p"]:
        cells = tuple(interval(of["tpr_at_p"][level]) for of in both)
        if any(cell != _NO_VALUE for cell in cells):
            yield f"TPR at p ≤ {level}, an exact rate", cells[0], cells[1]
    known = member["collection"]
    needed = [of["collection"]["images"] for of in both]
    cells = tuple(_NO_VALUE if images is None else f"{images:,}" for images in needed)
    yield f"images that convict together at p ≤ {known['p']:g}", cells[0], cells[1]


def _recorded(document: Mapping[str, Any]) -> dict[str, str]:
    """What there is of run and model, and where."""
    lines = {
        "MLflow run": f"{document['run_id']}  ({document['tracking_uri']})",
        "registered model": document["model_uri"],
        "load it": f"python -c 'import amint_ray; model = {document['load']}'",
        "not sent yet": f"amint sync {document['waiting']}",
    }
    keys = ("run_id", "model_uri", "load", "waiting")
    present = zip(lines.items(), keys, strict=True)
    return {label: line for (label, line), key in present if document[key] is not None}


def _left_out(document: Mapping[str, Any]) -> str:
    """How many images could not be used."""
    lost_images = document["lost"]
    later = f", {lost_images:,} of them in mid-run" if lost_images else ""
    listed = " (quarantine.parquet)" if document["quarantined"] else ""
    return f"{document['quarantined']:,}{later}{listed}"


def _confounders(found: Mapping[str, Any] | None) -> str:
    """What a classifier that never sees the model makes of the split."""
    if found is None or found["clean"] is None:
        return "not made"
    aucs = ", ".join(
        f"{name.replace('_vs_', ' from ')} {interval(comparison['auc'])}"
        for name, comparison in found["comparisons"].items()
    )
    if found["clean"]:
        return f"clean: without the model, AUC {aucs}"
    return f"CONFOUNDED, trust no membership figure: without the model, AUC {aucs}"


def _flops(flops: Mapping[str, float]) -> str:
    """What the step cost, and how much of that was done in a second."""
    return (
        f"{flops['joint_step'] / 1e9:.3g} GFLOP, {flops['ratio']:.2f} times the audited-only "
        f"step's; {flops['per_second'] / 1e9:.3g} GFLOP/s"
    )


def print_taps(document: Mapping[str, Any], console: Console) -> None:
    """What can be tapped in a backbone."""
    channels, height, width = document["input_shape"]
    table = Table(title=f"{document['backbone']} on {channels}×{height}×{width}")
    for heading in ("module", "class", "output", "order", "depth", "placement"):
        table.add_column(heading, justify="right" if heading == "depth" else "left")
    for module in document["modules"]:
        shape = "×".join(map(str, module["shape"]))
        prefix = module["prefix_tokens"]
        table.add_row(
            module["name"],
            module["class"],
            shape + (f" ({prefix} class or register)" if prefix else ""),
            module["layout"],
            f"{module['depth']:.1%}",
            ", ".join(module["placements"]),
        )
    console.print(table)
    for name, placement in document["placements"].items():
        leaves = "E leaves there" if placement["early_exit"] else "E cannot leave there"
        console.print(
            f"{name:<7} {', '.join(placement['taps'])}: {leaves}; with "
            f"{document['external_ratio']:g} of E per image of D the joint step costs "
            f"{placement['flop_ratio']:.2f} times the audited-only step's FLOPs",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def print_data(document: Mapping[str, Any], console: Console) -> None:
    """What is in a source."""
    roles, bad = document["roles"], document["quarantined"]
    table = Table(title=document["source"])
    table.add_column("role")
    table.add_column("images", justify="right")
    for role, images in roles.items():
        table.add_row(role, f"{images:,}")
    console.print(table)
    width, height = document["sizes"]["width"], document["sizes"]["height"]
    labels = sorted(document["labels"].values())
    gib = document["decoded_bytes"] / 2**30
    lines = {
        "path": document["path"] or "–",
        "images": f"{document['count']:,}, of them {document['official_test']:,} in the official "
        "test split",
        "classes": f"{len(document['classes']):,}: {_shortened(document['classes'])}; "
        f"{labels[0]:,} to {labels[-1]:,} images each",
        "pixels": f"{width['min']}×{height['min']} to {width['max']}×{height['max']}, median "
        f"{width['median']}×{height['median']}",
        "exact duplicates": f"{document['duplicates']:,}",
        "near duplicates": "not looked for (data.near_duplicates=4)"
        if document["near_duplicates"] is None
        else f"{document['near_duplicates']:,} share a role with another image",
        "quarantined": f"{len(bad):,}",
        "a run would be": f"{document['mode']} ({gib:.2f} GiB decoded)",
        "contact sheet": document["contact_sheet"] or "not drawn",
    }
    for label, text in lines.items():
        console.print(f"{label:<23} {text}", highlight=False, markup=False, soft_wrap=True)
    for reason, names in _by_reason(bad):
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        console.print(
            f"  {reason}: {', '.join(names[:3])}{more}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def print_prepared(document: Mapping[str, Any], console: Console) -> None:
    """What was written, and how to go on."""
    bad = document["quarantined"]
    lines = {
        "images": f"{document['count']:,} in {document['files']} files",
        "there already": f"{document['resumed']} of the files",
        "quarantined": f"{len(bad):,}",
        "train on it": "amint train RECIPE data.source=parquet "
        f"data.path={document['destination']}",
        "seconds": f"{document['seconds']:.1f}",
    }
    for label, text in lines.items():
        console.print(f"{label:<23} {text}", highlight=False, markup=False, soft_wrap=True)
    for reason, names in _by_reason(bad):
        console.print(f"  {reason}: {len(names):,}", highlight=False, markup=False, soft_wrap=True)


def print_job(document: Mapping[str, Any], console: Console) -> None:
    """What became of a Ray job."""
    code = document["exit_code"]
    state = document["status"] + ("" if code is None else f", exit code {code}")
    text = f"job {document['job_id']}: {state}: {document['message']}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_checks(document: Mapping[str, Any], console: Console) -> None:
    """One line a check."""
    checks = document["checks"]
    widths = [max(len(check[key]) for check in checks) for key in ("name", "where")]
    for check in checks:
        name, where = check["name"].ljust(widths[0]), check["where"].ljust(widths[1])
        state = "ok   " if check["ok"] else "WRONG"
        console.print(
            f"{state}  {name}  {where}  {check['said']}",
            style=None if check["ok"] else "bold red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def print_versions(versions: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Registered versions with their figures."""
    if not versions:
        console.print("no model of amint_ray is registered here", highlight=False)
        return
    figures = {
        "task accuracy": "task_accuracy",
        "member: AUC": "member_auc",
        "TPR at 1 % FPR": "member_tpr_at_fpr_1pct",
        "withheld: AUC": "withheld_auc",
    }
    clean = {True: "clean", False: "CONFOUNDED", None: "not known"}
    for name in dict.fromkeys(version["name"] for version in versions):
        table = Table(title=escape(name), title_justify="left")
        for heading in ("version", *figures, "confounders", "aliases"):
            right = heading == "version" or heading in figures
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        lines = []
        for version in versions:
            if version["name"] != name:
                continue
            table.add_row(
                str(version["version"]),
                *(
                    interval(version["figures"][key]).replace(" ", "\n", 1)
                    for key in figures.values()
                ),
                clean[version["confounders_clean"]],
                ", ".join(version["aliases"]),
            )
            ready = "" if version["status"] == "READY" else f", {version['status']}"
            lines.append(
                f"{version['version']:>9}  run {version['run_id']}, {version['registered']}{ready}"
            )
        console.print(table)
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_promotion(document: Mapping[str, Any], console: Console) -> None:
    """Whether an alias was moved, and why not."""
    what = f"{document['name']} version {document['version']}"
    before = document["previous"]
    if document["promoted"]:
        lines = [f"{what} is {document['alias']}"]
        if before not in (None, document["version"]):
            lines[0] += f" now; version {before} was"
    else:
        held = "no version is" if before is None else f"version {before} still is"
        lines = [f"{what} is not promoted: {held} {document['alias']}"]
    lines += [f"  {reason}" for reason in document["reasons"]]
    lines += [f"  note: {note}" for note in document["notes"]]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_reproduced(document: Mapping[str, Any], console: Console) -> None:
    """Every metric of both runs and how far they are apart."""
    table = Table(title=f"{document['run_id']}, trained again as {document['reproduced_run_id']}")
    for heading in ("metric", "old", "new", "difference", ""):
        table.add_column(heading, justify="left" if heading in ("metric", "") else "right")
    inside = {None: "", True: "within the interval", False: "OUTSIDE the interval"}
    for name, metric in document["metrics"].items():
        values = (metric[key] for key in ("old", "new", "difference"))
        cells = (_NO_VALUE if value is None else f"{value:.6g}" for value in values)
        same = metric["difference"] == 0
        table.add_row(name, *cells, "equal" if same else inside[metric["inside_interval"]])
    console.print(table)
    told = {True: "the same", False: "others", None: "not known"}
    verdicts = {
        "equal": "equal, to the last bit",
        "inside": "not equal; every figure is within the old one's interval",
        "outside": "NOT reproduced: a figure is outside the old one's interval",
    }
    lines = {
        "verdict": verdicts[document["verdict"]],
        "code": told[document["same_commit"]],
        "packages": told[document["same_versions"]],
        "images and roles": told[document["same_data"]],
        "workers": f"{document['workers']['old'] or 'not known'}; now {document['workers']['new']}",
    }
    if document["model_uri"] is not None:
        lines["registered model"] = document["model_uri"]
    if document["waiting"] is not None:
        lines["not sent yet"] = f"amint sync {document['waiting']}"
    for label, text in lines.items():
        console.print(f"{label:<23} {text}", highlight=False, markup=False, soft_wrap=True)


_REASONS_SHOWN = 10


def _by_reason(bad: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """The most frequent reasons, each with the names."""
    names: dict[str, list[str]] = {}
    for row in bad:
        names.setdefault(row["reason"], []).append(row["sample_id"])
    return sorted(names.items(), key=lambda item: -len(item[1]))[:_REASONS_SHOWN]


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:8])}, … {names[-1]}"


_NO_VALUE = "–"


def interval(figure: Mapping[str, Any]) -> str:
    """`value [low, high]`, or a dash."""
    if figure["value"] is None:
        return _NO_VALUE
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def print_synced(document: Mapping[str, Any], console: Console) -> None:
    """What became of each run's records."""
    if not document["runs"]:
        console.print("nothing waits")
        return
    table = Table()
    for heading in ("run", "MLflow run", "sent", "left", ""):
        table.add_column(heading, overflow="fold")
    for run in document["runs"]:
        what = run["problem"] or ", ".join(run["models"])
        table.add_row(
            run["run_name"], run["run_id"] or "", str(run["sent"]), str(run["left"]), what
        )
    console.print(table)
