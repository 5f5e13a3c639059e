"""The real parts on one machine: Ray with three raylets, S3, PostgreSQL, MLflow.

S3, MLflow and Ray's dashboard listen on loopback, PostgreSQL on a socket file. Ray's own ports are
open to the network, as Ray has no setting for that, and answer to nobody without the token.
Without root and without containers, from packages of the Python index. What a user's own cluster
needs of it is only what `LocalStack.environment` holds: addresses and credentials.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from infra.local import parts
from infra.local.object_store import ObjectStore
from infra.local.processes import Server, start_server, stop_server, wait_until_ready

BUCKETS = ("mlflow", "amint")
"""Made at the first start: MLflow's artifacts, and one for data and runs."""
_SECONDS_TO_START = 90.0
_POLITE = 5.0
"""Seconds that a raylet is given to end by itself."""
_MASKED = ("SECRET", "TOKEN", "PASSWORD", "KEY")


class StackError(Exception):
    """The stack cannot be started or stopped; its text says why, in one line."""


class LocalStack:
    """One head and some worker raylets with a token, an S3 server, PostgreSQL and MLflow.

    As a context manager the stack ends with the body, and its processes with this one, however it
    ends. Otherwise `up` starts what outlives this process, and `down`, called by anyone who names
    the same folder, ends it. Buckets, database, token and keys stay in the folder for the next
    start.

    Attributes:
        folder: all state and logs.
        nodes: by name ("head", "worker-1", …), the process whose end is that node's end.
    """

    def __init__(
        self, folder: str | Path, *, workers: int = 2, cpus: int = 2, ray: bool = True
    ) -> None:
        """Name the folder; nothing is started.

        Args:
            folder: of its state.
            workers: raylets beside the head's.
            cpus: that each raylet, the head's included, tells Ray it has.
            ray: whether there is Ray at all, and not S3, PostgreSQL and MLflow alone.
        """
        self.folder = Path(folder).absolute()
        self.nodes: dict[str, Server] = {}
        self._workers, self._cpus, self._ray = workers, cpus, ray
        self._servers: dict[str, Server] = {}
        self._detached = True
        self._environment: dict[str, str] = {}
        self._state = self.folder / "state.json"
        self.object_store = ObjectStore(self.folder / "s3")

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client needs to find and use all of it; secret."""
        return self._environment

    def up(self) -> bool:
        """Start what does not run.

        Returns:
            Whether anything had to be started.

        Raises:
            StackError: a part does not start.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._read_state()
            if self._servers and all(server.process for server in self._servers.values()):
                return False
            self._end()
            try:
                self._start()
            except BaseException as error:
                self._end()
                if isinstance(error, RuntimeError | OSError):
                    raise StackError(str(error)) from error
                raise
        return True

    def down(self) -> bool:
        """End all of it, and wait until it is gone.

        Returns:
            Whether anything ran.
        """
        if not self.folder.is_dir():
            return False
        with self._alone():
            self._read_state()
            ran = any(server.process for server in self._servers.values())
            self._end()
        return ran

    def status(self) -> dict[str, dict[str, Any]]:
        """By part: `pid`, `running` and `address`."""
        self._read_state()
        addresses = {
            "s3": self._environment.get("AWS_ENDPOINT_URL"),
            "mlflow": self._environment.get("MLFLOW_TRACKING_URI"),
            "ray-head": self._environment.get("RAY_ADDRESS"),
        }
        return {
            name: {
                "pid": server.pid,
                "running": server.process is not None,
                "address": addresses.get(name),
            }
            for name, server in self._servers.items()
        }

    def add_node(self, name: str) -> None:
        """Start a worker raylet and wait until the cluster has it.

        Raises:
            RuntimeError: it does not start.
        """
        log = self.folder / f"ray-{name}.log"
        for tries_left in (1, 0):  # on a busy machine one now and then never gets under way
            log.unlink(missing_ok=True)
            command = parts.worker_command(self._environment["RAY_ADDRESS"], cpus=self._cpus)
            server = start_server(
                command, log=log, environment=self._child_environment(), detached=self._detached
            )
            self._keep(f"ray-{name}", server)
            try:
                wait_until_ready(
                    f"raylet {name}",
                    server,
                    lambda: b"until terminated" in (said := log.read_bytes()) or b"--block" in said,
                    log=log,
                    seconds=_SECONDS_TO_START,
                )
                return
            except RuntimeError:
                if not tries_left:
                    raise
                self.remove_node(name, signal.SIGKILL)

    def remove_node(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a worker raylet: politely, or as a machine that dies (SIGKILL)."""
        server = self.nodes.pop(name)
        self._servers.pop(f"ray-{name}")
        self._write_state()
        process = server.process
        if process is not None and how == signal.SIGKILL:
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(Exception):
                    one.kill()
        stop_server(server, how=how, seconds=_POLITE)

    def __enter__(self) -> Self:
        self._detached = False
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise StackError(f"{self.folder}: another command is starting or stopping it") from None

    def _start(self) -> None:
        """One part after the other, but MLflow beside Ray."""
        keys, token = self._secrets()
        self.object_store = ObjectStore(self.folder / "s3", keys=keys, detached=self._detached)
        self.object_store.start()
        assert self.object_store.server is not None
        self._keep("s3", self.object_store.server)
        for bucket in BUCKETS:
            self.object_store.make_bucket(bucket)
        self._environment = {
            **self.object_store.environment,
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{parts.free_port()}",
        }
        if self._ray:
            self._environment |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                "RAY_ADDRESS": f"127.0.0.1:{parts.free_port()}",
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{parts.free_port()}",
            }
        self._start_postgres()
        with ThreadPoolExecutor(1) as pool:
            # Started from this thread: what is not detached ends with the thread that started it.
            ready: Future[None] = pool.submit(self._start_mlflow())
            if self._ray:
                self._start_head()
                for number in range(1, self._workers + 1):  # two at once, and one of them dies
                    self.add_node(f"worker-{number}")
            ready.result()
        self._write_state()

    def _secrets(self) -> tuple[tuple[str, str], Path]:
        """S3 keys and the file with Ray's token; the same at each start."""
        file, token = self.folder / "keys.json", self.folder / "ray_token"
        if not file.exists():
            parts.write_private(file, json.dumps([secrets.token_hex(10), secrets.token_hex(20)]))
        if not token.exists():
            parts.write_private(token, secrets.token_hex(16))
        access, secret = json.loads(file.read_text())
        return (access, secret), token

    def _start_postgres(self) -> None:
        sockets = Path(tempfile.mkdtemp(prefix="amint-pg-"))
        self._keep_folder("postgres_sockets", sockets)
        data, log = self.folder / "postgres", self.folder / "postgres.log"
        command, user = parts.postgres_command(data, sockets)
        if user is not None:
            shutil.chown(sockets, user)
        server = start_server(
            command,
            log=log,
            environment=os.environ,
            detached=self._detached,
            user=user,
            cwd=data,
        )
        self._keep("postgres", server)
        wait_until_ready(
            "PostgreSQL",
            server,
            lambda: parts.postgres_answers(sockets),
            log=log,
            seconds=_SECONDS_TO_START,
        )

    def start_mlflow(self) -> None:
        """Start MLflow again, where it was.

        Raises:
            RuntimeError: it does not start.
        """
        self._start_mlflow()()

    def kill_mlflow(self) -> None:
        """End MLflow as a machine that dies does."""
        server = self._servers.pop("mlflow")
        self._write_state()
        stop_server(server, how=signal.SIGKILL)

    def _start_mlflow(self) -> Callable[[], None]:
        """Gives what waits until it answers."""
        uri, sockets = self._environment["MLFLOW_TRACKING_URI"], self.folder / "postgres_sockets"
        log = self.folder / "mlflow.log"
        log.unlink(missing_ok=True)
        environment = self._child_environment() | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that nobody needs
            "MLFLOW_S3_ENDPOINT_URL": self.object_store.address,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        del environment["MLFLOW_TRACKING_URI"]
        server = start_server(
            parts.mlflow_command(int(uri.rpartition(":")[2]), sockets.resolve()),
            log=log,
            environment=environment,
            detached=self._detached,
            cwd=self.folder,
        )
        self._keep("mlflow", server)
        return functools.partial(
            wait_until_ready,
            "MLflow",
            server,
            lambda: parts.http_answers(f"{uri}/health"),
            log=log,
            seconds=_SECONDS_TO_START,
        )

    def _start_head(self) -> None:
        log = self.folder / "ray-head.log"
        log.unlink(missing_ok=True)
        # Its sockets' paths must be short, so Ray's own folder cannot be below ours.
        ray_folder = Path(tempfile.mkdtemp(prefix="amint-ray-"))
        self._keep_folder("ray", ray_folder)
        command = parts.head_command(
            self._environment["RAY_ADDRESS"],
            int(self._environment["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]),
            ray_folder,
            cpus=self._cpus,
        )
        server = start_server(
            command, log=log, environment=self._child_environment(), detached=self._detached
        )
        self._keep("ray-head", server)
        url = f"{self._environment['RAY_API_SERVER_ADDRESS']}/api/version"
        token = (self.folder / "ray_token").read_text()
        wait_until_ready(
            "Ray's head",
            server,
            lambda: parts.http_answers(url, token),
            log=log,
            seconds=_SECONDS_TO_START,
        )

    def _child_environment(self) -> dict[str, str]:
        """Ours and the stack's; nodes hand it on to jobs, drivers and workers."""
        # Of another cluster; nodes and jobs know their own.
        dropped = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD")
        return {
            **{k: v for k, v in os.environ.items() if k not in dropped},
            **{k: v for k, v in self._environment.items() if k not in dropped},
            "PATH": f"{parts.SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A killed node is gone after three refused connections, 3 s, instead of five, 15 s.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }

    def _keep(self, name: str, server: Server) -> None:
        """Remember a server, at once: what is not remembered cannot be stopped."""
        self._servers[name] = server
        if name.startswith("ray-"):
            self.nodes[name.removeprefix("ray-")] = server
        self._write_state()

    def _keep_folder(self, name: str, target: Path) -> None:
        """Show a temporary folder as one of ours."""
        link = self.folder / name
        self._forget_folder(name)
        link.symlink_to(target)

    def _forget_folder(self, name: str) -> None:
        link = self.folder / name
        if link.is_symlink():
            shutil.rmtree(link.resolve(), ignore_errors=True)
            link.unlink()

    def _write_state(self) -> None:
        servers = {name: [server.pid, server.created] for name, server in self._servers.items()}
        parts.write_private(
            self._state, json.dumps({"servers": servers, "environment": self._environment})
        )
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self._environment.items()]
        parts.write_private(self.folder / "env", "\n".join([*lines, ""]))

    def _read_state(self) -> None:
        if not self._state.exists():
            return
        state = json.loads(self._state.read_text())
        self._environment = state["environment"]
        self._servers = {name: Server(*known) for name, known in state["servers"].items()}
        self.nodes = {
            name.removeprefix("ray-"): server
            for name, server in self._servers.items()
            if name.startswith("ray-")
        }

    def _end(self) -> None:
        """The other way round than it was started; Ray's nodes at once, since each takes long."""
        nodes = list(self.nodes.values())
        with ThreadPoolExecutor(max(1, len(nodes))) as pool:
            # Asked politely, `ray start --block` takes half a minute to end idle processes.
            list(pool.map(lambda node: stop_server(node, seconds=_POLITE), reversed(nodes)))
        for name in ("mlflow", "postgres", "s3"):
            if (server := self._servers.get(name)) is not None:
                # To PostgreSQL, SIGINT says to end without waiting for its clients.
                stop_server(server, how=signal.SIGINT if name == "postgres" else signal.SIGTERM)
        self.object_store.stop()
        for name in ("ray", "postgres_sockets"):
            self._forget_folder(name)
        self._servers, self.nodes = {}, {}
        self._state.unlink(missing_ok=True)
        (self.folder / "env").unlink(missing_ok=True)


def shown(name: str, value: str) -> str:
    """A variable as it may be printed."""
    return "***" if any(part in name for part in _MASKED) and not name.endswith("PATH") else value
