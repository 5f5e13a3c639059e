"""The audit's report on screens and paper: its style sheet, and a browser where there is one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from audit.audits import document, png
from audit.browser import browser, find_browser
from audit.page import read

from amint_ray.audit.report import extremes, write_report


def colours(css: str) -> list[dict[str, str]]:
    """The light palette and the dark one."""
    light, dark = re.findall(r":root \{([^}]*--page[^}]*)\}", css)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in (light, dark)]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table') &&
    (e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
  ).map(e => e.outerHTML.slice(0, 200))"""
WRONG = {"Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"}
NARROW = {".scroll table", ".gallery img, .empty"}
"""Rules that may set a width of more than 20: one scrolls by itself, one gives way."""
WIDTH = "document.documentElement.scrollWidth"


def test_the_page_fits_screens_and_paper_light_and_dark(tmp_path: Path) -> None:
    """By its style sheet; where there is a Chromium (or AMINT_BROWSER names one), in that, too."""
    audit = document("no_verdict", images=400)
    audit["suspects"]["source"] = f"s3://bucket/{'suspects' * 40}"
    audit["images"][0]["class_name"] = "class" * 30
    audit["reasons"][0]["text"] = "unbroken" * 30
    shown = [row["image"] for part in extremes(audit["images"]) for row in part]
    path = write_report(audit, tmp_path, dict.fromkeys(shown, png()))
    page = read(path.read_text("utf-8"))
    (style,) = page.all("style")
    css = style.text
    for palette in colours(css):
        for text in ("ink", "quiet", "member", "clear", "none"):
            for ground in ("page", "box"):
                assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
        for shape in ("mark", "bar"):
            assert contrast(palette[shape], palette["page"]) >= 3, shape
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    inks = set(re.findall(r"(?<![-\w])(?:color|fill|background): ([^;]+);", css))
    assert inks <= {"none"} | {f"var(--{name})" for name in (*palette, "tone")}
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", css)
    assert "@media print" in css and "@media screen and (prefers-color-scheme: dark)" in css
    wide = re.findall(r"([^{}\n]+) \{[^}]*?(?<![-\w])(?:min-)?width: (\d+)(?:rem|px)", css)
    assert {rule.strip() for rule, at in wide if int(at) > 20} <= NARROW
    viewport = next(e for e in page.all("meta") if e.attributes.get("name") == "viewport")
    assert viewport.attributes["content"] == "width=device-width, initial-scale=1"

    program = find_browser()
    if program is None:
        warnings.warn(
            "no Chromium on the path and no AMINT_BROWSER: style sheet alone", stacklevel=1
        )
        return
    with browser(program) as tab:
        for width, dark, media in (
            (360, False, "screen"),
            (360, True, "screen"),
            (1400, False, "screen"),
            (1400, True, "screen"),
            (680, True, "print"),
        ):
            tab.shape(width=width, dark=dark, media=media)
            tab.open(path)
            assert tab.value("innerWidth") == width
            assert tab.value(WIDTH) <= width, tab.value(OVERFLOWING)
            assert tab.value(OVERFLOWING) == []
            ground = tab.value("getComputedStyle(document.body).backgroundColor")
            r, g, b = map(int, re.findall(r"\d+", ground))
            assert (max(r, g, b) < 60) == (dark and media == "screen"), ground
            assert tab.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert not WRONG & {event["method"] for event in tab.events}, tab.events
            asked = {
                event["params"]["request"]["url"].split(",")[0]
                for event in tab.events
                if event["method"] == "Network.requestWillBeSent"
            }
            assert asked == {path.as_uri(), "data:image/png;base64"}
        # What is wrong would be noticed: of a page with a script that fails, too wide.
        wrong = tmp_path / "wrong.html"
        wrong.write_text("<!doctype html><p style='width: 2000px'>wide<script>fails()</script>")
        tab.open(wrong)
        assert tab.value(WIDTH) > 680 and len(tab.value(OVERFLOWING)) > 0
        assert "Runtime.exceptionThrown" in {event["method"] for event in tab.events}
