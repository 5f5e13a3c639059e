"""What an attack consists of, and what a part's file is found again by."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amint_ray.attacks.evidence import EDITS, PLAIN
from amint_ray.attacks.methods import METHODS
from amint_ray.config.attack import load_attack
from amint_ray.config.load import load_config
from amint_ray.contracts import Role, UserError
from amint_ray.data.roles import Manifest
from amint_ray.evaluation.views import VIEWS
from amint_ray.launch import attack_plan
from amint_ray.launch.attack_parts import Task, check_disk, is_done, read_part
from amint_ray.launch.attack_plan import AttackPlan, plan_attack
from amint_ray.launch.attack_worker import (
    look_at,
    look_blindly,
    train_and_look,
    train_head_and_look,
)
from amint_ray.storage import Location, locate, write_atomically

EVERYTHING = {need for method in METHODS.values() for need in method.needs}
COUNTS = {"member": 40, "withheld": 10, "external": 30, "calibration": 20, "test": 60}
N = sum(COUNTS.values())
POOL = N - COUNTS["external"]
TWINS = 7, 11
"""Two samples of one content."""


def manifest_of(*, order: Sequence[int] | None = None, label: int = 0) -> Manifest:
    """Samples in roles dealt out at random."""
    role = np.random.default_rng(0).permutation(np.repeat(list(COUNTS), list(COUNTS.values())))
    content = np.array([f"c{number:03d}" for number in range(N)])
    content[TWINS[1]], role[TWINS[1]] = content[TWINS[0]], role[TWINS[0]]
    names = np.array([f"n{number:03d}" for number in range(N)])
    labels = (np.arange(N) + label) % 10
    rows = np.arange(N) if order is None else np.array(order)
    return Manifest(names[rows], content[rows], labels[rows], role[rows])


MANIFEST = manifest_of()


@pytest.fixture
def storage(tmp_path: Path) -> Location:
    return locate(str(tmp_path), "test")


def planned(
    storage: Location,
    *settings: str,
    manifest: Manifest = MANIFEST,
    config: Sequence[str] = (),
    needs: set[str] = EVERYTHING,
    model: str = "m",
    checkpoints: Sequence[Location] = (),
) -> AttackPlan:
    asked, _ = load_attack(["attack.shadows=4", *(f"attack.{each}" for each in settings)])
    return plan_attack(
        load_config("digits", config),
        asked,
        manifest,
        storage,
        needs=needs,
        model=model,
        checkpoints=checkpoints,
    )


def names(tasks: Sequence[Task]) -> list[str]:
    return [task.part.name for task in tasks]


def lambdas(tasks: Sequence[Task]) -> set[float]:
    return {task.part.config.loss.lambda_mint for task in tasks}


def places(tasks: Sequence[Task]) -> set[str]:
    return {task.part.place.uri for task in tasks}


def test_all_parts_of_an_attack(storage: Location) -> None:
    checkpoints = [storage.below(f"run/checkpoint_{n}/model.safetensors") for n in range(2)]
    plan = planned(storage, checkpoints=checkpoints)
    numbers = [f"{n:03d}" for n in range(4)]
    assert names(plan.tasks) == [
        "model-000",
        "snapshot-checkpoint_0",
        "snapshot-checkpoint_1",
        "blind",
        "twin",
        "passive",
        *(f"joint-{n}" for n in numbers),
        *(f"plain-{n}" for n in numbers),
    ]
    functions = [look_at] * 3 + [look_blindly, train_and_look, train_head_and_look]
    assert [task.function for task in plan.tasks] == functions + [train_and_look] * 8
    files = [task.part.place.below(task.part.name).path for task in plan.tasks]
    assert len(set(files)) == len(files)
    assert [task.part.weights for task in plan.snapshots] == checkpoints
    epochs = load_config("digits").train.epochs
    assert [task.part.epochs for task in plan.tasks] == [0] * 4 + [epochs] * 10
    assert lambdas(plan.twin_shadows) == {0.0} and plan.twin is not None
    assert plan.twin.part.config.loss.lambda_mint == 0.0
    assert lambdas(plan.shadows) == lambdas(plan.own) == {load_config("digits").loss.lambda_mint}


def test_everybody_looks_at_all_but_external_images(storage: Location) -> None:
    plan = planned(storage)
    assert plan.edits == (PLAIN, *EDITS)
    expected = np.flatnonzero(MANIFEST.role != Role.EXTERNAL.value)
    for task in plan.tasks:
        np.testing.assert_array_equal(task.look.positions, expected)
        np.testing.assert_array_equal(task.look.labels, MANIFEST.label[expected])
        assert task.look.edits == plan.edits
        assert task.look.views == (VIEWS if task in plan.own else 1)
    assert planned(storage, "edits=false").edits == (PLAIN,)


def test_a_large_pool_is_looked_at_in_pieces(
    storage: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attack_plan, "_AT_ONCE", 50)
    plan = planned(storage)
    assert names(plan.own) == ["model-000", "model-001", "model-002"]
    assert [len(task.look.positions) for task in plan.own] == [50, 50, POOL - 100]
    whole = np.concatenate([task.look.positions for task in plan.own])
    np.testing.assert_array_equal(whole, plan.positions)


def test_shadows_train_as_many_images_of_the_roles_that_the_run_has(storage: Location) -> None:
    plan = planned(storage)
    content = MANIFEST.content[plan.positions]
    in_d = np.isin(MANIFEST.role[plan.positions], ["member", "withheld"])
    many = len(np.unique(content[in_d]))
    kept_back = len(np.unique(MANIFEST.content[MANIFEST.role == "withheld"]))
    roles = np.array([role.value for role in Role])
    for row, task in zip(plan.inside, plan.shadows, strict=True):
        assert len(np.unique(content[row])) == many
        assert task.part.roles is not None
        role = roles[task.part.roles]
        trains = np.isin(role, ["member", "withheld"])
        np.testing.assert_array_equal(trains[plan.positions], row)
        assert role[TWINS[0]] == role[TWINS[1]] or MANIFEST.role[TWINS[0]] == "external"
        assert len(np.unique(MANIFEST.content[role == "withheld"])) == kept_back
        outside = MANIFEST.role == "external"
        np.testing.assert_array_equal(role == "external", outside)
    counts = plan.inside.sum(axis=0)
    assert counts.max() - counts.min() <= 1


def test_pairs_share_images_and_seed_and_no_two_shadows_do(storage: Location) -> None:
    plan = planned(storage)
    for one, other in zip(plan.shadows, plan.twin_shadows, strict=True):
        np.testing.assert_array_equal(one.part.roles, other.part.roles)
        without = {"loss": one.part.config.loss}
        assert other.part.config.model_copy(update=without) == one.part.config
    seeds = {task.part.config.train.seed for task in plan.shadows}
    assert len(seeds) == 4 and load_config("digits").train.seed not in seeds
    again = planned(storage)
    for one, other in zip(plan.shadows, again.shadows, strict=True):
        np.testing.assert_array_equal(one.part.roles, other.part.roles)
        assert one.part.config == other.part.config
    another = planned(storage, "seed=1")
    assert seeds.isdisjoint(task.part.config.train.seed for task in another.shadows)
    assert (plan.inside != another.inside).any()


def test_no_part_keeps_checkpoints_or_asks_for_workers(storage: Location) -> None:
    keys = ["train.checkpoint_every=1", "cluster.workers=3", "evaluation.select_every=1"]
    for task in planned(storage, config=keys).tasks:
        config = task.part.config
        assert config.train.checkpoint_every == config.train.epochs
        assert (config.cluster.workers, config.evaluation.select_every) == (1, None)
        assert not config.tracking.enabled


# --- kinds ----------------------------------------------------------------------------------------


def test_plain_shadows_serve_both_models(storage: Location) -> None:
    plan = planned(storage, "shadow_loss=plain")
    assert plan.shadows is plan.twin_shadows
    assert lambdas(plan.shadows) == {0.0} and plan.twin is not None
    assert names(plan.tasks)[-4:] == [f"plain-{n:03d}" for n in range(4)]
    assert places(plan.shadows) == places(planned(storage).twin_shadows)  # are used again


def test_without_a_comparison_there_is_no_plain_model(storage: Location) -> None:
    plan = planned(storage, "compare_plain=false")
    assert (plan.twin, plan.twin_shadows) == (None, [])
    assert len(plan.shadows) == 4 and 0.0 not in lambdas(plan.tasks)
    plain = planned(storage, "compare_plain=false", "shadow_loss=plain")
    assert plain.twin is None and lambdas(plain.shadows) == {0.0}
    assert len(plain.tasks) == len(plan.tasks)


def test_a_model_without_a_head_is_compared_with_nothing(storage: Location) -> None:
    plan = planned(storage, config=["loss.lambda_mint=0"])
    assert plan.twin is None and plan.shadows is plan.twin_shadows
    assert lambdas(plan.shadows) == {0.0}
    assert plan.passive is not None  # its batches must have external images
    assert plan.passive.part.config.loss.lambda_mint > 0


def test_no_shadows_and_what_is_not_asked_for(storage: Location) -> None:
    none = planned(storage, "shadows=0")
    assert names(none.tasks) == ["model-000", "blind", "twin", "passive"]
    assert none.inside.shape == (0, POOL)
    assert names(planned(storage, needs=set()).tasks) == ["model-000", "twin"]
    assert names(planned(storage, "compare_plain=false", needs={"mint"}).tasks) == ["model-000"]
    nobody = dataclasses.replace(
        MANIFEST, role=np.where(MANIFEST.role == "external", "test", MANIFEST.role)
    )
    assert planned(storage, manifest=nobody).passive is None


def test_a_pool_that_is_too_small_is_told_with_the_key(storage: Location) -> None:
    role = np.where(MANIFEST.role == "external", "external", "member")
    with pytest.raises(UserError, match=r"^attack\.shadows = 4: .* raise data\.shares\.test"):
        planned(storage, manifest=dataclasses.replace(MANIFEST, role=role))


# --- what a file is found again by ----------------------------------------------------------------

ELSEWHERE: dict[str, dict[str, Any]] = {
    "cluster": {"config": ["cluster.workers=2", "cluster.cpus_per_worker=2"]},
    "reading": {"config": ["data.readers=3", "data.memory_gib=2"]},
    "tracking": {"config": ["tracking.experiment=other"]},
    "checkpoints": {"config": ["train.checkpoint_every=1", "storage.keep=3"]},
    "needs": {"needs": {"shadows"}},
    "retries": {"settings": ["retries=0", "gpus=1", "known=20"]},
}
OF_BOTH: dict[str, dict[str, Any]] = {
    "edits": {"settings": ["edits=false"]},
    "label": {"manifest": manifest_of(label=1)},
    "order": {"manifest": manifest_of(order=range(N - 1, -1, -1))},
    "epochs": {"config": ["train.epochs=3"]},
    "lr": {"config": ["train.lr=0.5"]},
    "lambda": {"config": ["loss.lambda_mint=0.5"]},
}


def found_by(storage: Location, changed: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Folders of what is kept of the model, and of the shadows."""
    more = {key: value for key, value in changed.items() if key != "settings"}
    plan = planned(storage, *changed.get("settings", ()), **more)
    return {plan.place.uri}, places(plan.shadows)


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_changes_nothing_leaves_the_folders(storage: Location, what: str) -> None:
    assert found_by(storage, ELSEWHERE[what]) == found_by(storage, {})


