"""Looking at what a search selects by changes nothing else, and shows what scoring later shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_setup import (
    CONVNEXT,
    COUNTS,
    RESNET,
    architecture_of,
    assert_same_weights,
    config_of,
    data_set,
    streams_of,
)

from amint_ray.config.schema import Config, Evaluation, Loss
from amint_ray.contracts import Role, ScoreBatch
from amint_ray.data.loading import MemoryStreams
from amint_ray.evaluation.selection import selection_metrics
from amint_ray.train.loop import LocalContext, Trained, train
from amint_ray.train.state import STATE

RATE = "train/steps_per_second"


def looking(config: Config, **options: Any) -> Config:
    evaluation = Evaluation(batch_size=4, min_false_positives=0, fprs=(0.3,), **options)
    return config.model_copy(update={"evaluation": evaluation})


def run(config: Config, folder: Path, *, score: bool = True) -> tuple[Trained, LocalContext]:
    folder.mkdir()
    context = LocalContext(folder)
    return train(config, architecture_of(config), streams_of(config), context, score=score), context


def parts(trained: Trained) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The history without what is selected by, and that alone."""
    chosen = [{k: v for k, v in e.items() if k.startswith("selection.")} for e in trained.history]
    others = [
        {k: v for k, v in e.items() if not k.startswith("selection.") and k != RATE}
        for e in trained.history
    ]
    return others, chosen


@pytest.mark.parametrize(
    ("backbone", "loss"), [(RESNET, Loss()), (CONVNEXT, Loss(lambda_mint=0.0))], ids=["", "plain"]
)
def test_a_look_shows_what_scoring_shows_and_changes_nothing(
    backbone: Any, loss: Loss, tmp_path: Path
) -> None:
    """BatchNorm, dropout and the loss's running mean would be moved by a look that trains."""
    config = config_of(
        backbone,
        loss=loss.model_copy(update={"weighting": "ema"}),
        train={"epochs": 3},
        drop_rate=0.3,
    )
    plain, _ = run(looking(config), tmp_path / "plain")
    looked, context = run(looking(config, select_every=2), tmp_path / "looked")
    assert_same_weights(looked.model.state_dict(), plain.model.state_dict())
    assert parts(looked)[0] == parts(plain)[0]
    for name, values in plain.scores.columns.items():
        assert np.array_equal(getattr(looked.scores, name), values), name
    chosen = parts(looked)[1]
    assert [bool(entry) for entry in chosen] == [False, True, True]  # the last one always
    head_trained = loss.lambda_mint > 0
    expected = selection_metrics(
        looked.scores, looking(config).evaluation, head_trained=head_trained
    )
    assert chosen[2] == pytest.approx(expected, rel=1e-5)
    assert ("selection.membership.member.auc" in expected) == head_trained
    assert chosen[1] != chosen[2]
    told = [event for event in context.events if event["phase"] == "epoch"]
    assert [{k: e[k] for k in entry} for e, entry in zip(told, chosen, strict=True)] == chosen


def test_a_look_at_a_few_is_at_always_the_same(tmp_path: Path) -> None:
    config = looking(config_of(CONVNEXT), select_every=1, select_images=5)
    trained, _ = run(config, tmp_path / "run")
    chosen = parts(trained)[1]
    assert all(chosen)
    roles = [Role.MEMBER, Role.WITHHELD]
    ids = [i for b in streams_of(config).score_batches(roles, 5) for i in b.sample_id.tolist()]
    assert len(ids) == 10 < COUNTS[Role.MEMBER]
    read = np.isin(trained.scores.sample_id, ids) | (trained.scores.role == Role.CALIBRATION)
    few = selection_metrics(trained.scores.kept(read), config.evaluation, head_trained=True)
    assert chosen[-1] == pytest.approx(few, rel=1e-5)
    whole = selection_metrics(trained.scores, config.evaluation, head_trained=True)
    assert chosen[-1] != pytest.approx(whole, rel=1e-5)


class Spoilt(MemoryStreams):
    """An image of one role cannot be scored."""

    def __init__(self, config: Config, role: Role) -> None:
        super().__init__(*data_set(), config, rank=0, world_size=1)
        self._bad = role

    def score_batches(
        self, roles: Collection[Role], most: int | None = None
    ) -> Iterator[ScoreBatch]:
        for batch in super().score_batches(roles, most):
            images = batch.images.clone()
            images[batch.role == self._bad.value] = float("nan")
            yield dataclasses.replace(batch, images=images)


@pytest.mark.parametrize(
    ("role", "words"),
    [
        (Role.WITHHELD, "selection: scores of images of D not finite in epoch 2; lower train.lr"),
        (Role.CALIBRATION, "calibration/mint_logit not finite in epoch 1; lower train.lr"),
    ],
)
def test_scores_that_are_not_finite_stop_the_run(role: Role, words: str, tmp_path: Path) -> None:
    config = looking(config_of(CONVNEXT), select_every=2)
    with pytest.raises(FloatingPointError, match=words):
        train(config, architecture_of(config), Spoilt(config, role), LocalContext(tmp_path))
    # Nobody looks there where nobody is to select.
    if role is Role.WITHHELD:
        unseen = looking(config_of(CONVNEXT))
        streams = Spoilt(unseen, role)
        train(unseen, architecture_of(unseen), streams, LocalContext(tmp_path), score=False)


class Locked(MemoryStreams):
    """Images of `test` are not given out."""

    def __init__(self, config: Config) -> None:
        super().__init__(*data_set(), config, rank=0, world_size=1)

    def score_batches(
        self, roles: Collection[Role], most: int | None = None
    ) -> Iterator[ScoreBatch]:
        if Role.TEST in roles:
            raise LookupError("test was asked for")
        for batch in super().score_batches(roles, most):
            assert not (batch.role == Role.TEST.value).any()
            yield batch


def test_a_trial_of_a_search_never_asks_for_test(tmp_path: Path) -> None:
    config = looking(config_of(CONVNEXT, train={"epochs": 2}), select_every=1)
    architecture = architecture_of(config)
    trained = train(
        config, architecture, Locked(config), LocalContext(tmp_path / "trial"), score=False
    )
    assert all(parts(trained)[1])
    with pytest.raises(LookupError, match="test was asked for"):
        train(config, architecture, Locked(config), LocalContext(tmp_path / "run"))


@pytest.mark.parametrize(("every", "kept"), [(1, [1, 2, 3]), (2, [2]), (10, [])])
def test_a_run_without_scores_ends_behind_its_last_epoch(
    every: int, kept: list[int], tmp_path: Path
) -> None:
    config = config_of(CONVNEXT, train={"epochs": 3, "checkpoint_every": every})
    scored, _ = run(config, tmp_path / "scored")
    trial, context = run(config, tmp_path / "trial", score=False)
    assert_same_weights(trial.model.state_dict(), scored.model.state_dict())
    assert parts(trial) == parts(scored)
    assert len(trial.scores) == 0 < len(scored.scores)
    assert not any(event["phase"] == "evaluate" for event in context.events)
    assert trial.seconds["evaluate"] == 0
    folders = sorted((tmp_path / "trial").iterdir())
    assert [{p.name for p in folder.iterdir()} for folder in folders] == [
        {"model.safetensors", "optimizer.pt", STATE} for _ in kept
    ]
    # One that is there already has nothing to do.
    if kept == [1, 2, 3]:
        again = LocalContext(tmp_path / "trial")
        done = train(config, architecture_of(config), streams_of(config), again, score=False)
        assert again.events == []
        assert parts(done) == parts(trial)
