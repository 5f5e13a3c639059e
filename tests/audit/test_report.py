"""The audit's report: what it says, that nothing in it runs or is fetched, and what lies beside."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit.audits import HOSTILE, document, figure, image, png, unreadable
from audit.page import Page, read

from amint_ray.audit import wording
from amint_ray.audit.report import (
    PROBLEM_ROWS,
    TABLE_ROWS,
    THUMBNAILS,
    as_json,
    extremes,
    render,
    write_report,
)

PLAIN = {
    *("html", "head", "meta", "title", "style", "body", "header", "main"),
    *("section", "div", "span", "h1", "h2", "h3", "p", "ul"),
    *("ol", "li", "dl", "dt", "dd", "b", "bdi", "br"),
    *("code", "pre", "time", "figure", "figcaption", "img", "table", "caption"),
    *("thead", "tbody", "tr", "th", "td", "svg", "line", "rect"),
    *("circle", "text"),
}
"""Elements that fetch and run nothing, but for an image's source."""
DIGESTS = {"audit.json": "d" * 64}


def pictures(audit: dict[str, Any], width: int = 8) -> dict[str, bytes]:
    return {row["image"]: png(width) for part in extremes(audit["images"]) for row in part}


def page_of(audit: dict[str, Any], digests: dict[str, str] = DIGESTS) -> Page:
    return read(render(audit, pictures(audit), digests=digests))


def nothing_runs_or_is_fetched(page: Page) -> None:
    assert page.errors == []
    (policy,) = [e for e in page.all("meta") if "http-equiv" in e.attributes]
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")
    assert {element.tag for element in page.elements} <= PLAIN
    for element in page.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), element
            assert name not in {"href", "srcset", "action", "data", "style", "background"}, element
            assert name != "src" or value.startswith("data:image/png;base64,"), element
    (style,) = page.all("style")
    assert not re.search(r"url\(|@import|expression|src:", style.text)


def reads_well_aloud(page: Page) -> None:
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en-GB"
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        assert element.attributes.get("aria-labelledby", ids[0]) in ids
        if element.tag == "img":
            assert element.attributes["alt"]
        if element.tag == "svg":
            assert {"aria-hidden", "aria-label"} & {*element.attributes}
        if element.tag == "th":
            assert element.attributes["scope"] in {"row", "col"}
    assert len(page.all("caption")) == len(page.all("table"))
    levels = [int(e.tag[1]) for e in page.elements if e.tag in {"h1", "h2", "h3"}]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


SAID = {
    "member": "The collection contains images that the model was trained on.",
    "not_member": "No sign that the collection contains images that the model was trained on; a "
    "collection of this size that consisted of training images would have been noticed with "
    "probability 0.95.",
    "no_verdict": "This audit gives no verdict, because the collection has 29 different images and "
    "48 are needed, and because the suspects are unlike the calibration images.",
}


@pytest.mark.parametrize("verdict", SAID)
def test_each_verdict_is_said_in_plain_words(verdict: str) -> None:
    audit = document(verdict)
    page = page_of(audit)
    nothing_runs_or_is_fetched(page)
    reads_well_aloud(page)
    assert page.by_id("verdict").text == SAID[verdict]
    assert "Nobody has looked. What would help: look at it." in page.text  # a reservation
    assert all(words not in page.text for other, words in SAID.items() if other != verdict)
    for part in ("What it means", "What it does not mean", "Can show:", "Cannot show:"):
        assert part in page.text
    box = next(e for e in page.all("section") if verdict in e.attributes.get("class", ""))
    if verdict == "no_verdict":
        assert "What would help: more images of the same collection." in page.text
        assert "p\u00a0=" not in box.text and "%" not in box.text, "figures that are no finding"
        alone = page_of(audit | {"reasons": audit["reasons"][1:]})
        assert alone.by_id("verdict").text.endswith(
            "verdict, because the suspects are unlike the calibration images."
        )
    else:
        assert "Why there is no verdict" not in page.text
        assert wording.p_text(audit["p_value"]) in box.text


