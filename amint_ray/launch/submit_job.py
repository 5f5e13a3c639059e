"""`amint train` as a Ray job: sent, followed and stopped through the dashboard's HTTP interface."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from amint_ray.config.load import load_run
from amint_ray.contracts import RunError, UserError, first_line
from amint_ray.launch.no_secrets import secret_arguments, secrets_in_runtime_env
from amint_ray.launch.time_limit import within
from amint_ray.storage import without_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD", "RAY_ADDRESS")
_SECONDS_TO_ANSWER = 8.0
_SECONDS_OF_SILENCE = 2.0
"""After which the job is asked for, in case that its log's end got lost with the connection."""
_SECONDS_BETWEEN_TRIES = 1.0
_SECONDS_WITHOUT_CLUSTER = 60.0
_SECONDS_BETWEEN_STOPS = 5.0
_SECONDS_TO_STOP = 60
"""That Ray gives a job between SIGTERM and SIGKILL. Its own 3 s are not enough to end the workers
and to mark the MLflow run."""
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_ENDED_BY_SIGTERM = 143
_TOKEN_HELP = "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE or RAY_AUTH_TOKEN"
_NOT_SENT = (
    "Ray shows what is sent to everyone who may see the job, so leave it out; the nodes must have "
    "it, from a Secret of the RayCluster or in the raylets' environment"
)

T = TypeVar("T")
Write = Callable[[str], None]


def dashboard_address(address: str | None) -> str:
    """The dashboard's address: what was given, or else what the environment says.

    Raises:
        UserError: neither names one.
    """
    given = [address] if address else [os.environ.get(name, "") for name in _ADDRESSES]
    for candidate in given:
        if re.match(r"https?://[^/]", candidate):
            return candidate.rstrip("/")
    if address:
        raise UserError(
            f"--address={without_secrets(address)}: jobs are sent to Ray's dashboard; write "
            "http://HOST:8265"
        )
    for name in _ADDRESSES[:2]:  # RAY_ADDRESS may name what no job is sent to
        if value := os.environ.get(name):
            raise UserError(
                f"{name}={without_secrets(value)}: is not the address of Ray's dashboard; write "
                "http://HOST:8265"
            )
    raise UserError(
        f"no address of Ray's dashboard: give --address=http://HOST:8265, or set {_ADDRESSES[0]}"
    )


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Look for credentials in a command that is to be sent, before anything repeats it.

    Raises:
        UserError: it holds some.
    """
    if found := secret_arguments(arguments):
        raise UserError(f"credentials in {', '.join(found)}: {_NOT_SENT}")


def read_runtime_env(file: str | None, *, key_env: str | None = None) -> dict[str, Any]:
    """A runtime environment without secrets, such as the key of codes; empty without a file.

    Raises:
        UserError: it cannot be read, or holds a secret.
    """
    if file is None:
        return {}
    environment = parse_runtime_env(file)
    if found := secrets_in_runtime_env(environment, key_env):
        names = ", ".join(found)
        raise UserError(f"--runtime-env={file}: a secret by the look of it: {names}: {_NOT_SENT}")
    return environment


def parse_runtime_env(file: str) -> dict[str, Any]:
    """A runtime environment as it stands in a YAML file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        environment = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None)
        raise UserError(
            f"--runtime-env={file}: cannot be read: {reason or first_line(error)}"
        ) from error
    environment = {} if environment is None else environment
    if not isinstance(environment, dict) or not isinstance(environment.get("env_vars") or {}, dict):
        raise UserError(f"--runtime-env={file}: write a mapping, and a mapping of env_vars in it")
    from ray.runtime_env import RuntimeEnv

    known = sorted(field for field in RuntimeEnv.known_fields if not field.startswith("_"))
    if unknown := [str(key) for key in environment if key not in known]:
        raise UserError(
            f"--runtime-env={file}: unknown key {', '.join(unknown)}; Ray knows {', '.join(known)}"
        )
    return environment


def command_line(arguments: Sequence[str]) -> str:
    """What the cluster's shell is given.

    Args:
        arguments: of `amint`.
    """
    return shlex.join(["amint", *arguments])


def open_client(address: str) -> JobSubmissionClient:
    """Ray's client, once the dashboard has answered and taken the token.

    Raises:
        UserError: it did not, which takes no more than some seconds.
    """
    from ray.job_submission import JobSubmissionClient

    for name in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    # Ray takes an address from the environment even where another one is given, and RAY_ADDRESS
    # may name the port that nodes use.
    os.environ[_ADDRESSES[0]] = address
    try:
        return within(_SECONDS_TO_ANSWER, lambda: JobSubmissionClient(address))
    except Exception as error:  # Ray's own, those of requests, and what a wrong document leads to
        raise UserError(f"{without_secrets(address)}: {_why_not(error)}") from error


