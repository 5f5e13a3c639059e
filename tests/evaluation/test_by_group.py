"""Groups: each measured by itself, by the threshold of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role, ScoreTable, UserError
from amint_ray.evaluation import metrics
from amint_ray.evaluation.by_group import (
    FEWEST,
    NONE,
    group_figures,
    groups_by,
    groups_from,
    read_groups,
)
from amint_ray.evaluation.calibration import threshold_at

CONFIG = Evaluation()


def made(*, shift: float = 0.0, seed: int = 0, each: int = 200) -> ScoreTable:
    """Three classes; the images of class 2 that nobody trained on score higher by `shift`."""
    random = np.random.default_rng(seed)
    role = np.repeat([r.value for r in Role], each)
    label = np.tile(np.arange(3), len(role))[: len(role)]
    score = random.normal(size=len(role)) + (role == "member")
    score += shift * (label == 2) * np.isin(role, ["test", "calibration"])
    wrong = random.random(len(role)) < 0.3
    return ScoreTable(
        sample_id=np.array([f"s{i}" for i in range(len(role))]),
        role=role,
        label=label,
        prediction=np.where(wrong, (label + 1) % 3, label),
        task_loss=random.exponential(size=len(role)) + wrong,
        mint_logit=score,
    )


def test_each_group_is_measured_on_its_own_images_by_the_threshold_of_all() -> None:
    table = made()
    found = group_figures(table, groups_by(table, "label"), CONFIG, head_trained=True)
    assert [group["group"] for group in found["groups"]] == ["0", "1", "2"]
    assert found["ungrouped"] == 0
    calibration = table.mint_logit[table.role == "calibration"]
    threshold = threshold_at(CONFIG.threshold_fpr, calibration)
    assert threshold is not None
    for number, group in enumerate(found["groups"]):
        mine = table.label == number
        test = table.mint_logit[mine & (table.role == "test")]
        for role in ("member", "withheld"):
            positives = table.mint_logit[mine & (table.role == role)]
            area = metrics.auc(positives, test, confidence=0.95)
            assert group[role] == area.as_dict()
        accused = int((test > threshold).sum())
        rate = metrics.proportion(accused, len(test), confidence=0.95)
        assert group["realised_fpr"] == rate.as_dict()
        assert group["images"]["test"] == len(test)
        member, other = (-table.task_loss[mine & (table.role == r)] for r in ("member", "test"))
        assert group["loss"] == metrics.auc(member, other, confidence=0.95).as_dict()


def test_groups_accused_more_often_or_less_are_told_apart_and_noise_is_not() -> None:
    table = made(shift=2.0, each=600)
    found = group_figures(table, groups_by(table, "label"), CONFIG, head_trained=True)
    assert [group["apart"] for group in found["groups"]] == [True, True, True]
    alarms = 0
    for seed in range(200):
        table = made(seed=seed, each=120)
        found = group_figures(table, groups_by(table, "label"), CONFIG, head_trained=True)
        alarms += any(group["apart"] for group in found["groups"])
    assert alarms <= 0.05 * 200 + 3


def test_of_a_small_group_nothing_is_stated_and_why() -> None:
    table = made()
    test = np.flatnonzero(table.role == "test")
    groups = np.full(len(table), "large")
    groups[test[: FEWEST - 1]] = "small"
    groups[np.flatnonzero(table.role == "member")[:50]] = "small"
    groups[test[-1]] = NONE
    found = group_figures(table, groups, CONFIG, head_trained=True)
    large, small = found["groups"]
    assert large["group"] == "large" and large["member"]["value"] is not None
    assert found["ungrouped"] == 1
    why = f"{FEWEST - 1} test images, {FEWEST} needed"
    for name in ("member", "loss", "realised_fpr"):
        assert (small[name]["value"], small[name]["note"]) == (None, why)
    assert small["withheld"]["note"] == f"0 withheld images, {FEWEST} needed"
    assert small["apart"] is None


def test_where_the_head_was_not_trained_only_the_loss_speaks() -> None:
    table = made()
    found = group_figures(table, groups_by(table, "label"), CONFIG, head_trained=False)
    for group in found["groups"]:
        for name in ("member", "withheld", "realised_fpr"):
            assert group[name]["note"] == "the MINT head was not trained"
        assert group["loss"]["value"] is not None
        assert group["apart"] is None


def test_without_calibration_there_is_no_rate() -> None:
    table = made()
    table = table.kept(table.role != "calibration")
    (group, *_) = group_figures(table, groups_by(table, "label"), CONFIG, head_trained=True)[
        "groups"
    ]
    assert group["realised_fpr"]["note"] == "too few calibration images for a threshold"
    assert group["member"]["value"] is not None


def test_right_and_wrong_part_the_samples() -> None:
    table = made()
    groups = groups_by(table, "prediction-right")
    assert np.array_equal(groups == "right", table.prediction == table.label)
    assert set(groups.tolist()) == {"right", "wrong"}


@pytest.mark.parametrize("name", ["groups.csv", "groups.parquet"])
def test_groups_of_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text("group,sample_id,more\n007,s0,x\n7,s1,y\n7,s1,y\n")
    else:
        columns = {"sample_id": ["s0", "s1", None], "group": ["007", "7", "8"]}
        pq.write_table(pa.table(columns), path)
    listed = read_groups(path)
    assert listed == {"s0": "007", "s1": "7"}
    found = groups_from(made(), listed, where="--groups")
    assert found[:3].tolist() == ["007", "7", NONE]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("groups.txt", "", ["ends in .parquet or .csv"]),
        ("missing.csv", None, ["there is no such file"]),
        ("columns.csv", "id,group\na,b\n", ["no column 'sample_id'", "it has id, group"]),
        ("two.csv", "sample_id,group\na,x\na,y\n", ["a is in 'x' and in 'y'"]),
        ("empty.csv", "", ["cannot be read"]),
        ("damaged.parquet", "no table", ["cannot be read"]),
    ],
)
def test_a_file_that_gives_no_groups(
    tmp_path: Path, name: str, text: str | None, parts: list[str]
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as told:
        read_groups(path)
    for part in (f"--groups={path}", *parts):
        assert part in str(told.value)
    assert "\n" not in str(told.value)


def test_groups_of_other_samples() -> None:
    with pytest.raises(UserError, match="none of the run's samples is in it; it has 'x', the run"):
        groups_from(made(), {"x": "y"}, where="--groups=f.csv")


def test_numbers_are_in_the_order_of_their_size_however_long() -> None:
    table = made(each=20)
    names = ["10", "9", "010", "1" + "0" * 5000]
    groups = np.array(names)[np.arange(len(table)) % 4]
    found = group_figures(table, groups, CONFIG, head_trained=True)["groups"]
    assert [group["group"] for group in found] == ["9", "010", "10", names[-1]]
