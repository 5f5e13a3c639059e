"""Finding secrets where they must not be, and keeping them out of what is printed.

Ray shows a job's command and runtime environment to everyone who may see its jobs and logs. The
nodes must have the credentials themselves. Needs nothing but Python: nodes run it, too.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# `?signature=`, as in an address that was signed, opens what it names, too.
_NAME = (
    r"SECRET|PASSW|PASSPHRASE|TOKEN(?!IZ)|CREDENTIAL|SIGNATURE|KEY(?!BOARD|WORD)"
    r"|AUTHORIZATION|(?<=\w)(?<!OLD)PWD"  # PWD and OLDPWD are working directories
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_NAME_OF_A_PATH = re.compile(r"_(PATH|FILE|DIR)$", re.IGNORECASE)
# The password may hold a slash, as AWS's often do; `host:80/a@b` has none.
_IN_ADDRESS = re.compile(r"(?<=://)[^\s@/:?]*:(?!\d{1,5}/)[^\s@]+(?=@)|(?<=://)[^\s@/:?]{20,}(?=@)")
_IN_QUERY = re.compile(rf"(?<=[?&])([\w.-]*(?:{_NAME})[\w.-]*)=[^&\s]+", re.IGNORECASE)
_SECRET_VALUES = (
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(r"\b(?:gh[opsu]_|github_pat_|hf_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}"),
    re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}"),  # a JSON web token
    re.compile(r"\bBearer\s+\S{8,}"),
    re.compile(r"\bBasic\s+(?=\S*\d)[\w+/]{8,}=*"),  # user:password in base 64
)
_ASSIGNMENT = re.compile(r"(?:^|[\s;=])([A-Za-z_]\w*)=(\S+)")
_SHORTEST = 6
"""Characters of a secret that is worth hiding; shorter ones are parts of words."""


def holds_secret(text: str) -> bool:
    """Whether a text holds credentials: `scheme://user:password@`, `?secret=…`, a known kind."""
    return any(
        pattern.search(text) for pattern in (_IN_ADDRESS, _IN_QUERY, *_SECRET_VALUES)
    ) or any(_names_secret(name) for name, _ in _ASSIGNMENT.findall(text))


def secret_arguments(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command that hold credentials, by key or position, without the value."""
    found = []
    for place, argument in enumerate(arguments, start=1):
        if holds_secret(argument):
            key, equals, _ = argument.partition("=")
            named = equals and re.fullmatch(r"[\w.-]+", key)
            found.append(key if named else f"argument {place}")
    return found


def secrets_in_runtime_env(environment: Any, variable: str | None = None) -> list[str]:
    """Where in a runtime environment something looks like a secret, as `env_vars.NAME`.

    Args:
        environment: as it stands in a file.
        variable: one that is known to hold a secret, whatever it is called.
    """
    return list(_walk(environment, (), variable))


def _walk(node: Any, path: tuple[str, ...], variable: str | None) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            below = (*path, str(key))
            scalar = not isinstance(value, dict | list | None)
            secret = _names_secret(str(key)) or key == variable
            if path[-1:] == ("env_vars",) and scalar and str(value) and secret:
                yield ".".join(below)
            else:
                yield from _walk(value, below, variable)
    elif isinstance(node, list | tuple):
        for place, value in enumerate(node):
            yield from _walk(value, (*path, str(place)), variable)
    elif isinstance(node, str) and holds_secret(node):
        yield ".".join(path)


def _names_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _NAME_OF_A_PATH.search(name)


def scrub(text: str) -> str:
    """The text without what this process knows to be secret, and what looks like it."""
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _IN_ADDRESS.sub("***", text)
    text = _IN_QUERY.sub(r"\1=***", text)
    for pattern in _SECRET_VALUES:
        text = pattern.sub("***", text)
    return _ASSIGNMENT.sub(_without_value, text)


def _without_value(assignment: re.Match[str]) -> str:
    if not _names_secret(assignment[1]):
        return assignment[0]
    return assignment[0].removesuffix(assignment[2]) + "***"


def _known() -> set[str]:
    known = {value for name, value in os.environ.items() if _names_secret(name)}
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError, ValueError):
        known.add(Path(token).read_text(encoding="utf-8").strip())
    return {value for value in known if len(value) >= _SHORTEST}