@pytest.mark.parametrize("what", OF_BOTH)
def test_what_changes_results_changes_the_folders(storage: Location, what: str) -> None:
    changed, before = found_by(storage, OF_BOTH[what]), found_by(storage, {})
    assert changed[0] != before[0] and changed[1] != before[1]


def test_code_changes_the_folders(storage: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    before = found_by(storage, {})
    monkeypatch.setattr(attack_plan, "code_fingerprint", lambda: "later")
    changed = found_by(storage, {})
    assert changed[0] != before[0] and changed[1] != before[1]


def test_shadows_depend_on_their_seed_and_the_attacked_model_does_not(storage: Location) -> None:
    before = found_by(storage, {})
    model, shadows = found_by(storage, {"settings": ["seed=1"]})
    assert model == before[0] and shadows != before[1]


def test_more_shadows_are_those_that_there_were_and_others(storage: Location) -> None:
    few, many = planned(storage), planned(storage, "shadows=7")
    np.testing.assert_array_equal(many.inside[:4], few.inside)
    assert len(many.shadows) == 7
    for one, other in zip(few.shadows, many.shadows, strict=False):
        assert one.part.place.uri == other.part.place.uri and one.part.name == other.part.name
        assert one.part.config == other.part.config
        np.testing.assert_array_equal(one.part.roles, other.part.roles)


def test_models_of_one_recipe_share_their_shadows(storage: Location) -> None:
    before = found_by(storage, {})
    model, shadows = found_by(storage, {"model": "another", "config": ["train.seed=5"]})
    assert model != before[0] and shadows == before[1]


# --- room on disk ---------------------------------------------------------------------------------


def test_bytes_are_counted_of_what_is_not_there_yet(storage: Location) -> None:
    plan = planned(storage)
    phi = POOL * len(plan.edits) * 4
    outputs = 5
    own, others, one_number = VIEWS * outputs + 4, 2 * (outputs + 4), 8 + 1
    assert plan.bytes_needed == phi * (own + others + one_number)
    for task in [*plan.own, *plan.shadows]:
        assert not is_done(task.part)
        with write_atomically(task.part.place, f"{task.part.name}.npz") as file:
            np.savez(file, seconds=np.array(1.0))
    assert plan.bytes_needed == phi * (others + one_number - 4)
    assert read_part(plan.own[0].part).keys() == {"seconds"}


def test_more_than_the_disk_holds(storage: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=12 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    place = storage.below("attacks/abc")
    check_disk(place, 10 * 2**30)
    with pytest.raises(UserError, match=r"takes 13\.2 GiB and .*attacks/abc .* has 12 GiB") as told:
        check_disk(place, 11 * 2**30)
    assert "\n" not in str(told.value)
    assert asked == [Path(storage.path)] * 2  # the folder is not there yet
    bucket: Any = SimpleNamespace(remote=True)
    check_disk(bucket, 2**60)
