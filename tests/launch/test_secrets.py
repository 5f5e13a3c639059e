"""What looks like a secret and what does not; what is sent and what is printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from amint_ray.cli import main
from amint_ray.contracts import UserError
from amint_ray.launch.no_secrets import (
    holds_secret,
    scrub,
    secret_arguments,
    secrets_in_runtime_env,
)
from amint_ray.launch.submit_job import command_line, dashboard_address, read_runtime_env

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("abcdefgh", "ijklmnopqrstuvwxyz0123")  # joined below, lest they look like real ones here


@pytest.mark.parametrize(
    "text",
    [
        "s3://KEY:SECRET@bucket/runs",
        "s3://KEY:SE/CR+ET@bucket/runs",
        "http://:word@host",
        "postgresql+psycopg://me:word@host:5432/db",
        "s3://bucket/runs?secret=x",
        "DB_PWD=hunter22",
        "AUTH_HEADER=Basic " + PARTS[1],
        "s3://bucket/runs?region=eu&secret_key=x",
        "https://bucket.host/data?X-Amz-Signature=x",
        f"https://{PARTS[1]}@host/x.zip",
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "ghp_" + PARTS[1],
        "-----BEGIN RSA PRIVATE KEY-----",
        "Bearer " + PARTS[0],
        "-e AWS_SECRET_ACCESS_KEY=x",
        "HF_TOKEN=x",
    ],
)
def test_holds_a_secret(text: str) -> None:
    assert holds_secret(text)
    assert holds_secret(f"see {text} there")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs ä",
        "s3://bucket/user@host",
        "http://host:8265/a@b",
        "git+ssh://git@host/x",
        "postgresql+psycopg://postgres@/mlflow?host=/tmp/x",
        "model.options.class_token=true",
        "https://host/x?page=2",
        "TOKENIZERS_PARALLELISM=false",
        "PWD=/home/me OLDPWD=/",
        "Basic settings",
        "RAY_AUTH_TOKEN_PATH=/run/token",
        "",
    ],
)
def test_holds_none(text: str) -> None:
    assert not holds_secret(text)
    assert scrub(text) == text
    assert secret_arguments([text]) == []


def test_arguments_are_named_without_their_values() -> None:
    arguments = [
        "train",
        "digits",
        "storage.path=s3://A:B@c",
        "s3://A:B@c",
        "data.path=s3://a?token=b",
        "s3://a?token=b",
    ]
    assert secret_arguments(arguments) == ["storage.path", "argument 4", "data.path", "argument 6"]


def test_a_runtime_environment_is_searched_everywhere() -> None:
    environment = {
        "env_vars": {
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_ACCESS_KEY_ID": 12,
            "MY_API_TOKEN": "x",
            "PGPASSWORD": "x",
            "TRACKING": "http://me:word@host",
            # These are none:
            "HF_TOKEN": "",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_AUTH_TOKEN_PATH": "/run/token",
            "AWS_WEB_IDENTITY_TOKEN_FILE": "/run/token",
            "AWS_ENDPOINT_URL": "http://host:9000",
            "NOTHING": None,
        },
        "pip": {"packages": ["torch", "git+https://me:word@host/x"]},
        "working_dir": "https://me:word@host/x.zip",
        "container": {"run_options": ["--env=PASSWORD=x", "-e AWS_SECRET_ACCESS_KEY=x"]},
    }
    assert secrets_in_runtime_env(environment) == [
        "env_vars.AWS_SECRET_ACCESS_KEY",
        "env_vars.AWS_ACCESS_KEY_ID",
        "env_vars.MY_API_TOKEN",
        "env_vars.PGPASSWORD",
        "env_vars.TRACKING",
        "pip.packages.1",
        "working_dir",
        "container.run_options.0",
        "container.run_options.1",
    ]


def test_what_is_printed_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("the-ray-token\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the/aws+secret")
    monkeypatch.setenv("SOME_KEY", "on")  # too short to be anybody's secret
    text = scrub(
        "on the-ray-token the/aws+secret http://me:word@host s3://b?secret=b HF_TOKEN=c; d"
    )
    assert text == "on *** *** http://***@host s3://b?secret=*** HF_TOKEN=*** d"


def test_the_command_survives_the_cluster_s_shell() -> None:
    words = ["train", "digits", "storage.path=s3://b/ü x", 'name=it\'s; rm -rf $HOME `x` "q" *']
    assert shlex.split(command_line(words)) == ["amint", *words]


def test_the_address_comes_from_the_first_variable_that_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no address of Ray's dashboard"):
        dashboard_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "https://third/")
    assert dashboard_address(None) == "https://third"
    monkeypatch.setenv("RAY_DASHBOARD", "http://second:8265")
    assert dashboard_address(None) == "http://second:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "10.0.0.1:6379")  # the nodes' port
    assert dashboard_address(None) == "http://second:8265"
    assert dashboard_address("http://given") == "http://given"
    with pytest.raises(UserError, match="write http://HOST:8265"):
        dashboard_address("10.0.0.1:6379")
    for name in ("RAY_DASHBOARD", "RAY_ADDRESS"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="is not the address of Ray"):
        dashboard_address(None)


def test_the_runtime_environment_that_ships_holds_no_secret_and_no_folder() -> None:
    file = ROOT / "infra/runtime_env.yaml"
    environment = read_runtime_env(str(file))
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    assert f"infra/{file.name}" in file.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file"),
        ("a: [", "cannot be read: "),
        ("- 1", "write a mapping"),
        ("env_vars: 1", "write a mapping"),
        ("env_var: {A: b}", "unknown key env_var; Ray knows "),
        ("env_vars: {HF_TOKEN: not-to-be-seen}", "env_vars.HF_TOKEN: Ray shows what is sent"),
    ],
)
def test_a_wrong_runtime_environment(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "env.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as raised:
        read_runtime_env(str(file))
    assert said in str(raised.value)
    assert "not-to-be-seen" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_empty_runtime_environment(tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text("# nothing\n")
    assert read_runtime_env(str(tmp_path / "env.yaml")) == read_runtime_env(None) == {}


NOT_SENT = {
    "-- train digits train.epoch=1": "unknown key 'train.epoch'",
    "-- train digits storage.path=s3://KEY:WORD@b": "credentials in storage.path: Ray shows",
    "-- train digits strage.path=s3://KEY:WORD@b": "credentials in strage.path: Ray shows",
    "-- train digits --jsn": "No such option '--jsn'",
    "-- train": "Missing argument 'RECIPE'",
    "-- train nosuchrecipe": "there is no recipe 'nosuchrecipe'",
    "-- prepare digits x": "only train can be sent",
    "": "only train can be sent",
    "--name a/b -- train digits": "--name='a/b': take letters",
    "--address 127.0.0.1:6379 -- amint train digits": "write http://HOST:8265",
    "--address http://me:WORD@127.0.0.1:9 -- train digits": "http://***@127.0.0.1:9: no Ray",
}


@pytest.mark.parametrize(("command", "said"), NOT_SENT.items())
def test_mistakes_are_told_before_anything_is_sent(
    command: str, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    assert main(["submit", *command.split()]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert "WORD" not in line
    assert captured.out == ""


def test_the_key_of_codes_is_not_sent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    secret, keyed = "0a" * 32, ["mint.objective=keyed"]
    (tmp_path / "env.yaml").write_text(f"env_vars: {{AUDITOR: {secret}}}\n")
    at_hand = ["submit", f"--runtime-env={tmp_path / 'env.yaml'}", "--", "train", "digits", *keyed]
    for command, said in (
        ([*at_hand, "mint.key_env=AUDITOR"], "a secret by the look of it: env_vars.AUDITOR"),
        (["submit", "--", "train", "digits", *keyed, f"mint.key_file={secret}"], "a key itself"),
    ):
        assert main(command) == 2
        told = capfd.readouterr().err
        assert said in told
        assert secret not in told


def test_the_doctor_wants_no_credentials_either(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["doctor", "storage.path=s3://KEY:WORD@b"]) == 2
    captured = capfd.readouterr()
    assert "credentials in storage.path" in captured.err
    assert "WORD" not in captured.err
