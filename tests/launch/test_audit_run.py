"""`amint audit` as an auditor runs it: stopped and started again, on what folders hold."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from launch.audited import Audited, train_and_write
from launch.commands import Command
from launch.silent import Silent
from PIL import Image

import amint_ray
from amint_ray.audit.suspects import Settings
from amint_ray.config.audit import AuditSettings, load_audit
from amint_ray.contracts import Role, UserError
from amint_ray.evaluation.calibration import p_values
from amint_ray.evaluation.metrics import Interval
from amint_ray.launch.attack_parts import read_arrays
from amint_ray.launch.audit_result import Origin, _confounders, conclude
from amint_ray.launch.audit_run import _plan, _preprocessing, run_audit
from amint_ray.launch.audit_suspects import find_suspects
from amint_ray.launch.audit_worker import Examiner
from amint_ray.storage import locate
from amint_ray.tracking.folder import Confounders

HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    return train_and_write(tmp_path_factory.mktemp("audited"))


class Audits:
    """An audit of training images that is killed and gone on with, and one of others."""

    def __init__(self, audited: Audited, folder: Path) -> None:
        self.folder = folder
        suspects = audited.suspects(folder / "suspects", Role.MEMBER, Role.WITHHELD)
        some = sorted(suspects.rglob("*.png"))
        shutil.copy(some[0], suspects / "0" / "copy.png")
        (suspects / "0" / HOSTILE).write_bytes(some[1].read_bytes()[:40])
        self.files = len(some) + 2
        arguments = ["audit", str(audited.model), "suspects", "audit.batch_size=32"]
        arguments += ["cluster.workers=1", "--json"]
        self.killed = Command(folder, arguments)
        self.killed.wait_until(lambda: bool(self.parts()))
        self.killed.process.send_signal(signal.SIGKILL)
        self.killed.process.wait()
        self.left = self.killed.leftovers()
        self.before = self.parts()
        self.command = Command(folder, arguments)
        self.code = self.command.wait()
        self.document: dict[str, Any] = json.loads(self.command.stdout)
        audited.suspects(folder / "others", Role.TEST)
        others = ["audit", str(audited.model), "others", "audit.evidence=head", "--json"]
        self.others = Command(folder, others)
        self.others_code = self.others.wait()

    def parts(self) -> dict[str, int]:
        """What is done, and when it was written."""
        found = (self.folder / "amint_audits").glob("*/part-*.npz")
        return {f"{path.parent.name}/{path.stem}": path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def audits(audited: Audited, tmp_path_factory: pytest.TempPathFactory) -> Audits:
    return Audits(audited, tmp_path_factory.mktemp("audits"))


slow = pytest.mark.slow
on_ray = pytest.mark.ray


@slow
@on_ray
def test_a_killed_audit_leaves_no_process_and_is_gone_on_with(audits: Audits) -> None:
    assert audits.left == []
    assert re.search(r"goes on: \d+ of \d+ parts were there already", audits.command.stderr)
    after = audits.parts()
    assert audits.before
    assert len(after) > 1
    assert {name: after[name] for name in audits.before} == audits.before
    assert audits.command.leftovers() == []


@slow
@on_ray
def test_the_document_has_the_keys_that_scripts_rely_on(audits: Audits) -> None:
    document = audits.document
    assert document["verdict"] in ("member", "not_member", "no_verdict")
    assert audits.code == {"not_member": 0, "member": 3, "no_verdict": 4}[document["verdict"]]
    assert 0 <= document["p_value"] <= 1
    assert document["share"].keys() >= {"value", "low", "high"}
    assert document["evidence"].keys() == {"head", "outputs"}
    assert document["lines"].keys() >= {"member", "withheld", "blind", "loss"}
    suspects = document["suspects"]
    assert suspects["images"] == len(document["images"]) == audits.files
    assert suspects["unreadable"] == 1
    assert suspects["unique"] == audits.files - 2
    assert suspects["labelled"] == audits.files - 1


@slow
@on_ray
def test_images_are_told_one_by_one(audits: Audits, audited: Audited) -> None:
    images = {image["image"]: image for image in audits.document["images"]}
    assert "cannot be decoded" in images[f"0/{HOSTILE}"]["problem"]
    assert images[f"0/{HOSTILE}"]["p_value"] is None
    pair = [images["0/copy.png"]]
    pair += [i for i in images.values() if i["duplicate_of"] == "0/copy.png"]
    pair += [images[name] for name in [pair[0]["duplicate_of"]] if name is not None]
    assert len(pair) == 2
    assert pair[0]["p_value"] == pair[1]["p_value"]
    model = amint_ray.load(str(audited.model))
    pixels, names = _pixels(audits.folder / "suspects")
    answer = model(pixels)
    p = p_values(answer.membership_scores.double().numpy(), model.calibration)
    for place, name in enumerate(names):
        image = images[name]
        assert image["label"] == image_class(name) == int(image["class_name"])
        assert image["prediction"] == int(answer.task_logits[place].argmax())
        assert image["head_score"] == pytest.approx(
            float(answer.membership_scores[place]), abs=1e-3
        )
        # The same images as calibration's, so that classes make no difference.
        assert image["p_head"] == pytest.approx(p[place], abs=0.02)


def image_class(name: str) -> int:
    return int(name.partition("/")[0])


def _pixels(folder: Path) -> tuple[torch.Tensor, list[str]]:
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("digits*.png"))]
    pixels = [np.asarray(Image.open(folder / name))[None] for name in names]
    return torch.from_numpy(np.stack(pixels)), names


@slow
@on_ray
def test_the_report_is_kept_and_runs_nothing(audits: Audits) -> None:
    folder = audits.folder / Path(audits.document["report"]).parent
    page = (folder / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    table = pq.read_table(folder / "images.parquet").to_pylist()
    assert [row["image"] for row in table] == [i["image"] for i in audits.document["images"]]
    assert [row["p_value"] for row in table] == [i["p_value"] for i in audits.document["images"]]
    assert json.loads((folder / "audit.json").read_text())["verdict"] == audits.document["verdict"]


@slow
@on_ray
def test_other_images_are_not_called_members(audits: Audits) -> None:
    document = json.loads(audits.others.stdout)
    assert document["verdict"] != "member"
    assert audits.others_code in (0, 4)
    assert document["evidence"]["outputs"]["available"] is False
    assert document["p_value"] > 0.01


def looked(model: amint_ray.RegisteredModel, suspects: Path, folder: Path, **settings: Any) -> Any:
    """What is asked, and the files that come of it, all looked at in this process."""
    given = AuditSettings(**settings)
    found = find_suspects(str(suspects), given, model.preprocessing.class_names, Silent())
    data = _preprocessing("it", model, given)
    asked, chunks = _plan(model, found, data, given, locate(str(folder), "audit.folder"))
    weights = model.model.state_dict()
    examiner = Examiner(asked, model.model.architecture, weights, torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small work: more would wait for each other
    for chunk in chunks:
        examiner.look(chunk.name, chunk.shards)
    torch.set_num_threads(threads)
    return asked, [chunk.name for chunk in chunks]


def test_the_head_alone_says_the_same(audited: Audited, tmp_path: Path) -> None:
    """Nothing behind the last tap is computed then, and it makes no difference."""
    model = amint_ray.load(str(audited.model))
    suspects = audited.suspects(tmp_path / "s", Role.TEST, most=20)
    found = []
    for evidence in ("both", "head"):
        asked, (name,) = looked(model, suspects, tmp_path / evidence, evidence=evidence)
        found.append(read_arrays(asked.place, name))
    both, head = found
    np.testing.assert_allclose(head["mint_logit"], both["mint_logit"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head["taps"], both["taps"], rtol=1e-5, atol=1e-5)
    assert not any(key.startswith(("told", "untold", "prediction")) for key in head)


def test_each_way_to_judge_the_same_images_has_its_own_report(
    audited: Audited, tmp_path: Path
) -> None:
    model = amint_ray.load(str(audited.model))
    suspects = audited.suspects(tmp_path / "s", Role.TEST, most=20)
    asked, parts = looked(model, suspects, tmp_path / "a")
    confounded = Origin(None, {"amint.confounded": "true"}, {})
    documents = [
        conclude(
            asked,
            parts,
            model,
            judged,
            AuditSettings(),
            origin,
            Silent(),
            uri="it",
            every=False,
            seconds={},
        )
        for judged, origin in (
            (Settings(fdr=0.05), Origin(None, {}, {})),
            (Settings(fdr=0.2), Origin(None, {}, {})),
            (Settings(fdr=0.05), confounded),
        )
    ]
    first, second, again = (document["report"] for document in documents)
    assert first == again != second
    for document, fdr in zip(documents, (0.05, 0.2, 0.05), strict=True):
        kept = json.loads(Path(document["report"]).with_name("audit.json").read_text())
        assert kept["fdr"] == fdr
        assert kept["model"]["registered"] == model.registered
        assert len(kept["images"]) == 20
    # This model keeps nothing of its split, but what its run says counts.
    codes = [[r["code"] for r in each["reasons"] + each["reservations"]] for each in documents]
    assert "confounders_unknown" in codes[0] and "confounded" in codes[2]
    model.confounders = Confounders(True, Interval(0.5, 0.4, 0.6))
    kept = _confounders(model, confounded)
    assert (kept.clean, kept.blind.value) == (True, 0.5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["audit.alpha=2"], "audit.alpha"),
        (["audit.nothing=1"], "did you mean"),
        (["data.path=x"], "unknown key 'data'"),
        (["audit.evidence=loss"], "audit.evidence"),
        (["audit.batch_size"], "not of the form"),
    ],
)
def test_a_setting_that_is_none_is_told(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        load_audit(overrides)
    assert "\n" not in str(told.value)


def test_suspects_that_are_none_are_told(audited: Audited, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    for name, words in (
        ("nowhere", "there is no such file or folder"),
        ("empty", "holds no image files"),
        ("text", "holds no image files"),
    ):
        with pytest.raises(UserError, match=words) as told:
            run_audit(
                str(audited.model),
                str(tmp_path / name),
                [f"audit.folder={tmp_path / 'a'}"],
                Silent(),
            )
        assert "\n" not in str(told.value)
        assert str(tmp_path / name) in str(told.value)
    assert not (tmp_path / "a").exists()


def test_one_image_is_a_collection_of_one(audited: Audited, tmp_path: Path) -> None:
    (image,) = audited.suspects(tmp_path / "s", Role.TEST, most=1).rglob("*.png")
    found = find_suspects(str(image), AuditSettings(), ["0", "1"], Silent())
    assert found.chunks() == [[0]]
    assert found.source.sample_ids(0) == [image.name]
    assert found.labels(0).tolist() == [-1]
    assert isinstance(found.source.read(0, [0])[0], bytes)


def test_labels_are_the_models_classes_by_name(audited: Audited, tmp_path: Path) -> None:
    suspects = audited.suspects(tmp_path / "s", Role.TEST, most=40)
    watcher = Silent()
    found = find_suspects(str(suspects), AuditSettings(), ["7", "3", "9"], watcher)
    labels = {
        name: label
        for shard in range(len(found.source.shards))
        for name, label in zip(
            found.source.sample_ids(shard), found.labels(shard).tolist(), strict=True
        )
    }
    known = {7: 0, 3: 1, 9: 2}
    assert labels == {name: known.get(image_class(name), -1) for name in labels}
    assert any("the model has no class" in notice for notice in watcher.notices)
    unlabelled = find_suspects(str(suspects), AuditSettings(), ["cat", "dog"], watcher)
    assert unlabelled.classes is None
    assert any("none of their classes" in notice for notice in watcher.notices)
    silent = find_suspects(str(suspects), AuditSettings(labels=False), ["7"], Silent())
    assert silent.classes is None


def test_a_model_without_reference_says_how_to_make_one(tmp_path: Path) -> None:
    plain = train_and_write(tmp_path, "train.epochs=1", "evaluation.reference_images=0")
    suspects = plain.suspects(tmp_path / "s", Role.TEST, most=3)
    with pytest.raises(UserError, match=r"evaluation\.reference_images\); train it again"):
        run_audit(str(plain.model), str(suspects), [], Silent())
