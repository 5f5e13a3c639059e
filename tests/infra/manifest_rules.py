"""What the files of infra/ must keep to: each rule gives a line for every breach it finds."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from amint_ray.config.load import load_config
from amint_ray.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"


def read(name: str) -> str:
    """A file of infra/."""
    return (INFRA / name).read_text(encoding="utf-8")


class StrictLoader(yaml.SafeLoader):
    """A key that stands twice in a mapping is an error; YAML itself lets the last one win."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands there twice", node.start_mark
                )
        super().flatten_mapping(node)


def documents(text: str) -> list[Any]:
    return list(yaml.load_all(text, StrictLoader))


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree, from the outside in."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            yield from mappings(child)


def bash_problem(snippet: str) -> str:
    """What bash has against it; nothing is run."""
    done = subprocess.run(["bash", "-n"], input=snippet, capture_output=True, text=True)
    return done.stderr.strip()


def configuration_of(entrypoint: str) -> Config:
    """What `amint train` would run; it raises UserError if it would not."""
    words = shlex.split(entrypoint)
    assert words[:2] == ["amint", "train"], entrypoint
    return load_config(words[2], words[3:])


# Images

_IMAGE = re.compile(r"(?P<name>[a-z0-9./_:-]+?):(?P<tag>[A-Za-z0-9._-]+)")


def image_problems(image: str) -> list[str]:
    match = _IMAGE.fullmatch(image)
    if match is None:
        return [f"{image}: no tag"]
    found = []
    if "latest" in match["tag"] or not re.search(r"\d", match["tag"]):
        found.append(f"{image}: the tag is not pinned")
    first, slash, _ = match["name"].partition("/")
    if slash and re.search(r"[.:]|^localhost$", first):
        found.append(f"{image}: names a registry")
    return found


# Secrets

