"""The end of an attack, from parts that were written here: nothing is trained, without Ray."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from launch.silent import Silent

from amint_ray.attacks.evidence import PLAIN
from amint_ray.attacks.methods import METHODS, chosen
from amint_ray.attacks.table import AttackScores, read_attack_scores
from amint_ray.config.attack import load_attack
from amint_ray.config.load import load_config
from amint_ray.contracts import Role, RunError, UserError
from amint_ray.data.roles import Manifest
from amint_ray.evaluation.outputs import Outputs, outputs_of, stack_views
from amint_ray.launch import attack_result
from amint_ray.launch.attack_parts import Done, Resources, Task, run
from amint_ray.launch.attack_plan import AttackPlan, plan_attack
from amint_ray.launch.attack_result import conclude
from amint_ray.launch.earlier import Earlier
from amint_ray.storage import locate, write_atomically

COUNTS = {"member": 60, "withheld": 40, "external": 20, "calibration": 40, "test": 60}
N = sum(COUNTS.values())
SHADOWS = 8
SECONDS = 90.0
WHY = "epoch 2: the loss is nan"


def small_plan(folder: Path, *settings: str) -> AttackPlan:
    role = np.random.default_rng(1).permutation(np.repeat(list(COUNTS), list(COUNTS.values())))
    names = np.array([f"n{number:03d}" for number in range(N)])
    asked = [f"attack.shadows={SHADOWS}", "attack.edits=false", "attack.known=20"]
    return plan_attack(
        load_config("digits"),
        load_attack([*asked, *(f"attack.{each}" for each in settings)])[0],
        Manifest(names, names, np.arange(N) % 10, role),
        locate(str(folder), "test"),
        needs={need for method in METHODS.values() for need in method.needs},
        model="m",
        checkpoints=[],
    )


def write(task: Task, arrays: dict[str, Any]) -> None:
    with write_atomically(task.part.place, f"{task.part.name}.npz") as file:
        np.savez(file, **{"seconds": np.array(SECONDS), **arrays})


def said(rng: np.random.Generator, plan: AttackPlan, trained: np.ndarray, views: int) -> Outputs:
    """Of images that a model is the surer of if it was trained on them."""
    labels = plan.manifest.label[plan.positions]
    logits = rng.normal(size=(len(labels), 10))
    logits[np.arange(len(labels)), labels] += 1.0 + 1.5 * trained
    return stack_views(
        [outputs_of(logits + 0.1 * rng.normal(size=logits.shape), labels) for _ in range(views)]
    )


def fill(plan: AttackPlan, *, failed: Collection[str] = (), gone: Collection[int] = ()) -> None:
    """Write what the parts would have.

    Args:
        plan: whose.
        failed: names of trainings that came to nothing.
        gone: rows of images that could not be had.
    """
    rng = np.random.default_rng(2)
    n = len(plan.positions)
    in_d = np.isin(plan.manifest.role[plan.positions], ["member", "withheld"])
    inside = {
        task.part.name: row
        for tasks in (plan.shadows, plan.twin_shadows)
        for task, row in zip(tasks, plan.inside, strict=False)
    }
    for task in plan.tasks:
        name = task.part.name
        trained = inside.get(name, in_d)
        outputs = vars(said(rng, plan, trained, task.look.views))
        arrays: dict[str, Any] = {f"{PLAIN}/{field}": each for field, each in outputs.items()}
        arrays[f"mint/{PLAIN}"] = rng.normal(size=n) + trained
        arrays["blind"] = rng.normal(size=n)
        for array in arrays.values():
            array[..., list(gone)] = np.nan
        pixels = np.arange(1, n + 1, dtype=np.uint64)
        pixels[list(gone)] = 0
        arrays[f"pixels/{PLAIN}"] = pixels
        write(task, {"failed": np.array(WHY)} if name in failed else arrays)


@pytest.fixture(autouse=True)
def without_mlflow_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The former is not there, and the latter take most of the time."""

    def blank(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(savefig=lambda path, dpi: path.write_bytes(b""))

    def away() -> NoReturn:
        raise UserError("MLflow does not answer")

    monkeypatch.setattr(attack_result, "open_mlflow", away)
    monkeypatch.setattr(attack_result, "attack_curves", blank)


def again(plan: AttackPlan) -> Done:
    """What the command finds that is given once more."""
    return run(plan.tasks, "name", {}, None, Resources(cpus=1, gpus=0, retries=0), Silent())


def concluded(
    plan: AttackPlan, methods: str = "all", **written: Any
) -> tuple[dict[str, Any], list[str], AttackScores]:
    """The document, what was said on the way, and the scores that were kept."""
    fill(plan, **written)
    watcher = Silent()
    earlier = Earlier(
        run_id="abc",
        config=plan.config,
        config_as_it_was=True,
        fingerprint=plan.manifest.fingerprint,
        manifest=plan.manifest,
        tags={},
        environment=None,
        metrics={},
    )
    document = conclude(plan, earlier, chosen(methods), again(plan), watcher, uri="models:/m/1")
    scores = read_attack_scores(Path(document["kept"]) / "attack_scores.parquet")
    return document, watcher.notices, scores


def shadows_phi(plan: AttackPlan, failed: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Who trained on what, and φ, of those that came to something; read by hand."""
    rows = [i for i, task in enumerate(plan.shadows) if task.part.name not in failed]
    phi = []
    for i in rows:
        part = plan.shadows[i].part
        with np.load(Path(part.place.path) / f"{part.name}.npz") as arrays:
            phi.append(arrays[f"{PLAIN}/label_confidence"][0].astype(np.float64))
    return plan.inside[rows], np.stack(phi)


def test_what_is_there_is_not_done_again_and_comes_to_the_same(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    document, notices, scores = concluded(plan)
    done = again(plan)
    assert sorted(done.reused) == sorted(task.part.name for task in plan.tasks)
    assert (done.seconds, done.failed) == ({}, {})
    assert document["seconds"] == {
        "parts": 0,
        "parts_by_name": {},
        "reused": 4 + 2 * SHADOWS,
    }
    assert document["shadows"] == {
        "asked": SHADOWS,
        "used": SHADOWS,
        "failed": {},
        "loss": "same",
    }
    assert not document["recorded"]
    assert notices == [
        "MLflow does not answer; the results are kept in storage, the same command records them"
    ]
    second, _, scores_again = concluded(plan)
    for key in ("leak", "counts", "artifacts", "kept"):
        assert second[key] == document[key]
    for name, method in document["methods"].items():
        for question in ("member", "withheld"):
            assert second["methods"][name][question] == method[question]
        np.testing.assert_array_equal(scores_again.scores[name], scores.scores[name])
    stored = json.loads((Path(document["kept"]) / "attack.json").read_text())
    assert stored["methods"] == json.loads(json.dumps(second["methods"]))
    files = {path.name for path in Path(document["kept"]).iterdir()}
    tables = {"attack.json", "attack.csv", "attack_scores.parquet"}
    assert files == tables | {"roc_member.png", "roc_withheld.png"}


def test_the_table_as_csv_has_every_figure(tmp_path: Path) -> None:
    document, _, _ = concluded(small_plan(tmp_path), "yeom,lira_online")
    with (Path(document["kept"]) / "attack.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    named = [(row["method"], row["question"]) for row in rows]
    assert named == [(m, q) for m in ("yeom", "lira_online") for q in ("member", "withheld")]
    for row in rows:
        figures = document["methods"][row["method"]][row["question"]]
        assert float(row["auc"]) == figures["auc"]["value"]
        assert float(row["auc.low"]) == figures["auc"]["low"]


def test_other_methods_are_kept_beside_these(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    one, _, _ = concluded(plan, "yeom")
    other, _, _ = concluded(plan, "yeom,watson")
    assert one["kept"] != other["kept"] and one["attack"] == other["attack"]
    assert list(other["methods"]) == ["yeom", "watson"]


def test_costs_are_those_of_the_trainings_whenever_they_were(tmp_path: Path) -> None:
    document, _, _ = concluded(small_plan(tmp_path))
    hours = {name: each["cost"]["core_hours"] for name, each in document["methods"].items()}
    assert hours["yeom"] == hours["mint"] == hours["output_attack"] == 0
    assert hours["passive_mint"] == pytest.approx(SECONDS / 3600)
    assert hours["watson"] == hours["rmia_offline"] == pytest.approx(SHADOWS * SECONDS / 3600)


def test_a_training_that_diverged_is_left_out(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    failed = {"joint-002"}
    document, _, scores = concluded(plan, failed=failed)
    assert document["shadows"]["used"] == SHADOWS - 1
    assert document["shadows"]["failed"] == {"joint-002": WHY}
    assert document["leak"]["trainings"]["yeom"]["auc"]["pairs"] == SHADOWS - 1
    inside, phi = shadows_phi(plan, failed)
    loss = np.log1p(np.exp(-phi))
    with np.load(Path(plan.place.path) / "model-000.npz") as own:
        mine = np.log1p(np.exp(-own[f"{PLAIN}/label_confidence"][0].astype(np.float64)))
    expected = [
        loss[~inside[:, j], j].mean() - mine[j] if not inside[:, j].all() else np.nan
        for j in range(len(mine))
    ]
    np.testing.assert_allclose(scores.scores["watson"], expected)


def test_a_twin_or_a_head_that_diverged(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    document, notices, _ = concluded(plan, failed={"twin", "passive"})
    assert document["leak"] is None
    assert any("the model with λ₂ = 0 came to nothing" in notice for notice in notices)
    area = document["methods"]["passive_mint"]["member"]["auc"]
    assert area["value"] is None and "no MINT head was trained afterwards" in area["note"]
    assert document["methods"]["mint"]["member"]["auc"]["value"] > 0.6


def test_one_shadow_that_is_left_is_none(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    failed = {f"joint-{number:03d}" for number in range(SHADOWS - 1)}
    document, notices, _ = concluded(plan, failed=failed)
    assert document["counts"] == {
        role: int((plan.manifest.role == role).sum())
        for role in ("member", "withheld", "calibration", "test")
    }
    assert document["shadows"]["used"] == 0 and len(document["shadows"]["failed"]) == SHADOWS - 1
    assert any("fewer than two shadow models came to something" in each for each in notices)
    for name, method in METHODS.items():
        if name in document["methods"] and "shadows" in method.needs:
            area = document["methods"][name]["withheld"]["auc"]
            assert area["value"] is None and area["note"] == "there are no shadow models"
    assert document["methods"]["yeom"]["member"]["auc"]["value"] is not None
    assert document["leak"]["trainings"] is None
    assert document["leak"]["pair"]["yeom"]["difference"]["auc"]["value"] is not None


def test_images_that_could_not_be_had_are_not_scored_and_on_no_list(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    role = plan.manifest.role[plan.positions]
    gone = [int(np.flatnonzero(role == each)[3]) for each in ("member", "test", "test")]
    gone[2] = int(np.flatnonzero(role == "test")[8])
    document, _, scores = concluded(plan, gone=gone)
    for name in ("mint", "yeom", "watson", "blind", "lira_offline"):
        assert np.isnan(scores.scores[name][gone]).all(), name
        left_out = document["methods"][name]["member"]["compared"]["left_out"]
        assert (left_out["positives"], left_out["negatives"]) == (1, 2), name
    assert scores.scores["hash_list"][gone].tolist() == [0, 0, 0]
    listed = np.isin(role, ["member", "withheld"])
    listed[gone] = False
    np.testing.assert_array_equal(scores.scores["hash_list"] == 1, listed)


def test_half_of_the_members_at_most_are_known(tmp_path: Path) -> None:
    for known, expected in ((20, 20), (1000, COUNTS["member"] // 2)):
        _, _, scores = concluded(small_plan(tmp_path, f"known={known}"), "yeom,output_attack")
        members = scores.role == Role.MEMBER.value
        assert scores.known[members].sum() == expected
        assert not scores.known[np.isin(scores.role, ["withheld", "test"])].any()


def test_shadows_without_a_head_serve_both_models(tmp_path: Path) -> None:
    document, _, _ = concluded(small_plan(tmp_path, "shadow_loss=plain"))
    assert document["shadows"]["loss"] == "plain"
    assert document["leak"]["trainings"] is None
    assert document["leak"]["pair"].keys() == {"yeom", "lira_online_fixed", "rmia_online"}


def test_no_shadows_and_nothing_to_compare_with(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, "shadows=0", "compare_plain=false")
    document, notices, _ = concluded(plan, "yeom,mint,blind")
    assert document["leak"] is None
    assert document["shadows"] == {"asked": 0, "used": 0, "failed": {}, "loss": "same"}
    assert len(notices) == 1


def test_few_shadows_of_an_image_are_told(tmp_path: Path) -> None:
    _, notices, _ = concluded(small_plan(tmp_path, "shadows=2"), "lira_online")
    (told,) = (notice for notice in notices if notice.startswith("attack.shadows = 2: "))
    assert "some images train only 1 and some train all but 1 of the 2 shadow models; " in told


def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    fill(plan)
    file = Path(plan.place.path) / "twin.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=r"twin\.npz cannot be read .*; delete it and run the same"):
        again(plan)
