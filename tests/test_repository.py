"""Files beside the code that must keep in step with it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from amint_ray.attacks.methods import METHODS, chosen
from amint_ray.config.attack import load_attack
from amint_ray.config.load import load_config, recipe_names
from amint_ray.config.search import load_search
from amint_ray.launch.earlier import check_overrides

ROOT = Path(__file__).parent.parent


def test_constraints_pin_versions_and_hold_no_address() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[^\s/:@]+( ; .+)?", line), line


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/search.md", "docs/attacks.md"],
)
def test_links_and_paths_in_the_documentation_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_commands_in_the_readme_take_their_arguments() -> None:
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "infra/README.md"))
    text = text.replace("\\\n", " ")
    commands = re.findall(r"(?:amint|submit --) (?:train|config|prepare) (?!RECIPE)(\w.*)", text)
    assert len(commands) >= 15
    for command in commands:
        words = re.sub(r"[`>].*|#.*", "", command).split(None, 1)
        assert words[0] in {*recipe_names(), "mine.yaml", "folder"}, command
        if words[0] not in recipe_names():
            continue
        rest = words[1] if len(words) > 1 else ""
        overrides = [o.strip("'") for o in re.findall(r"'[^']+'|\S+=\S+", rest)]
        load_config(words[0], overrides)


def test_searches_in_the_documentation_take_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "infra/README.md"))
    explained = (ROOT / "docs/search.md").read_text()
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"amint tune (\w\S*\.yaml) *([^#\n]*)", text)
    assert len(commands) >= 5
    asked = {(Path(file).name, *re.findall(r"\S+=\S+", rest)) for file, rest in commands}
    for file, *overrides in asked:
        load_search(f"tune_configs/{file}", overrides)
    for shipped in (ROOT / "tune_configs").iterdir():
        assert f"`{shipped.name}`" in explained
    (example,) = re.findall(r"```yaml\n(.*?)```", explained, re.DOTALL)
    (tmp_path / "example.yaml").write_text(example)
    load_search(str(tmp_path / "example.yaml"))


def test_attacks_in_the_documentation_take_their_arguments() -> None:
    explained = (ROOT / "docs/attacks.md").read_text()
    text = (ROOT / "README.md").read_text() + explained
    commands = re.findall(r"^(?:\.venv/bin/)?amint attack (\S+) *([^#\n]*)", text, re.MULTILINE)
    assert len(commands) >= 6
    for model, rest in commands:
        assert re.fullmatch(r"models:/[a-z0-9-]+(/\d+|@[a-z]+)|RUN_ID", model), model
        for methods in re.findall(r"--methods (\S+)", rest):
            chosen(methods)
        _, elsewhere = load_attack(re.findall(r"\S+=\S+", rest))
        check_overrides(elsewhere)
        load_config("imagenet1k_vit_base", elsewhere)
    for name in METHODS:
        assert re.search(rf"^\|.*`{name}`.*\|", explained, re.MULTILINE), name


def test_what_is_sent_as_a_job_may_take_its_time_to_stop() -> None:
    """Ray's own three seconds are too few to end the workers and the MLflow run."""
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "infra/README.md"))
    commands = re.findall(r"ray job submit (?!`|exits).*--(?= )", text.replace("\\\n", " "))
    assert len(commands) >= 6
    for command in commands:
        way = r"--runtime-env infra/runtime_env.yaml|RAY_JOB_STOP_WAIT_TIME_S"
        assert re.search(way, command), command
    for file in ("infra/runtime_env.yaml", "infra/kubernetes/rayjob.yaml"):
        assert 'RAY_JOB_STOP_WAIT_TIME_S: "60"' in (ROOT / file).read_text()


def test_make_help_lists_the_targets() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True)
    for target in ("setup", "train", "test", "lint", "clean"):
        assert re.search(rf"^{target} ", done.stdout, re.MULTILINE), done.stdout
