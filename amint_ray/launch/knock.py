"""Whether a Ray cluster answers at an address, takes the token and has our versions; in seconds.

Ray itself tries for 20 s to be let in, for ever where another program answers, and aborts its
process where the token's file is missing.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version

from amint_ray.contracts import UserError

SECONDS_TO_ANSWER = 15.0
_SECONDS_TO_CONNECT = 5.0
_KNOCK = """
import json, sys
try:
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient
    ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    client = GcsClient(address=sys.argv[1])
    from ray._common.usage.usage_lib import get_cluster_metadata
    said = get_cluster_metadata(client)
except BaseException as error:
    said = {"error": type(error).__name__, "text": str(error)}
print(json.dumps(said))
"""


def check_address(address: str, seconds: float = SECONDS_TO_ANSWER) -> None:
    """Find out whether a run could join.

    Args:
        address: `host:port`; of `auto` and `ray://…` Ray finds out by itself.
        seconds: that the cluster has to answer.

    Raises:
        UserError: it could not; the text says why and what to do.
    """
    if address == "auto":
        return
    where = f"cluster.address = {address!r}"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: no Ray cluster answers there ({error}); give host:port of a running one, "
            "or leave cluster.address and RAY_ADDRESS empty"
        ) from error
    if address.startswith("ray://"):
        return
    said = _knock(address, seconds)
    if said is None:
        raise UserError(
            f"{where}: somebody answers there, but not as a Ray cluster does; write the port of "
            "its head (6379 by default), not the dashboard's"
        )
    if "error" in said:
        raise UserError(f"{where}: {_refused(said['error'], said['text'])}")
    if other := other_versions(said):
        raise UserError(f"{where}: {other}")


def _knock(address: str, seconds: float) -> dict[str, str] | None:
    """Ask a cluster's head for its versions, in a process that can be ended and talks to nobody.

    Returns:
        `ray_version` and `python_version`; or `error` and `text`; None where no Ray answered.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _KNOCK, address],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return None
    except (IndexError, ValueError, TypeError):  # not a word of Python's
        return {"error": "RayError", "text": f"Ray's client ended with {done.returncode}"}


def _refused(error: str, text: str) -> str:
    if error != "AuthenticationError":
        return f"{error}: {text.strip().splitlines()[0] if text.strip() else 'no message'}"
    if "InvalidAuthToken" in text:
        mode = os.environ.get("RAY_AUTH_MODE", "disabled")
        shown = "the token shown is not its own" if mode == "token" else f"RAY_AUTH_MODE={mode}"
        return (
            f"the cluster refuses the token ({shown}); set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH=FILE or RAY_AUTH_TOKEN to what the head was started with"
        )
    return text.split(". ")[0]


def other_versions(cluster: Mapping[str, str | None]) -> str | None:
    """In what a cluster differs from us, in words: Ray wants the same versions, to the last digit.

    Args:
        cluster: `ray_version` and `python_version`, as far as they are known.
    """
    ours = {"ray_version": version("ray"), "python_version": platform.python_version()}
    for key, name in (("ray_version", "Ray"), ("python_version", "Python")):
        theirs = cluster.get(key)
        if theirs is not None and theirs != ours[key]:
            return (
                f"the cluster has {name} {theirs}, this machine {ours[key]}; they must be the "
                "same: use the cluster's image here, or install the other version"
            )
    return None
