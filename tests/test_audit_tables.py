"""An audit's result on a screen."""

from __future__ import annotations

import io
from typing import Any

import pytest
from audit.audits import document, figure
from rich.console import Console

from amint_ray.audit_tables import print_audit


def printed(verdict: str) -> str:
    out = io.StringIO()
    found = document(verdict) | {"report": "amint_audits/[bold]/report.html"}
    found["suspects"]["source"] = "s3://bucket/[red]"
    found["evidence"]["head"] |= {"available": False, "why_not": "its head was not trained"}
    print_audit(found, Console(file=out, width=160))
    return out.getvalue()


@pytest.mark.parametrize("verdict", ["member", "not_member", "no_verdict"])
def test_what_a_person_must_see(verdict: str) -> None:
    text = printed(verdict)
    assert text.startswith(verdict.replace("_", " "))
    assert "  but Nobody has looked.; Look at it." in text
    assert ("because The collection has 29 different images" in text) == (verdict == "no_verdict")
    for words in (
        "30 images in s3://bucket/[red]",
        "its head was not trained",
        "48 (withheld)",
        "blind classifier, members against test",
        "report: amint_audits/[bold]/report.html",
    ):
        assert words in text


def shown(audit: dict[str, Any]) -> str:
    out = io.StringIO()
    print_audit({**audit, "report": "audits/report.html"}, Console(file=out, width=160))
    return " ".join(out.getvalue().split())


def test_a_share_that_is_not_known_says_why() -> None:
    share = figure(None) | {"note": "too few suspects to tell", "of": None, "by": None}
    words = "share of training images in it: not known: too few suspects to tell"
    assert words in shown(document(share=share))


def test_an_audit_by_key_shows_the_bits_that_match_and_which_key_it_was() -> None:
    key = {
        **document()["evidence"]["head"],
        "matched": 1890,
        "bits": 1920,
        "match_rate": figure(1890 / 1920, 0.97, 0.99),
        "known_match_rate": {"member": figure(0.97, 0.96, 0.98), "withheld": figure(0.5)},
        "key_fingerprint": "ab" * 32,
        "cannot_show": "that images were not used",
    }
    silent = {"available": False, "why_not": "the key was asked"}
    text = shown(document(evidence={"key": key, "head": silent, "outputs": silent}))
    assert "1,890 of 1,920 bits of the secret codes match (98.44%; luck gives half" in text
    assert "ab" * 32 in text
    assert "it cannot show that images were not used" in text
    assert "2.34e-08" in text
    assert "secret codes" not in shown(document())
