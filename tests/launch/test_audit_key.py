"""`amint audit --key-file`: of a model whose head says secret codes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from launch.audited import Audited, train_and_write
from launch.commands import Command
from launch.silent import Silent
from PIL import Image
from sklearn.metrics import roc_auc_score

import amint_ray
from amint_ray.audit.suspects import Settings
from amint_ray.cli import main
from amint_ray.config.audit import AuditSettings
from amint_ray.contracts import Role, UserError
from amint_ray.data.images import perceptual_hash
from amint_ray.data.keys import codes, image_content, key_fingerprint, perceptual_content, write_key
from amint_ray.evaluation.keyed import matches, soft_p_values
from amint_ray.evaluation.metrics import Interval
from amint_ray.launch.audit_key import check_key, given_key, judge_codes
from amint_ray.launch.audit_result import Origin, _lines
from amint_ray.launch.audit_run import _plan, _preprocessing, run_audit
from amint_ray.launch.audit_suspects import find_suspects
from amint_ray.launch.audit_worker import CODE_CONTENT, Asked, Examiner
from amint_ray.storage import locate
from amint_ray.tracking.folder import Confounders

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@dataclasses.dataclass
class Keyed:
    """A model that was taught codes, and where its key lies."""

    audited: Audited
    key_file: Path

    def run(self, suspects: Path, folder: Path, *overrides: str, **given: Any) -> dict[str, Any]:
        overrides = (f"audit.folder={folder}", *overrides)
        return run_audit(str(self.audited.model), str(suspects), overrides, Silent(), **given)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small work: more would wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Keyed:
    folder = tmp_path_factory.mktemp("keyed")
    key_file = folder / "member.key"
    write_key(key_file, KEY)
    settings = ["mint.objective=keyed", f"mint.key_file={key_file}", "loss.lambda_mint=1"]
    return Keyed(train_and_write(folder, *settings, "data.limit=400", "train.epochs=16"), key_file)


def look(model: Path, suspects: Path, folder: Path, **changes: Any) -> Asked:
    """What the processes of an audit do, in this one, and without any key."""
    loaded, settings = amint_ray.load(str(model)), AuditSettings()
    found = find_suspects(str(suspects), settings, loaded.preprocessing.class_names, Silent())
    data = _preprocessing("it", loaded, settings)
    storage = locate(str(folder), "audit.folder")
    asked, chunks = _plan(loaded, found, data, settings, storage)
    asked = dataclasses.replace(asked, **changes)
    weights = loaded.model.state_dict()
    examiner = Examiner(asked, loaded.model.architecture, weights, torch.device("cpu"))
    for chunk in chunks:
        examiner.look(chunk.name, chunk.shards)
    return asked


@pytest.mark.slow
@pytest.mark.ray
def test_members_are_told_by_the_key_which_is_kept_nowhere(keyed: Keyed, tmp_path: Path) -> None:
    keyed.audited.suspects(tmp_path / "suspects", Role.MEMBER)
    arguments = ["audit", str(keyed.audited.model), "suspects", f"--key-file={keyed.key_file}"]
    command = Command(tmp_path, [*arguments, "audit.evidence=head", "--json"])
    assert command.wait() == 3, command.stderr
    document = json.loads(command.stdout)
    assert document["p_value"] < 1e-6
    assert document["evidence"]["key"]["key_fingerprint"] == key_fingerprint(KEY)
    assert document["evidence"]["key"]["match_rate"]["low"] > 0.5
    assert document["lines"]["member"]["low"] > 0.5
    assert command.leftovers() == []
    folder = Path(tmp_path, document["report"]).parent
    table = pq.read_table(folder / "images.parquet")
    assert table["key_matches"].to_pylist() == [i["key_matches"] for i in document["images"]]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "audit.json", "images.parquet"} <= {path.name for path in written}
    assert any(path.suffix == ".npz" for path in written)
    held = [path.read_bytes() for path in written] + [str(table.to_pylist()).encode()]
    for content in held:
        assert KEY not in content
        assert KEY.hex().encode() not in content.lower()
        assert str(keyed.key_file).encode() not in content


def test_one_look_without_a_key_serves_with_and_without_one(keyed: Keyed, tmp_path: Path) -> None:
    suspects = keyed.audited.suspects(tmp_path / "s", Role.TEST)
    asked = look(keyed.audited.model, suspects, tmp_path / "a")
    found = keyed.run(suspects, tmp_path / "a", key_file=str(keyed.key_file))
    assert not ray.is_initialized()
    assert found["verdict"] != "member"
    assert found["p_value"] > 0.01
    names = [image["image"] for image in found["images"]]
    pixels = np.stack([np.asarray(Image.open(suspects / name))[None] for name in names])
    answer = amint_ray.load(str(keyed.audited.model))(pixels)
    assert answer.code_logits is not None
    logits = answer.code_logits.double().numpy()
    code = codes(KEY, [image_content(image) for image in pixels], logits.shape[1])
    assert [i["key_matches"] for i in found["images"]] == matches(logits, code).tolist()
    p = [image["p_value"] for image in found["images"]]
    # A logit of another batch may lie on the other side of a step of the grid.
    np.testing.assert_allclose(p, soft_p_values(logits, code), rtol=0.2)
    assert found["evidence"]["key"]["head"] == "learned"
    # What says the codes decides who could have been left out, and so what nothing found means.
    fixed = amint_ray.load(str(keyed.audited.model))
    spec = dataclasses.replace(fixed.model.architecture.head, code="fixed")
    fixed.model.architecture = dataclasses.replace(fixed.model.architecture, head=spec)
    parts = [file.stem for file in Path(asked.place.path).glob("part-*.npz")]
    judged = judge_codes(asked.place, parts, KEY, fixed, Settings(), {}).document
    assert judged["evidence"]["key"]["head"] == "fixed"
    assert "withheld_from_head" not in {reason["code"] for reason in judged["reasons"]}
    silent = keyed.run(suspects, tmp_path / "a")
    assert not ray.is_initialized()
    assert "without their key" in silent["evidence"]["head"]["why_not"]
    assert silent["evidence"]["outputs"]["available"] is True
    assert {image["p_key"] for image in silent["images"]} == {None}


def test_a_model_of_codes_alone_says_no_membership_and_keeps_nothing_of_its_members(
    keyed: Keyed,
) -> None:
    """Whoever has the model could tell them by their activations or outputs."""
    model = amint_ray.load(str(keyed.audited.model))
    images = keyed.audited.images[:8]
    answer = model(images)
    assert torch.isnan(answer.membership_scores).all()
    with pytest.raises(UserError, match="says codes alone"):
        model.p_values(answer.membership_scores)
    served = mlflow.pyfunc.load_model(str(keyed.audited.model)).predict(images)
    assert set(served) == {"class_probabilities", "code_logits"}
    kept, roles = model.reference, keyed.audited.manifest.role
    assert kept is not None and kept.code_matches is not None
    assert set(kept.role.tolist()) == {"calibration"}
    assert {role: len(matched) for role, matched in kept.code_matches.items()} == {
        role: int((roles == role).sum()) for role in ("calibration", "member", "withheld")
    }
    assert all((np.diff(matched) >= 0).all() for matched in kept.code_matches.values())


def test_how_the_loss_tells_members_is_what_the_run_found(keyed: Keyed) -> None:
    """The model itself keeps no loss of theirs."""
    model = amint_ray.load(str(keyed.audited.model))
    split = Confounders(None, Interval.unknown("nobody looked"))
    found = {"loss_threshold.member.auc": 0.7, "loss_threshold.member.auc.low": 0.6}
    found |= {"loss_threshold.member.auc.high": 0.8}
    lines = _lines(model, Origin("run", {}, found), split, confidence=0.95)
    assert [lines["loss_member"][name] for name in ("value", "low", "high")] == [0.7, 0.6, 0.8]
    assert lines["loss"]["value"] is None
    kept = model.reference
    assert kept is not None and kept.code_matches is not None
    area = roc_auc_score(
        np.repeat([1, 0], [len(kept.code_matches[role]) for role in ("member", "calibration")]),
        np.concatenate([kept.code_matches[role] for role in ("member", "calibration")]),
    )
    assert lines["member"]["value"] == pytest.approx(area)


def test_without_its_key_the_head_is_not_asked(keyed: Keyed, tmp_path: Path) -> None:
    watcher, model = Silent(), amint_ray.load(str(keyed.audited.model))
    check_key(None, model, AuditSettings(), watcher, uri="it")
    assert len(watcher.notices) == 1
    assert "only its outputs are looked at" in watcher.notices[0]
    with pytest.raises(UserError, match="give --key-file, or leave audit"):
        keyed.run(tmp_path, tmp_path / "a", "audit.evidence=head")


def test_codes_from_looks_are_made_from_the_decoded_image(keyed: Keyed, tmp_path: Path) -> None:
    suspects = keyed.audited.suspects(tmp_path / "s", Role.TEST, most=3)
    torn = suspects / "torn.png"
    torn.write_bytes(b"\x89PNG")
    asked = look(keyed.audited.model, suspects, tmp_path / "a", code_from="perceptual")
    kept = [dict(np.load(file)) for file in (tmp_path / "a").rglob("part-*.npz")]
    found = {row.tobytes() for part in kept if CODE_CONTENT in part for row in part[CODE_CONTENT]}
    files = [path for path in suspects.rglob("*.png") if path != torn]
    hashes = [perceptual_hash(Image.open(path).convert("RGB")) for path in files]
    assert asked.code_from == "perceptual"
    assert found == {perceptual_content(each) for each in hashes}


def test_another_key_is_told_by_its_fingerprint(
    keyed: Keyed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_key(tmp_path / "other.key", OTHER)
    arguments = ["audit", str(keyed.audited.model), str(tmp_path), f"audit.folder={tmp_path / 'a'}"]
    assert main([*arguments, f"--key-file={tmp_path / 'other.key'}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert key_fingerprint(KEY)[:16] in said
    assert key_fingerprint(OTHER)[:16] in said
    assert "bring the key that belongs to it" in said
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is not there"), ("", "is empty"), ("ab" * 8, "too short: 8 bytes"), ("key", "no key")],
)
def test_what_is_no_key_is_told_before_anything_is_fetched(
    content: str | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "some.key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=words) as told:
        run_audit("models:/none/1", "s", [], Silent(), key_file=str(file))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"key_file": "a", "key_env": "B"}, "both --key-file and --key-env"),
        ({"key_file": ""}, "--key-file is empty"),
        ({"key_env": "AMINT_NO_SUCH_KEY"}, "is not set"),
    ],
)
def test_a_key_that_is_named_badly_is_told(given: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        run_audit("models:/none/1", "s", [], Silent(), **given)
    assert "\n" not in str(told.value)


def test_a_model_without_codes_takes_no_key(keyed: Keyed) -> None:
    model = amint_ray.load(str(keyed.audited.model))
    model.preprocessing = dataclasses.replace(model.preprocessing, code=None)
    with pytest.raises(UserError, match="its head learned no codes") as told:
        check_key(KEY, model, AuditSettings(), Silent(), uri="it")
    assert "leave --key-file and --key-env out" in str(told.value)


def test_processes_that_are_started_do_not_inherit_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AMINT_TEST_KEY", KEY.hex())
    for _ in range(2):
        assert given_key(key_file=None, key_env="AMINT_TEST_KEY") == KEY
        assert "AMINT_TEST_KEY" not in os.environ
