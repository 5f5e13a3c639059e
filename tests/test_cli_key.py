"""`amint key`: what it prints and writes, and that the key is never printed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from amint_ray.cli import main


def test_new_and_fingerprint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "member.key"
    assert main(["key", "new", str(file)]) == 0
    out, err = capfd.readouterr()
    digits = file.read_text().strip()
    fingerprint = hashlib.sha256(bytes.fromhex(digits)).hexdigest()
    assert (out, err) == (fingerprint + "\n", "")
    assert main(["key", "fingerprint", str(file)]) == 0
    assert capfd.readouterr().out == fingerprint + "\n"
    assert main(["key", "fingerprint", str(file), "--json"]) == 0
    document = {"key_file": str(file), "fingerprint": fingerprint}
    assert json.loads(capfd.readouterr().out) == document
    other = tmp_path / "other.key"
    assert main(["key", "new", str(other), "--json"]) == 0
    out = capfd.readouterr().out
    assert json.loads(out)["fingerprint"] != fingerprint
    assert other.read_text().strip() not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["new"], "Missing argument 'FILE'"),
        (["new", "there.key"], "is there already"),
        (["new", "nowhere/a.key"], "cannot be written"),
        (["fingerprint", "absent.key"], "is not there"),
        (["fingerprint", "there.key"], "is empty"),
        (["fingerprint", "."], "is a folder"),
        (["show", "there.key"], "No such command"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.key").touch()
    assert main(["key", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1