def leaves(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(part, dict | list):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from leaves(value, (*path, key))
    else:
        yield path, part


LINES = len(wording.GLOBALS["line_words"])
WORDS = {
    "verdict": "not_member",
    "made": "2025-01-02T03:04:05Z",
    "labels": "own",
    "decision": "undecided",
    "by": "outputs",
}


def test_no_part_of_the_document_is_left_out() -> None:
    """Whatever is changed, by its path, changes the page."""
    none = document("no_verdict", images=2)
    none["evidence"]["outputs"] = {
        "available": False,
        "why_not": "no outputs are stored",
        "shows": "That the model knows an image.",
        "cannot_show": "Why.",
    }
    none["images"][0] |= {"duplicate_of": "folder/same.png"}
    none["images"][1] = {"image": "torn.png", "p_value": None, "problem": "cannot be read"}
    for audit in (none, document("member", images=1)):
        before = render(audit, {}, digests=DIGESTS)
        for path, value in leaves(audit):
            if value is None:
                continue
            changed = copy.deepcopy(audit)
            part: Any = changed
            for key in path[:-1]:
                part = part[key]
            if isinstance(value, bool):
                part[path[-1]] = not value
            elif isinstance(value, str):
                part[path[-1]] = WORDS.get(path[-1], "changed")
            else:
                part[path[-1]] = value * 2 + 1
            if part.get("available") and "method" not in part:
                part |= audit["evidence"]["head"]
            if path[-1] == "available" and not part["available"]:
                part["why_not"] = "it was lost"
            assert render(changed, {}, digests=DIGESTS) != before, path


def test_a_file_name_with_html_in_it_is_text(tmp_path: Path) -> None:
    audit = document("no_verdict", images=12)
    for row in audit["images"]:
        row["class_name"] = HOSTILE
    audit["images"][1]["duplicate_of"] = HOSTILE
    audit["images"].append(unreadable(HOSTILE) | {"problem": f"cannot be read: {HOSTILE}"})
    audit["suspects"]["source"] = audit["model"]["uri"] = audit["version"] = HOSTILE
    audit["reasons"][0] |= {"code": HOSTILE, "text": HOSTILE, "help": HOSTILE}
    for kind in audit["evidence"].values():
        kind |= {"method": HOSTILE, "shows": HOSTILE, "cannot_show": HOSTILE}
    page = page_of(audit, {"audit.json": HOSTILE})
    nothing_runs_or_is_fetched(page)
    assert page.text.count(HOSTILE) >= 25
    assert {f"Suspect image {HOSTILE}"} <= {e.attributes["alt"] for e in page.all("img")}

    unseen = "a\u202egnp.exe\n\x00\udcff\x1b.png"
    audit = document(images=2)
    audit["images"][0]["image"] = audit["suspects"]["source"] = unseen
    path = write_report(audit, tmp_path, {unseen: png()})
    page = read(path.read_text("utf-8"))
    nothing_runs_or_is_fetched(page)
    assert "a\\u202egnp.exe\\x0a\\x00\\udcff\\x1b.png" in page.text
    assert not set(unseen) - {*map(chr, range(32, 127)), "\n"} & {*page.text}
    assert json.loads((tmp_path / "audit.json").read_text())["images"][0]["image"] == unseen


def test_what_is_not_there_is_said() -> None:
    audit = document("not_member", images=12)
    audit["evidence"]["head"] = {"available": False, "why_not": "its head was not trained"}
    audit["suspects"]["labelled"] = 0
    audit["evidence"]["outputs"]["labels"] = "prediction"
    audit["evidence"]["outputs"]["share"] = figure(None) | {"note": "too few members are known"}
    audit["lines"] |= {"member": None, "blind": figure(None) | {"note": "it was not asked"}}
    audit["power"] = {"target": 0.95, "of": "member", "member": None, "withheld": 48}
    # The least that an audit may say: an AUC alone, nothing of classes, no level of its intervals.
    audit["evidence"]["outputs"]["auc"] = figure(0.777, 0.7, 0.8)
    for key in ("classes", "confidence"):
        del audit[key]
    audit |= {"unlike": None, "precision": None, "share": figure(None) | {"of": None, "by": None}}
    audit["images"][0]["image"] = "0.png"
    for row in audit["images"]:
        row |= {"label": None, "head_score": math.nan, "p_head": None}
    page = page_of(audit)
    nothing_runs_or_is_fetched(page)
    reads_well_aloud(page)
    for said in (
        "Not available: its head was not trained",
        "consisted of training images that the head was told of would have been noticed",
        "Of two kinds of evidence only one was looked at.",
        "Some trained the classifier and some trained nothing: among them",
        "the model's predictions, as the suspects bear none",
        "not known: too few members are known",
        "not known: it was not asked",
        "This was not tested.",
        "AUC0.777 (0.7 to 0.8)",
        "in brackets 95\u00a0% intervals",
    ):
        assert said in page.text, said
    for never in ("None", "nan", "Undefined", "{{", "The head's score of a suspect was ranked"):
        assert never not in page.text, never
    assert len(page.all("figure")) == 1 + 10, "one histogram, and the thumbnails"


@pytest.mark.parametrize("images", [0, 1, 2, 9])
def test_few_images_or_none(images: int) -> None:
    audit = document("no_verdict", images=images)
    page = page_of(audit)
    nothing_runs_or_is_fetched(page)
    reads_well_aloud(page)
    judged = sum(row["p_value"] is not None for row in audit["images"])
    assert len(page.all("tr")) - len(page.all("thead")) - LINES - 5 == judged
    assert "too few for a picture" in page.text
    assert ("no image has a p-value" in page.text) == (images == 0)
    torn = [unreadable(f"{i}.png") for i in range(PROBLEM_ROWS + 5)]
    page = page_of(audit | {"images": torn})
    assert f"These are {PROBLEM_ROWS} of {len(torn)}; all of them are in audit.json" in page.text
    assert len(page.all("img")) == 0


def test_ten_thousand_images(tmp_path: Path) -> None:
    audit = document(images=10_000)
    rows = pa.Table.from_pylist(audit["images"])
    begun = time.perf_counter()
    path = write_report(audit, tmp_path, pictures(audit), rows=rows.to_batches(max_chunksize=3000))
    assert time.perf_counter() - begun < 20
    assert path == tmp_path / "report.html" and path.stat().st_size < 200_000
    page = read(path.read_text("utf-8"))
    nothing_runs_or_is_fetched(page)
    assert len(page.all("img")) == 2 * THUMBNAILS
    assert len(page.all("tr")) == TABLE_ROWS + len(page.all("thead")) + LINES + 5
    assert "The 100\u00a0images most likely to be members, of 10,000; all of" in page.text
    assert "all of them are in images.parquet" in page.text
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "audit.json",
        "images.parquet",
        "report.html",
    ]
    assert json.loads((tmp_path / "audit.json").read_text()) == audit
    assert pq.read_table(tmp_path / "images.parquet").equals(rows)
    for name in ("audit.json", "images.parquet"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in page.text
    # The table is by p-value, and where they tie by the head's score.
    shown = [e.text.split(" ")[0] for e in page.all("th") if e.attributes["scope"] == "row"]
    judged = [row for row in audit["images"] if row["p_value"] is not None]
    judged.sort(key=lambda row: (row["p_value"], -row["head_score"]))
    assert shown[LINES : LINES + TABLE_ROWS] == [
        row["image"].split(" ")[0] for row in judged[:TABLE_ROWS]
    ]


def test_extremes_hold_no_copy_and_no_image_twice() -> None:
    rows = [image(i) | {"p_value": (i + 1) / 50} for i in range(40)]
    rows[1]["duplicate_of"] = rows[0]["image"]
    rows[39] = unreadable("torn.png")
    most, least = extremes(rows)
    assert [row["image"] for row in most] == [rows[i]["image"] for i in (0, *range(2, 13))]
    assert [row["image"] for row in least] == [rows[i]["image"] for i in range(38, 26, -1)]
    few = [image(i) for i in range(3)]
    most, least = extremes(few)
    assert sorted(row["image"] for row in (*most, *least)) == sorted(row["image"] for row in few)


def test_thumbnails_are_png_and_only_small_ones_are_enlarged_pixel_by_pixel() -> None:
    audit = document(images=2)
    names = [row["image"] for row in audit["images"]]
    page = read(render(audit, dict(zip(names, (png(8), png(200)), strict=True)), digests={}))
    by_alt = {e.attributes["alt"].split()[-1]: e.attributes.get("class") for e in page.all("img")}
    assert [by_alt[name.split()[-1]] for name in names] == ["small", None]
    with pytest.raises(ValueError, match="no PNG"):
        render(audit, {names[0]: b"<svg onload=alert(1)>" + bytes(99)}, digests={})


def test_histograms_count_each_different_image_once() -> None:
    audit = document(images=0)
    audit["images"] = [
        image(i) | {"p_head": (i + 1) / 20, "p_outputs": None, "p_value": 0.5} for i in range(20)
    ]
    audit["suspects"]["images"] = 20
    page = page_of(audit)
    (chart,) = [e for e in page.all("svg") if e.attributes.get("role") == "img"]
    assert "2 of 20 images are in the lowest of 10 bins, where 2 would" in str(chart.attributes)
    bars = [e for e in page.all("rect") if e.attributes["class"] == "bar"]
    assert {bar.attributes["height"] for bar in bars} == {"120.0"} and len(bars) == 10
    audit["images"][19]["duplicate_of"] = audit["images"][0]["image"]
    assert "of 19 images" in render(audit, {}, digests={})
    # The utmost of many images are no sample of them.
    audit["suspects"]["images"] = 21
    assert "Histogram of p-values" not in render(audit, {}, digests={})


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    found = json.loads(as_json({"a": [math.nan, {"b": math.inf, "c": 1.5}], "d": (True, None)}))
    assert found == {"a": [None, {"b": None, "c": 1.5}], "d": [True, None]}
    with pytest.raises(ValueError, match="no batch"):
        write_report(document(), tmp_path, {}, rows=[])
    assert not (tmp_path / "report.html").exists()


def test_the_command_repeats_the_audit() -> None:
    audit = document()
    audit["suspects"]["source"] = "/data/it's here"
    (command,) = page_of(audit).all("pre")
    assert command.text == (
        "amint audit models:/amint-digits/1 '/data/it'\"'\"'s here' "
        "--prior=0.11 --fdr=0.052 audit.alpha=0.013 audit.labels=False"
    )


def test_numbers_and_dates_as_printed() -> None:
    p = [wording.p_text(each) for each in (0.5, 0.00123, 9.87e-5, 1e-9, 0.0, None)]
    assert p[:2] == ["0.5", "0.00123"]
    assert p[2:4] == ["9.9\u00a0×\u00a010⁻⁵", "1.0\u00a0×\u00a010⁻⁹"]
    assert p[4:] == ["less than 10⁻³⁰⁰", "–"]
    assert wording.interval(figure(0.801, 0.7, 0.9)) == "0.801 (0.7 to 0.9)"
    assert wording.interval(figure(0.801), shares=True) == "80.1\u00a0%"
    assert wording.date("2026-11-27T23:32:05+02:00") == "27 November 2026, 21:32 UTC"
    assert wording.clause("The end.") == "the end"
    assert wording.clause("MINT head") == "MINT head"
    assert [wording.count(n, "image") for n in (1, 2000)] == ["1\u00a0image", "2,000\u00a0images"]
