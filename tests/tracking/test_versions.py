"""Versions in a real registry: what is listed, and which of them an alias may go to."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking.documents import CLEAN, a_document

from amint_ray.cli import main
from amint_ray.config.schema import Evaluation
from amint_ray.contracts import UserError
from amint_ray.tracking.headline import FIGURES, headline_tags, read_figure
from amint_ray.tracking.versions import (
    list_versions,
    mark_challenger,
    promote,
)


class Registry:
    """A database of MLflow's, in which a test registers versions under a name of its own."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(self.uri)
        self.run_id = self.client.create_run("0").info.run_id

    def add(self, name: str, tags: dict[str, str] | None = None) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            assert "already exists" in str(error)
        version = self.client.create_model_version(
            name, source="/nowhere", run_id=self.run_id, tags=tags, await_creation_for=0
        )
        return str(version.version)

    def holder(self, name: str, alias: str = "champion") -> str | None:
        holder = self.client.get_registered_model(name).aliases.get(alias)
        return None if holder is None else str(holder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(autouse=True)
def with_the_handlers_of_before() -> Iterator[None]:
    """The command line takes signals over."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def registry(shared: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.chdir(shared.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield shared
    for model in shared.client.search_registered_models():
        shared.client.delete_registered_model(model.name)


def tags(
    *,
    accuracy: float = 0.9,
    tpr: float | None = 0.3,
    clean: bool | None = True,
    manifest: str = "m" * 64,
) -> dict[str, str]:
    """Of a version that was measured so."""
    document = a_document(confounders=None if clean is None else {**CLEAN, "clean": clean})
    rate = {"value": tpr, "low": 0.2, "high": 0.4}
    if tpr is None:
        rate = {**dict.fromkeys(rate), "note": "2 false positives expected"}
    document["task"]["accuracy"] = {"value": accuracy, "low": 0.85, "high": 0.95}
    document["membership"]["member"]["tpr_at_fpr"]["0.01"] = rate
    return headline_tags({**document, "manifest_fingerprint": manifest})


def test_tags_give_back_every_figure_to_the_last_bit() -> None:
    document = a_document()
    written = headline_tags(document)
    assert all(key.startswith("amint.") and isinstance(v, str) for key, v in written.items())
    member, withheld = (document["membership"][role] for role in ("member", "withheld"))
    expected = {
        "task_accuracy": document["task"]["accuracy"],
        "member_auc": member["auc"],
        "member_tpr_at_fpr_1pct": member["tpr_at_fpr"]["0.01"],
        "withheld_auc": withheld["auc"],
        "withheld_tpr_at_fpr_1pct": withheld["tpr_at_fpr"]["0.01"],
    }
    assert set(expected) == set(FIGURES)
    for name, figure in expected.items():
        assert read_figure(name, written) == figure
    assert written["amint.recipe"] == "digits"
    assert written["amint.confounders_clean"] == "true"
    assert written["amint.manifest_fingerprint"] == "f" * 64
    assert written["amint.config_fingerprint"] == "c" * 16
    assert written["amint.confidence"] == "0.95"


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (a_document(head_trained=False), "lambda_mint"),
        (
            a_document(counts={**a_document()["counts"], "test": 200}),
            "2 false positives expected among 200",
        ),
        (a_document(evaluation=Evaluation(fprs=(0.05,))), "evaluation.fprs"),
    ],
)
def test_a_figure_that_is_not_reported_says_why(document: dict[str, Any], why: str) -> None:
    written = headline_tags(document)
    figure = read_figure("member_tpr_at_fpr_1pct", written)
    assert figure["value"] is None and why in figure["note"]
    assert "amint.member_tpr_at_fpr_1pct.low" not in written
    assert read_figure("task_accuracy", written) == document["task"]["accuracy"]


@pytest.mark.parametrize("found", [None, {"clean": None, "comparisons": {}}])
def test_a_check_that_was_not_made_is_unknown(found: dict[str, Any] | None) -> None:
    assert headline_tags(a_document(confounders=found))["amint.confounders_clean"] == "unknown"


def test_a_tag_that_was_written_over_is_no_figure() -> None:
    for text in ("many", "nan", "inf", ""):
        assert read_figure("member_auc", {"amint.member_auc": text})["value"] is None
    assert read_figure("member_auc", {})["note"] == "no such tag"


def test_versions_are_listed_with_figures_and_aliases(
    registry: Registry, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(11):  # 10 comes after 9
        registry.add("amint-digits", tags())
    registry.add("amint-other", tags(tpr=None, clean=None))
    registry.add("somebody-elses")
    registry.client.set_registered_model_alias("amint-digits", "champion", "9")
    registry.client.set_registered_model_alias("amint-digits", "best", "9")
    assert main(["models", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert listed == list_versions(None)
    assert [(v["name"], v["version"]) for v in listed] == [
        *(("amint-digits", version) for version in range(11, 0, -1)),
        ("amint-other", 1),
    ]
    assert [version["aliases"] for version in listed[:3]] == [[], [], ["best", "champion"]]
    first, other = listed[0], listed[-1]
    assert first["figures"]["task_accuracy"] == {"value": 0.9, "low": 0.85, "high": 0.95}
    assert first["confounders_clean"] is True and other["confounders_clean"] is None
    assert other["figures"]["member_tpr_at_fpr_1pct"]["note"] == "2 false positives expected"
    assert first["uri"] == "models:/amint-digits/11"
    assert first["status"] == "READY"
    assert first["run_id"] == registry.run_id
    assert first["recipe"] == "digits"
    assert first["registered"].endswith("+00:00")
    assert list_versions("amint-other") == [other]
    (theirs,) = list_versions("somebody-elses")  # by its name, also what is not ours
    assert theirs["recipe"] is None and theirs["figures"]["member_auc"]["note"] == "no such tag"
    assert main(["models", "amint-digits"]) == 0
    text = capfd.readouterr().out
    for part in ("best", "champion", "0.900", "clean", registry.run_id[:8]):
        assert part in text


def test_where_nothing_is_registered_the_list_is_empty(
    registry: Registry, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == []
    assert main(["models"]) == 0
    assert "no model of amint_ray" in capfd.readouterr().out


def test_the_first_version_needs_a_clean_check_alone(registry: Registry) -> None:
    registry.add("m", tags(accuracy=0.1, tpr=None))
    document = promote("m", "1")
    assert document["promoted"] and document["previous"] is None
    assert document["notes"] == ["no version was champion to compare with"]
    assert registry.holder("m") == "1"
    again = promote("m", "1")
    assert again["promoted"] and again["notes"] == ["version 1 is champion already"]


@pytest.mark.parametrize(
    ("new", "reasons"),
    [
        (tags(), []),
        (tags(accuracy=0.95, tpr=0.35), []),
        (tags(accuracy=0.89999), ["task accuracy: 0.89999 [0.850, 0.950], below 0.9 [0.850"]),
        (tags(tpr=0.2999), ["TPR at 1 % FPR, member: 0.2999 [0.200, 0.400], below 0.3 [0.200"]),
        (tags(tpr=None), ["TPR at 1 % FPR, member: not reported (2 false positives expected)"]),
        (tags(clean=False), ["confounder check: not clean"]),
        (tags(clean=None), ["confounder check: not made"]),
        (
            tags(manifest="n" * 64, accuracy=0.1),
            ["data: version 2 was measured on other images or roles"],
        ),
        (
            tags(accuracy=0.5, tpr=0.1, clean=False),
            ["confounder check: not clean", "task accuracy: 0.5 [", "TPR at 1 % FPR, member: 0.1"],
        ),
        (None, ["version 2 has no figures to compare: it lacks the tags amint.task_accuracy, "]),
    ],
)
def test_an_alias_moves_only_to_what_is_not_worse(
    registry: Registry,
    capfd: pytest.CaptureFixture[str],
    new: dict[str, str] | None,
    reasons: list[str],
) -> None:
    registry.add("m", tags())
    registry.add("m", new)
    registry.client.set_registered_model_alias("m", "champion", "1")
    assert main(["promote", "m", "2", "--json"]) == (1 if reasons else 0)
    document = json.loads(capfd.readouterr().out)
    assert document["promoted"] == (not reasons)
    assert (document["version"], document["previous"]) == (2, 1)
    assert len(document["reasons"]) == len(reasons)
    for reason, part in zip(document["reasons"], reasons, strict=True):
        assert reason.startswith(part) and "\n" not in reason
    assert registry.holder("m") == ("1" if reasons else "2")
    if reasons:
        assert main(["promote", "m", "2"]) == 1
        text = capfd.readouterr().out
        assert "version 1 still is champion" in text
        assert all(reason in text for reason in document["reasons"])


def test_other_data_are_compared_only_where_asked_for(registry: Registry) -> None:
    registry.add("m", tags())
    registry.add("m", tags(manifest="n" * 64))
    registry.add("m", tags(manifest="n" * 64, accuracy=0.1))
    promote("m", "1")
    document = promote("m", "2", other_data=True)
    assert document["promoted"] and "compared all the same" in document["notes"][0]
    promote("m", "1", other_data=True)
    (reason,) = promote("m", "3", other_data=True)["reasons"]
    assert reason.startswith("task accuracy")


def test_a_figure_that_the_holder_lacks_is_not_compared(registry: Registry) -> None:
    registry.add("m", tags(tpr=None))
    registry.add("m", tags(tpr=0.01))
    registry.add("m", tags(tpr=None, accuracy=0.95))
    promote("m", "1")
    document = promote("m", "3")  # neither has one, as without the head: accuracy decides
    assert document["promoted"]
    assert document["notes"] == [
        "TPR at 1 % FPR, member: not compared, as version 1 has none (2 false positives expected)"
    ]
    assert not promote("m", "2")["promoted"]  # its accuracy is lower
    promote("m", "1", alias="other")
    assert promote("m", "2", alias="other")["promoted"]


def test_a_holder_without_figures_is_named(registry: Registry) -> None:
    registry.add("m")
    registry.add("m", tags())
    registry.client.set_registered_model_alias("m", "champion", "1")
    (reason,) = promote("m", "2")["reasons"]
    assert reason.startswith("the holder, version 1 has no figures to compare")


def test_the_names_of_aliases_are_checked_before_anything(registry: Registry) -> None:
    registry.add("m", tags())
    for alias in ("latest", "Latest", "v3", "", "a b", "a/b", "x" * 256, "ü"):
        with pytest.raises(UserError, match="alias"):
            promote("m", "1", alias=alias)
    assert registry.client.get_registered_model("m").aliases == {}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["models", "nowhere"], ["no registered model 'nowhere'", "there are a'b, m\n"]),
        (["models", "a/b"], ["no registered model 'a/b'", "m\n"]),
        (["promote", "nowhere", "1"], ["no registered model 'nowhere'"]),
        (["promote", "m", "9"], ["m has no version '9'; there are 3, 1"]),
        (["promote", "m", "2"], ["m has no version '2'; there are 3, 1"]),  # was deleted
        (["promote", "m", "one"], ["m has no version 'one'"]),
        (["promote", "m", "0"], ["m has no version '0'"]),
        (["promote", "m", "1", "--alias=latest"], ["alias 'latest'"]),
    ],
)
def test_a_mistake_gets_one_line_that_says_what_there_is(
    registry: Registry,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    parts: list[str],
) -> None:
    for _ in range(3):
        registry.add("m", tags())
    registry.client.delete_model_version("m", "2")
    registry.add("a'b", tags())
    registry.add("somebody-elses")
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(part in captured.err for part in parts)


def test_a_name_with_an_apostrophe_can_be_asked_for(registry: Registry) -> None:
    registry.add("a'b", tags())
    assert [version["name"] for version in list_versions("a'b")] == ["a'b"]


def test_a_version_that_is_deleted_in_this_moment(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when the gate looks and gone when the alias is set."""
    for _ in range(2):
        registry.add("m", tags())
    import mlflow

    move = mlflow.MlflowClient.set_registered_model_alias

    def delete_first(self: Any, name: str, alias: str, version: str) -> None:
        registry.client.delete_model_version(name, version)
        move(self, name, alias, version)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", delete_first)
    with pytest.raises(UserError, match="m has no version '2'; there are 1"):
        promote("m", "2")
    assert registry.holder("m") is None


def test_where_there_is_no_database_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for arguments in (["models"], ["promote", "m", "1"], ["reproduce", "0" * 32]):
        assert main(arguments) == 2
        assert "there is no mlflow.db" in capfd.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_newest_version_is_the_challenger_however_late_the_older_comes(
    registry: Registry,
) -> None:
    for _ in range(3):
        registry.add("m", tags())
    assert mark_challenger(registry.client, "m", "2")
    assert not mark_challenger(registry.client, "m", "1")
    assert registry.holder("m", "challenger") == "2"
    assert mark_challenger(registry.client, "m", "3")
    assert registry.holder("m", "challenger") == "3"
    with pytest.raises(UserError, match="MLflow at"):
        mark_challenger(registry.client, "m", "4")


def test_two_promotions_at_once_leave_the_alias_at_one_of_them(registry: Registry) -> None:
    for _ in range(3):
        registry.add("m", tags())
    promote("m", "1")
    promoted: list[bool] = []

    def work(version: str) -> Callable[[], None]:
        return lambda: promoted.append(promote("m", version)["promoted"])

    threads = [threading.Thread(target=work(version)) for version in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert promoted == [True, True]
    assert registry.holder("m") in ("2", "3")
