"""The winner's recipe: where it is written, and when the search is shown again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch.silent import Silent

from amint_ray.config.search_schema import Paper
from amint_ray.evaluation.search import configurations
from amint_ray.launch.claim import Claim
from amint_ray.launch.search_folder import SearchFolder, SearchRecord
from amint_ray.launch.search_result import _beside_paper, shown_again
from amint_ray.storage import Location, locate, write_atomically

DONE: dict[str, Any] = {
    "best": {"number": 3},
    "recipe_file": "/elsewhere/mine-winner.yaml",
    "final": None,
    "next": "amint train /elsewhere/mine-winner.yaml",
}


class Remote(Location):
    """A folder of this disk that counts as object storage."""

    @property
    def remote(self) -> bool:
        return True


def done(tmp_path: Path, document: dict[str, Any], *, remote: bool) -> SearchFolder:
    place = locate(str(tmp_path), "test")
    if remote:
        place = Remote(**vars(place))
    record = SearchRecord("mine", "f", {}, ended=True, document=document)
    return SearchFolder(Claim(place, "search"), record)


def test_a_done_search_on_object_storage_leaves_the_recipe_where_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folder = done(tmp_path, DONE, remote=True)
    with write_atomically(folder.place, "winner.yaml") as file:
        file.write(b"name: digits\n")
    document = shown_again(folder, Silent())
    assert document["recipe_file"] == "mine-winner.yaml"
    assert document["next"] == "amint train mine-winner.yaml"
    assert (here / "mine-winner.yaml").read_text() == "name: digits\n"

    (here / "mine-winner.yaml").unlink()
    (here / "mine-winner.yaml").mkdir()  # which cannot be written
    watcher = Silent()
    document = shown_again(folder, watcher)
    assert (document["recipe_file"], document["next"]) == (None, None)
    assert "winner.yaml alone" in watcher.notices[-1]


def test_a_recipe_that_is_gone_is_not_named(tmp_path: Path) -> None:
    assert shown_again(done(tmp_path, DONE, remote=False), Silent())["recipe_file"] is None
    nothing = {**DONE, "best": None, "recipe_file": None, "next": None}
    assert shown_again(done(tmp_path, nothing, remote=False), Silent()) == nothing


def test_figures_of_a_published_table_keep_their_names_apart() -> None:
    names = (
        *("membership.member.auc", "membership.withheld.auc"),
        *("membership.member.tpr_at_fpr.0.01", "task.accuracy"),
    )
    paper = Paper.model_validate(
        {
            "source": "s",
            "rows": "mint.taps",
            "columns": "mint.hidden",
            "figures": list(names),
            "cells": {"entry": {"8": [0.1, 0.2, 0.3, 0.4], "16": [0.5, 0.6, 0.7, 0.8]}},
        }
    )
    figures = {name: {"value": i / 10, "low": 0.0, "high": 1.0} for i, name in enumerate(names)}
    trial = {
        "id": "t0000",
        "configuration": 0,
        "seed": 0,
        "baseline": False,
        "state": "done",
        "parameters": {"mint.taps": "entry", "mint.hidden": 8},
        "settings": {},
        "figures": figures,
        "violation": None,
    }
    found, missing = _beside_paper(paper, configurations([trial], []))
    labels = ["member.auc", "withheld.auc", "member.tpr_at_fpr.0.01", "accuracy"]
    assert found["paper"] == dict(zip(labels, (0.1, 0.2, 0.3, 0.4), strict=True))
    assert [found["ours"][label]["value"] for label in labels] == [0.0, 0.1, 0.2, 0.3]
    assert list(missing["paper"].values()) == [0.5, 0.6, 0.7, 0.8]
    assert missing["ours"] == dict.fromkeys(labels)
