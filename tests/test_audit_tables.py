"""An audit's result on a screen."""

from __future__ import annotations

import io

import pytest
from audit.audits import document
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