_SECRET_NAME = re.compile(
    r"token|secret|passw|pwd$|(access|api|private|auth|account)_?key|credential", re.IGNORECASE
)
_SECRET_VALUE = {
    "an AWS key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a password in an address": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
    "a token": re.compile(r"\b([0-9a-f]{32,}|(gh[pousr]|hf|sk)[_-][A-Za-z0-9]{20,}|eyJ[\w-]{20,})"),
    "a credential on a command line": re.compile(
        r"--[\w-]*(auth-key|password|token|secret|access-key)[\w-]*[=, ]+[^\s,=<$]"
    ),
    "an account": re.compile(r"\b\d{12}\b"),
}


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of every scalar, and of what Kubernetes writes as `name:` and `value:`."""
    for mapping in mappings(tree):
        if "name" in mapping and "value" in mapping:
            yield mapping["name"], mapping["value"]
        for key, value in mapping.items():
            if isinstance(value, str | int) and not isinstance(value, bool):
                yield str(key), value


def _is_reference(name: str, value: str) -> bool:
    """To a variable that must be set, a file, another object, or nothing yet."""
    variables = re.sub(r"\$\{\w+:\?[^}]*\}", "", value)
    if variables != value:
        return not re.search(r"[A-Za-z0-9]", variables)
    if name == "secretName":  # of an object
        return True
    if re.search(r"_(PATH|FILE)$", name) or name.endswith("/auth_token"):
        return value.startswith(("/", "~/"))
    return name == "RAY_AUTH_MODE" or bool(re.fullmatch(r"<[^<>]+>", value))


def credentials(text: str) -> list[str]:
    """What looks like one, in any file."""
    return [
        f"{what}: {match[0][:12]}…"
        for what, pattern in _SECRET_VALUE.items()
        if (match := pattern.search(text))
    ]


def secret_problems(text: str) -> list[str]:
    """Credentials written down, in a YAML file."""
    found = credentials(text)
    for tree in documents(text):
        for name, value in _named(tree):
            if _SECRET_NAME.search(name) and not _is_reference(name, str(value)):
                found.append(f"{name} has a value")
        if isinstance(tree, dict) and tree.get("kind") == "Secret":
            for name, value in {**tree.get("data", {}), **tree.get("stringData", {})}.items():
                if not re.fullmatch(r"<[^<>]+>", str(value)):
                    found.append(f"Secret {tree['metadata']['name']}: {name} has a value")
    return sorted(set(found))


# Compose


def compose_problems(tree: dict[str, Any], text: str, variables: set[str]) -> list[str]:
    """What is wrong with a compose file.

    Args:
        tree: the file, read.
        text: the same as it stands there.
        variables: those that env.example names.
    """
    services = tree["services"]
    found = [f"{v} is not in env.example" for v in {*re.findall(r"\$\{(\w+)", text)} - variables]
    if re.search(r"\$\{\w+(?!\w*:\?)", text):
        found.append("a variable may be left empty")
    for part in ("volumes", "secrets"):
        used = {
            (entry if isinstance(entry, str) else entry["source"]).partition(":")[0]
            for service in services.values()
            for entry in service.get(part, [])
        }
        found += [f"{part}: {name} is not declared" for name in used - {*tree.get(part, {})}]
        found += [f"{part}: {name} is not used" for name in {*tree.get(part, {})} - used]
    for name, service in services.items():
        found += [f"{name}: {problem}" for problem in _service_problems(service, services)]
    return found


def _service_problems(service: dict[str, Any], services: dict[str, Any]) -> Iterator[str]:
    for other, how in service.get("depends_on", {}).items():
        condition = how["condition"]
        if other not in services:
            yield f"there is no {other}"
        elif condition == "service_healthy" and "healthcheck" not in services[other]:
            yield f"{other} has no health check"
        elif condition == "service_completed_successfully" and services[other]["restart"] != "no":
            yield f"{other} never completes"
        elif condition not in ("service_healthy", "service_completed_successfully"):
            yield f"does not wait for {other}"
    for port in service.get("ports", []):
        if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
            yield f"port {port} is not on 127.0.0.1 alone"
    for key, value in service.get("environment", {}).items():
        if isinstance(value, bool):
            yield f"{key} is a boolean, which Compose refuses; quote it"
    if service["restart"] != "no" and "healthcheck" not in service:
        yield "no health check"
    if "RAY_AUTH_TOKEN_PATH" in service.get("environment", {}):
        if "shm_size" not in service:
            yield "no shm_size"
        path = Path(service["environment"]["RAY_AUTH_TOKEN_PATH"])
        if path.parent != Path("/run/secrets") or path.name not in service.get("secrets", []):
            yield "its token is not one of its secrets"
        if service["environment"].get("RAY_AUTH_MODE") != "token":
            yield "asks for no token"


# Dockerfile


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and the rest, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines()]


def base_images(text: str) -> list[str]:
    """What the stages stand on, build arguments at their defaults; no stage of the file itself."""
    steps = instructions(text)
    defaults = dict(rest.split("=", 1) for word, rest in steps if word == "ARG" and "=" in rest)
    found = []
    for word, rest in steps:
        image = re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], rest.split()[0]) if rest else ""
        if word == "FROM" and not re.search(rf"^FROM .* AS {image}$", text, re.MULTILINE):
            found.append(image)
    return found


def dockerfile_problems(text: str, ignored: str, root: Path) -> list[str]:
    """What is wrong with a Dockerfile.

    Args:
        text: the file.
        ignored: .dockerignore, of the form "nothing but".
        root: the build's context.
    """
    steps = instructions(text)
    found = [problem for image in base_images(text) for problem in image_problems(image)]
    users = [rest for word, rest in steps if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        found.append("does not end as a numbered user other than root")
    if not any(word == "FROM" and "${CUDA_VERSION}" in rest for word, rest in steps):
        found.append("no build argument for CUDA")
    kept = [line[1:] for line in ignored.splitlines() if line.startswith("!")]
    if "*" not in ignored.splitlines():
        found.append("the whole folder goes into the build")
    for word, rest in steps:
        if word in ("ADD", "ENTRYPOINT", "HEALTHCHECK"):
            found.append(f"has {word}")
        if word == "COPY":
            for source in [part for part in rest.split()[:-1] if not part.startswith("--")]:
                if not (root / source).exists():
                    found.append(f"copies {source}, which is not there")
                elif not any(fnmatch(source, pattern) for pattern in kept):
                    found.append(f"copies {source}, which .dockerignore keeps out")
        if word == "RUN":
            found += [f"RUN: {problem}" for problem in _run_problems(rest)]
    return found


def _run_problems(line: str) -> Iterator[str]:
    if problem := bash_problem(line):
        yield problem
    for command in re.split(r"&&|;", line):
        if "pip install" not in command:
            continue
        if "--constraint constraints.txt" not in command:
            yield "installs without the constraints"
        if "uv pip install" in command and "--compile-bytecode" not in command:
            yield "installs without compiling"
        if "[dev]" in command or "--extra dev" in command:
            yield "installs what is for development"
        if re.search(r"--(extra-)?index-url|https?://", command):
            yield "installs from elsewhere than the package index"
