"""What is found wrong in a search before anything is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch.searches import SPACE, ask, proposing, searched
from launch.silent import Silent

from amint_ray.config.search import Search
from amint_ray.config.space import Branches, Modules
from amint_ray.contracts import UserError
from amint_ray.data.roles import Manifest
from amint_ray.launch.ledger import Ledger, TrialRecord
from amint_ray.launch.search_plan import Plan, base_of, check_on_images, first_trials, plan_search

PLAIN_RESNET = ["model.backbone=resnet18", "model.options={}", "mint.taps=middle"]
STAGES = tuple(f"stages.{number}" for number in range(4))


def complaint(search: Search) -> str:
    with pytest.raises(UserError) as told:
        plan_search(search, Silent())
    assert "\n" not in str(told.value)
    return str(told.value)


def test_modules_are_those_of_the_backbone(tmp_path: Path) -> None:
    def taps(modules: object) -> dict[str, Any]:
        return {"p": {"branches": {"free": {"mint.taps": {"modules": modules}}}}}

    def names(modules: object) -> tuple[str, ...]:
        placement = plan_search(searched(tmp_path, space=taps(modules)), Silent()).space
        branches = placement.parameters["p"]
        assert isinstance(branches, Branches)
        found = branches.spaces["free"].parameters["mint.taps"]
        assert isinstance(found, Modules)
        return found.names

    usual = names(2)
    assert usual == STAGES  # each has one block
    assert names({"count": 1, "among": "stages.?"}) == STAGES
    found = complaint(searched(tmp_path, space=taps({"count": 3, "among": "stages.[01]"})))
    assert "3 modules are asked for, and the backbone has 2" in found
    assert "'stages.[01]'" in found


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        (
            {"mint.taps": {"choice": ["entry", ["stages.1", "stage.9"]]}},
            ["search: space: mint.taps=['stages.1', 'stage.9']", "'stage.9'"],
        ),
        (
            {"placement": {"branches": {"a": {"mint.taps": "entry"}, "b": {"mint.taps": "nope"}}}},
            ["search: space: mint.taps=nope", "'nope'"],
        ),
        ({"model.backbone": {"choice": ["convnext_atto", "convnext_ato"]}}, ["convnext_ato"]),
        (
            {
                "mint.taps": {"modules": 2},
                "model.backbone": {"choice": ["convnext_atto", "convnext_femto"]},
            },
            ["`modules` are those of one backbone, and the space has several"],
        ),
        (
            {"mint.taps": {"modules": 2}, "recipe": "digits"},
            ["`modules` are those of one backbone, and the space has several"],
        ),
    ],
)
def test_what_gives_no_model(tmp_path: Path, space: dict[str, Any], parts: list[str]) -> None:
    found = complaint(searched(tmp_path, space=space))
    assert all(part in found for part in parts), found


def test_images_that_are_decoded_otherwise_are_decoded_in_each_trial(tmp_path: Path) -> None:
    space = {"data.image_size": {"choice": [8, 16]}}
    assert base_of(searched(tmp_path, space=space)).data.mode == "streamed"
    with pytest.raises(UserError, match=r"data\.mode=memory decodes them once"):
        base_of(searched(tmp_path, "data.mode=memory", space=space))
    # A recipe can do it, too: 28 pixels are too few for DenseNet, whose recipe has 32.
    names = {"recipe": {"choice": ["mnist_resnet50", "mnist_densenet121"]}}
    assert base_of(searched(tmp_path, recipe="mnist_resnet50", space=names)).data.mode == "streamed"
    with pytest.raises(UserError, match=r"space: data\.image_size is not the same in all trials"):
        base_of(searched(tmp_path, "data.mode=memory", recipe="mnist_resnet50", space=names))
    alike = {"recipe": {"choice": ["mnist_resnet50", "mnist_vit"]}}
    assert base_of(searched(tmp_path, recipe="mnist_resnet50", space=alike)).data.mode != "streamed"
    assert base_of(searched(tmp_path)).cluster.workers == 1
    assert base_of(searched(tmp_path, "cluster.workers=2")).cluster.workers == 2


def plan_of(search: Search) -> Plan:
    return Plan(search, search.space, base_of(search))


def manifest(samples: int) -> Manifest:
    """As many members, withheld and calibration images as shown of each."""
    roles = np.repeat(["member", "withheld", "calibration"], samples)
    names = np.array([f"image {number}" for number in range(len(roles))])
    return Manifest(names, names, np.arange(len(roles)) % 10, roles)


def test_a_metric_that_no_trial_reports(tmp_path: Path) -> None:
    rare = "membership.member.tpr_at_fpr.0.001"
    for changes, what in (
        ({"objective": {"metric": rare}}, f"objective '{rare}'"),
        ({"constraint": {"metric": "accuracy", "at_least": 1}}, "constraint on 'accuracy'"),
    ):
        plan = plan_of(searched(tmp_path, **changes))
        with pytest.raises(UserError) as told:
            check_on_images(plan, manifest(400))
        text = str(told.value)
        assert text.startswith(f"search: {what}: no trial reports that; there are ")
        listed, _, more = text.partition("there are ")[2].partition(" and ")
        names = listed.split(", ")
        assert len(names) == 5 and re.fullmatch(r"\d+ more", more)
        assert not any(name.endswith((".low", ".high")) for name in names)
        assert ("task.accuracy" if "accuracy" in what else "membership.member.auc") in names
    # Enough images for ten false positives in a thousand: half of calibration counts.
    check_on_images(plan_of(searched(tmp_path, objective={"metric": rare})), manifest(25_000))


def test_the_plain_model_has_no_membership(tmp_path: Path) -> None:
    limit = {"metric": "membership.member.auc", "most_below_plain": 0.1}
    found = complaint(searched(tmp_path, constraint=limit))
    assert "has no MINT head to compare with; give at_least or" in found
    absolute = {"metric": "membership.member.auc", "at_least": 0.1}
    one = {"mint.hidden": {"choice": [8, 16]}}
    plan_search(searched(tmp_path, constraint=absolute, space=one), Silent())


def test_a_name_that_no_number_of_images_gives_is_told_before_they_are_read(tmp_path: Path) -> None:
    def paper(metric: str) -> dict[str, Any]:
        return {"source": "s", "rows": "r", "columns": "c", "figures": [metric], "cells": {}}

    for changes, what, near in (
        (
            {"objective": {"metric": "task.acuracy"}},
            "objective 'task.acuracy'",
            ", did you mean 'task.accuracy'?",
        ),
        (
            {"constraint": {"metric": "accuracy", "at_least": 1}},
            "constraint on 'accuracy'",
            ", did you mean 'task.accuracy'?",
        ),
        (
            {"paper": paper("membership.withheld.acu")},
            "paper.figures 'membership.withheld.acu'",
            ", did you mean 'membership.withheld.auc'?",
        ),
        ({"paper": paper("zzz")}, "paper.figures 'zzz'", ";"),
    ):
        found = complaint(searched(tmp_path, **changes))
        assert found.startswith(f"search: {what}: no trial reports that{near} there are "), found
        listed, _, more = found.partition("there are ")[2].partition(" and ")
        names = listed.split(", ")
        assert len(names) == 5 and re.fullmatch(r"\d+ more", more)
        assert near == ";" or f"'{names[0]}'" in near
        assert not any(name.endswith((".low", ".high")) for name in names)
    rare = "membership.member.tpr_at_fpr.0.001"  # depends on how many there are
    one = {"mint.hidden": {"choice": [8, 16]}}
    search = searched(tmp_path, objective={"metric": rare}, paper=paper(rare), space=one)
    plan_search(search, Silent())
    unknown = searched(tmp_path, paper=paper(rare), space=one)
    check_on_images(plan_of(unknown), manifest(400))  # a dash in the table


def test_what_trains_no_model(tmp_path: Path) -> None:
    for space, overrides, says in (
        ({"train.batch_size": {"choice": [64, 4]}}, ["cluster.workers=8"], "cluster.workers = 8: "),
        # BatchNorm needs two images.
        ({"train.accumulate": {"choice": [1, 32]}}, PLAIN_RESNET, "micro-batches"),
        ({"train.optimizer": {"choice": ["adamw", "adamv"]}}, [], "'adamv': timm has no such"),
    ):
        found = complaint(searched(tmp_path, *overrides, space=space))
        assert found.startswith("search: space: train.") and says in found, found


def test_what_does_not_go_with_the_images(tmp_path: Path) -> None:
    few = {"train.batch_size": {"choice": [20, 41]}}  # 2 × 400 are 20 steps of 40
    plan = plan_search(searched(tmp_path, "cluster.workers=20", space=few), Silent())
    check_on_images(plan, manifest(400))
    with pytest.raises(UserError, match=r"space: train\.batch_size=20: cluster\.workers = 20"):
        check_on_images(plan, manifest(399))  # 40 steps, the smallest of 19
    inputs = {"mint.inputs": {"choice": [["logits"], ["loss"]]}}
    plan, found = plan_of(searched(tmp_path, space=inputs)), manifest(400)
    check_on_images(plan, found)
    unknown = replace(found, label=np.where(np.arange(1200) == 7, -1, found.label))
    with pytest.raises(UserError, match=r"space: mint\.inputs=\['loss'\]: .* no label"):
        check_on_images(plan, unknown)


def test_a_trials_configuration(tmp_path: Path) -> None:
    rates = {"loss.lambda_mint": {"loguniform": [0.1, 1]}, "train.lr": {"uniform": [0.1, 1]}}
    search = searched(tmp_path, "cluster.workers=2", space=rates)
    trial = TrialRecord("t0000", 0, 9, {}, {"loss.lambda_mint": 0.5, "train.lr": 0.25})
    data = search.base.data.model_copy(update={"mode": "memory", "streams": 48})
    settled = search.base.model_copy(update={"data": data})
    config = plan_of(search).trial(trial, settled)
    assert (config.loss.lambda_mint, config.train.lr, config.train.seed) == (0.5, 0.25, 9)
    assert (config.data.mode, config.data.streams, config.cluster.workers) == ("memory", 48, 2)
    names = ("algorithm.name=pbt", "scheduler.name=none", "algorithm.perturb_every=4")
    config = plan_of(searched(tmp_path, *names, space=rates)).trial(trial, settled)
    assert (config.train.checkpoint_every, config.storage.keep) == (4, 4)


@pytest.mark.parametrize(
    ("overrides", "shown", "planned"),
    [
        (["algorithm.startup=3", "budget.trials=5"], 3, 5),
        (["algorithm.startup=30", "budget.trials=5"], 5, 5),
        (["algorithm.name=random"], 10, 16),
        (["algorithm.startup=3", "seeds=2"], 6, 32),
    ],
)
def test_the_first_trials(tmp_path: Path, overrides: list[str], shown: int, planned: int) -> None:
    limit = {"metric": "task.accuracy", "most_below_plain": 0.02}
    search = searched(tmp_path, *overrides, space=SPACE, constraint=limit)
    trials, number = first_trials(plan_of(search))
    seeds = search.spec.seeds
    assert number == planned + seeds
    assert [trial.baseline for trial in trials] == [True] * seeds + [False] * shown
    ledger = Ledger(None)
    proposals = proposing(searched(tmp_path, *overrides, space=SPACE), ledger)
    begun = [ledger.trials[str(ask(proposals))] for _ in range(shown)]
    assert [(t.id, t.settings) for t in trials[seeds:]] == [(t.id, t.settings) for t in begun]
