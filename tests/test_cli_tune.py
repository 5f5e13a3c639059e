"""`amint tune`: what it shows without searching, and how it takes mistakes."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from amint_ray.cli import main
from amint_ray.contracts import UserError

SHIPPED = Path(__file__).parents[1] / "tune_configs"
CONTENT: dict[str, Any] = {
    "recipe": "digits",
    "settings": {"tracking.enabled": False},
    "space": {"mint.hidden": {"choice": [16, 32]}, "loss.lambda_mint": {"loguniform": [0.01, 1]}},
}
PHASES = ("starting", "checking", "opening", "reading")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder, with Ray forbidden and this process's signal handlers restored."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refuse(*args: object, **options: object) -> NoReturn:
        raise UserError("Ray would start")

    monkeypatch.setattr("amint_ray.launch.tune_run.connect", refuse)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield here
    for number, handler in handlers.items():
        signal.signal(number, handler)


def file(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return str(path)


def complaint(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake ends with; nothing on stdout, nothing left in the folder."""
    assert main(["tune", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = [
        line
        for line in captured.err.splitlines()
        if not line.startswith(tuple(f"amint: {phase}" for phase in PHASES))
    ]
    assert len(lines) == 1, lines
    assert not list(Path.cwd().iterdir())
    return lines[0].removeprefix("amint: ")


@pytest.mark.parametrize(
    ("changes", "overrides", "says"),
    [
        ({"space": {"mint.hiden": 3}}, [], "unknown key 'mint.hiden', did you mean 'mint.hidden'"),
        ({"space": {"mint.hidden": {"choice": []}}}, [], "space.mint.hidden: the choice is empty"),
        ({"space": {"mint.taps": {"choice": ["entry", "stage.7"]}}}, [], "'stage.7'"),
        ({"space": {"mint.taps": {"modules": {"count": 2, "among": "x"}}}}, [], "match 'x'"),
        ({"constraint": {"metric": "task.accuracy"}}, [], "give one of at_least, at_most"),
        ({}, ["budget.trails=3"], "did you mean 'budget.trials'"),
        ({}, ["algorithm.name=grid"], "a grid cannot have all numbers"),
        ({}, ["cluster.workers=999"], "cluster.workers = 999"),
        ({"recipe": "digit"}, [], "did you mean 'digits'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    overrides: list[str],
    says: str,
) -> None:
    elsewhere = f"storage.path={tmp_path}/kept"
    assert says in complaint(capfd, file(tmp_path, **changes), elsewhere, *overrides)
    if not any("workers" in override for override in overrides):
        assert says in complaint(capfd, file(tmp_path, **changes), *overrides, "--dry-run")


def test_a_dry_run_looks_at_storage_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    mine = file(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for path, says in (
        ("gs://bucket/runs", "storage.path = 'gs://bucket/runs': cannot be reached; write a local"),
        (f"{tmp_path}/file/runs", f"storage.path: cannot write to '{tmp_path}/file/runs'"),
        (f"{tmp_path}/file", f"storage.path: cannot write to '{tmp_path}/file'"),
    ):
        assert says in complaint(capfd, mine, f"storage.path={path}", "--dry-run")
    assert main(["tune", mine, f"storage.path={tmp_path}/to/be/made", "--dry-run", "--json"]) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_no_search_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert "'digits' is no YAML file" in complaint(capfd, "digits")
    assert "no file 'none.yaml'" in complaint(capfd, "none.yaml", "--dry-run")


def test_a_metric_that_no_trial_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    arguments = [f"storage.path={kept}", "data.shares.calibration=0.08"]

    def told(metric: str) -> str:
        limit = {"metric": metric, "at_least": 0.5}
        return complaint(capfd, file(tmp_path, constraint=limit), *arguments)

    text = told("membership.member.tpr_at_fpr.0.001")
    assert "constraint on 'membership.member.tpr_at_fpr.0.001': no trial reports that" in text
    assert "there are membership.member." in text and text.endswith(" more")
    # Nothing is in the way of the search as it was meant.
    assert told("task.accuracy") == "Ray would start"
    assert not (kept / "searches").exists()


def test_another_search_has_the_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    (kept / "searches/mine").mkdir(parents=True)
    record = {"name": "mine-1", "fingerprint": "0" * 16, "identity": {"seeds": 9}}
    (kept / "searches/mine/search.json").write_text(json.dumps(record))
    text = complaint(capfd, file(tmp_path), f"storage.path={kept}")
    assert f"{kept}/searches/mine belongs to another search" in text


def test_a_file_in_the_place_of_storage_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").touch()
    arguments = (file(tmp_path), f"storage.path={tmp_path}/afile")
    told = complaint(capfd, *arguments)
    assert told == complaint(capfd, *arguments, "--dry-run")
    assert told.startswith(f"storage.path: cannot write to '{tmp_path}/afile'")


def test_a_dry_run_sees_what_the_search_would_be_refused_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    arguments = (file(tmp_path), f"storage.path={kept}", "--dry-run")
    nowhere = ("data.source=folder", f"data.path={tmp_path}/none")
    assert "none': there is no such file or folder" in complaint(capfd, *arguments, *nowhere)
    (kept / "searches/mine").mkdir(parents=True)
    record = kept / "searches/mine/search.json"
    for text, says in (
        ("{", f"{record} is damaged"),
        (
            json.dumps({"name": "mine-1", "fingerprint": "0", "identity": {}}),
            "belongs to another search",
        ),
    ):
        record.write_text(text)
        assert says in complaint(capfd, *arguments)
        assert main(["tune", *arguments, "--new", "--json"]) == 0  # goes beside it
        capfd.readouterr()


def test_a_dry_run_tells_of_a_search_that_is_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from amint_ray.config.search import identity, load_search, search_fingerprint

    kept = tmp_path / "kept"
    search = load_search(file(tmp_path), [f"storage.path={kept}"])
    (kept / "searches/mine").mkdir(parents=True)
    record = {"fingerprint": search_fingerprint(search), "identity": identity(search)}
    (kept / "searches/mine/search.json").write_text(json.dumps({"name": "mine-1", **record}))
    assert main(["tune", file(tmp_path), f"storage.path={kept}", "--dry-run", "--json"]) == 0
    told = capfd.readouterr().err
    assert f"{kept}/searches/mine has this search already, 0 trials of which have ended" in told
    assert "this command would go on with it" in told


def test_a_search_that_is_done_gives_what_it_gave(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from amint_ray.config.search import identity, load_search, search_fingerprint
    from amint_ray.launch.search_folder import spent

    kept = tmp_path / "kept"
    search = load_search(file(tmp_path), [f"storage.path={kept}"])
    (kept / "searches/mine").mkdir(parents=True)
    record = {
        "name": "mine-1",
        "fingerprint": search_fingerprint(search),
        "ended": True,
        "spent": spent(search),
        "identity": identity(search),
        "document": {"best": {"number": 3}, "final": None, "recipe_file": "/gone/winner.yaml"},
    }
    (kept / "searches/mine/search.json").write_text(json.dumps(record))
    assert main(["tune", file(tmp_path), f"storage.path={kept}", "--json"]) == 0
    captured = capfd.readouterr()
    nothing = {"final": None, "recipe_file": None, "next": None}  # its file is not there any more
    assert json.loads(captured.out) == {"best": {"number": 3}, **nothing}
    assert "this search is done" in captured.err
    assert "checking" not in captured.err


def test_a_dry_run_shows_the_first_trials(capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(SHIPPED / "digits.yaml", "mine.yaml")
    arguments = ["tune", "mine.yaml", "budget.trials=4", "cluster.cpus_per_worker=1"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["search"] == "mine"
    assert document["planned"] == 5
    assert document["concurrent"] >= 1
    assert document["next"] == "amint tune mine.yaml budget.trials=4 cluster.cpus_per_worker=1"
    plain, *trials = document["trials"]
    assert (plain["id"], plain["baseline"]) == ("plain-0", True)
    assert plain["settings"] == {"loss.lambda_mint": 0}
    assert [trial["id"] for trial in trials] == ["t0000", "t0001", "t0002", "t0003"]
    for trial in trials:
        assert set(trial["parameters"]) == {"placement", "loss.lambda_mint"}
        assert set(trial["settings"]) == {"mint.taps", "loss.lambda_mint"}
        assert 0.01 <= trial["settings"]["loss.lambda_mint"] <= 3
    assert main([*arguments, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert all(trial["id"] in shown for trial in document["trials"])
    assert document["next"] in " ".join(shown.split())
    assert [path.name for path in Path.cwd().iterdir()] == ["mine.yaml"]