def _why_not(error: Exception) -> str:
    """What is wrong with a dashboard, and what to do."""
    from ray.exceptions import AuthenticationError

    text = first_line(error)
    if isinstance(error, AuthenticationError):
        if "Invalid authentication token" in text:
            return f"the cluster refuses the token; give its own: {_TOKEN_HELP}"
        if "Missing authentication token" in text:
            return f"the cluster wants a token; set {_TOKEN_HELP}"
        return f"no token to show: {text.split('. ')[0]}"
    if isinstance(error, TimeoutError):
        return f"no answer within {_SECONDS_TO_ANSWER:g} s; is it the address of Ray's dashboard?"
    if isinstance(error, ConnectionError):
        return "no Ray dashboard answers there; start the cluster, or correct the address"
    return "somebody answers there, but it is not Ray's dashboard; correct the address"


def plan_job(
    command: Sequence[str],
    parse: Callable[[list[str]], Mapping[str, Any]],
    *,
    address: str | None,
    name: str | None,
    runtime_env: str | None,
) -> Job:
    """Check what can be checked here, before anything is sent.

    Args:
        command: `train RECIPE [key=value ...]`.
        parse: gives the `recipe` and the `overrides` among the arguments of `train`.
        address: of the dashboard, if not the environment's.
        name: of the job, if Ray is to know it by one.
        runtime_env: file of its runtime environment.

    Raises:
        UserError: a mistake in any of them, or a secret that would be sent.
    """
    words = list(command[1:] if command[:1] == ("amint",) else command)
    if words[:1] != ["train"]:
        raise UserError("only train can be sent: amint submit -- train RECIPE [key=value ...]")
    refuse_secrets(words)
    asked = parse(words[1:])
    config = load_run(asked["recipe"], asked["overrides"])
    environment = read_runtime_env(runtime_env, key_env=config.mint.key_env)
    job_id = _new_job_id(config.name) if name is None else _check_job_id(name)
    return Job(dashboard_address(address), job_id, command_line(words), environment)


class Job:
    """A Ray job of one `amint` command.

    Attributes:
        job_id: by which Ray knows it.
        address: of the dashboard.
    """

    def __init__(
        self, address: str, job_id: str, entrypoint: str, runtime_env: Mapping[str, Any]
    ) -> None:
        """Name the job; it is sent by `send`."""
        self.address = address
        self.job_id = job_id
        self._entrypoint = entrypoint
        self._runtime_env = runtime_env
        self._client: JobSubmissionClient | None = None
        self._shown = 0
        self._reached = time.monotonic()

    def send(self) -> None:
        """Hand it to Ray, with what its runtime environment names of this machine's folders.

        Raises:
            UserError: Ray does not answer, or does not take it.
        """
        client = open_client(self.address)
        given = self._runtime_env.get("env_vars") or {}
        variables = {_STOP_WAIT: str(_SECONDS_TO_STOP), **given}
        environment = {**self._runtime_env, "env_vars": variables}
        try:
            self._client = client  # before it is sent: then it can be stopped, whatever comes
            client.submit_job(
                entrypoint=self._entrypoint, submission_id=self.job_id, runtime_env=environment
            )
        except Exception as error:  # Ray's checks of the environment raise of many kinds
            lines = [line.strip(" .") for line in str(error).splitlines() if line.strip(" .")]
            reason = lines[-1] if lines else type(error).__name__
            if "already exists" in reason:
                raise UserError(f"--name={self.job_id}: there is such a job already") from error
            raise UserError(f"Ray does not take the job: {reason}") from error

    def document(self) -> dict[str, Any]:
        """`job_id`, `status`, `exit_code` (None until the job has ended) and `message`.

        Raises:
            RunError: the cluster does not answer.
        """
        info = self._info()
        while info is None:
            time.sleep(_SECONDS_BETWEEN_TRIES)
            info = self._info()
        return _document(self.job_id, info)

    def follow(self, write: Write) -> dict[str, Any]:
        """Pass the log on until the job has ended; gives its `document`.

        Raises:
            RunError: the cluster has not answered for a minute. The job may go on.
        """
        return self._follow(write, stopping=False)

    def stop(self, write: Write) -> dict[str, Any]:
        """Have Ray stop the job, and pass its log on until it has ended; gives its `document`.

        Raises:
            RunError: the cluster does not answer, or does not stop the job.
        """
        try:
            return self._follow(write, stopping=True)
        except _UnknownJobError:
            return _document_of(self.job_id, "STOPPED", None, "the job was not sent")

    def _follow(self, write: Write, *, stopping: bool) -> dict[str, Any]:
        started, asked = time.monotonic(), float("-inf")
        tail = self._tail()
        while True:
            now = time.monotonic()
            if stopping and now - asked > _SECONDS_BETWEEN_STOPS:
                asked = now  # and again: a job that is about to start cannot be stopped yet
                self._ask_to_stop()
            if stopping and now - started > 2 * _SECONDS_TO_STOP:
                raise RunError(f"Ray has not stopped job {self.job_id}; see {self.address}")
            try:
                chunk = tail.get(timeout=_SECONDS_OF_SILENCE)
            except queue.Empty:
                chunk = ""
            if chunk:
                self._shown += len(chunk)
                write(chunk)
                continue
            info = self._info()
            if info is not None and info.status.is_terminal():
                write(self._rest())
                return _document(self.job_id, info)
            if chunk is None:  # the connection broke
                time.sleep(_SECONDS_BETWEEN_TRIES)
                tail = self._tail()

    def _tail(self) -> queue.SimpleQueue[str | None]:
        """Follow the log in a thread, which leaves this one free for Ctrl-C; None is its end."""
        chunks: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        client = self._client

        async def follow(seen: int) -> None:
            if client is None:
                return
            async for text in client.tail_job_logs(self.job_id):  # from its beginning
                if new := text[seen:]:
                    chunks.put(new)
                seen = max(0, seen - len(text))

        def work(seen: int) -> None:
            try:
                asyncio.run(follow(seen))
            except Exception as error:
                logging.getLogger(__name__).debug("the log's connection broke: %s", error)
            chunks.put(None)

        threading.Thread(target=work, args=(self._shown,), daemon=True).start()
        return chunks

    def _rest(self) -> str:
        """What of the log was not passed on: it may have been written behind the tail's back."""
        try:
            logs = self._ask(lambda client: client.get_job_logs(self.job_id))
            return str(logs)[self._shown :]
        except Exception as error:
            return f"(the log's end cannot be read: {first_line(error)})\n"

    def _info(self) -> Any:
        """What Ray knows of the job; None where it does not answer just now."""
        try:
            info = self._ask(lambda client: client.get_job_info(self.job_id))
        except _UnknownJobError:
            raise
        except Exception as error:
            if "status code 404" in str(error):
                raise _UnknownJobError(f"the cluster knows no job {self.job_id}") from error
            if time.monotonic() - self._reached > _SECONDS_WITHOUT_CLUSTER:
                raise RunError(
                    f"{without_secrets(self.address)} does not answer any more; the job may go on: "
                    f"`ray job logs --follow {self.job_id}`"
                ) from error
            return None
        self._reached = time.monotonic()
        return info

    def _ask(self, question: Callable[[JobSubmissionClient], T]) -> T:
        client = self._client
        if client is None:
            raise _UnknownJobError("the job was not sent")
        return within(_SECONDS_TO_ANSWER, lambda: question(client))

    def _ask_to_stop(self) -> None:
        try:
            self._ask(lambda client: client.stop_job(self.job_id))
        except Exception as error:  # `_info` tells when this has lasted for too long
            logging.getLogger(__name__).debug("cannot ask to stop: %s", error)


class _UnknownJobError(RunError):
    """Ray knows no such job."""


def _new_job_id(name: str) -> str:
    """A name that no other job has, from the recipe's."""
    return f"amint-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _check_job_id(job_id: str) -> str:
    """The name, if Ray can make a file's name of it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,100}", job_id):
        raise UserError(f"--name={job_id!r}: take letters, digits, '-', '_' and '.'")
    return job_id


def _document(job_id: str, info: Any) -> dict[str, Any]:
    status, code = info.status.value, info.driver_exit_code
    message = str(info.message or "").split(", last available logs")[0].strip()
    if not info.status.is_terminal():
        code = None
    elif status == "STOPPED":
        code = _ENDED_BY_SIGTERM
    elif code is None:  # its command was never run, or its node died
        code = 0 if status == "SUCCEEDED" else 1
    elif code < 0:  # by a signal
        code = 128 - code
    if code == 127:
        message += "; the nodes must have amint_ray installed, with `amint` on their PATH"
    return _document_of(job_id, status, code, message)


def _document_of(job_id: str, status: str, code: int | None, message: str) -> dict[str, Any]:
    return {"job_id": job_id, "status": status, "exit_code": code, "message": message}
