"""Local folders and S3 behind one door, against a real server that checks signatures."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from amint_ray.contracts import UserError
from amint_ray.storage import (
    Location,
    check_access,
    exists,
    list_files,
    locate,
    open_input,
    write_atomically,
)

if TYPE_CHECKING:
    from infra.local.object_store import ObjectStore

KEY = "data.path"
ACCESS, SECRET = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"


@dataclass
class Bucket:
    name: str
    secrets: list[str]

    def uri(self, prefix: str = "") -> str:
        return f"s3://{self.name}/{prefix}"

    @property
    def keys(self) -> list[str]:
        """Of all objects, whole or begun."""
        client = boto3.session.Session().client("s3")
        found = client.list_objects_v2(Bucket=self.name).get("Contents", [])
        try:
            begun = client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        except client.exceptions.NoSuchUpload:  # rclone's way to say that there are none
            begun = []
        return sorted(entry["Key"] for entry in [*found, *begun])

    def put(self, key: str, content: bytes = b"x") -> None:
        boto3.session.Session().client("s3").put_object(Bucket=self.name, Key=key, Body=content)


@pytest.fixture
def bucket(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, and nothing but the keys to it in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    object_store.make_bucket(name)
    return Bucket(name, [object_store.environment[ACCESS], object_store.environment[SECRET]])


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty place of either kind."""
    if request.param == "local":
        return locate(str(tmp_path / "base" / "prefix"), KEY)
    return locate(request.getfixturevalue("bucket").uri("prefix"), KEY)


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of one that does as told with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def saying(status: int, body: str) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        head = f"HTTP/1.1 {status} x\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())

    return answer


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def refusal(uri: str, secrets: list[str] | None = None, **options: Any) -> str:
    """What `locate` says, which is one line that begins with key and address."""
    with pytest.raises(UserError) as caught:
        locate(uri, KEY, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    start = f"{KEY} = {uri!r}: "
    assert text.startswith(start)
    told = text + "".join(traceback.format_exception(caught.value))
    hidden = [os.environ.get(name, "") for name in (ACCESS, SECRET)] + (secrets or [])
    assert not any(secret.strip() in told for secret in hidden if secret.strip())
    assert "AWS4-HMAC" not in told
    return text.removeprefix(start)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/x", "cannot be reached; write a local path or s3://BUCKET/PREFIX"),
        ("http://127.0.0.1/x.parquet", "cannot be reached; write"),
        ("file:///x", "cannot be reached; write"),
        ("", "names nothing; write"),
        ("~no-such-user/x", "names the home of a user who is not there; write the path in full"),
        ("s3://", "names no bucket; write s3://BUCKET/PREFIX"),
        ("s3:///prefix", "names no bucket"),
        ("s3:/bucket/prefix", "names no bucket"),
        ("s3://bucket/a//b", "has an empty part"),
        ("s3://bucket/a/../b", "has an empty part, '.' or '..'"),
    ],
)
def test_addresses_that_mean_nothing(uri: str, said: str) -> None:
    assert refusal(uri).startswith(said)


@pytest.mark.parametrize(
    "uri",
    ["s3://{0}:{1}@bucket/x", "s3://bucket/x?access_key={0}&secret_key={1}", "http://u:{1}@host/x"],
)
def test_secrets_in_an_address_are_not_repeated(uri: str) -> None:
    secrets = ["AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"]
    with pytest.raises(UserError) as caught:
        locate(uri.format(*secrets), KEY)
    assert not any(secret in str(caught.value) for secret in secrets)
    assert "***" in str(caught.value)


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert locate("a/b", KEY).path == str(tmp_path / "a" / "b")
    assert locate("~/a", KEY).path == "/home/of/mine/a"
    assert not (tmp_path / "a").exists()


def test_a_bucket_can_be_located_with_and_without_a_prefix(bucket: Bucket) -> None:
    assert locate(bucket.uri("a/b/"), KEY).path == f"{bucket.name}/a/b"
    assert locate(f"s3://{bucket.name}", KEY).path == bucket.name
    assert bucket.keys == []


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    assert "has no bucket 'no-such-bucket'; make it" in refusal("s3://no-such-bucket/x")
    assert "'no such bucket' is not the name of a bucket" in refusal("s3://no such bucket/x")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({ACCESS: "somebody-elses-key"}, "refused the credentials; set AWS_ACCESS_KEY_ID"),
        ({SECRET: "not-quite-the-secret"}, "refused the credentials; set AWS_ACCESS_KEY_ID"),
        ({SECRET: None}, "only half of the credentials"),
        ({ACCESS: None, SECRET: None}, "no credentials were found; set AWS_ACCESS_KEY_ID"),
        ({ACCESS: None, "AWS_PROFILE": "nobody"}, "AWS_PROFILE names a profile that is not"),
        ({ACCESS: "key-of-a-file\n"}, "has white space around it; remove it"),
        ({SECRET: "secret-of-a-file\n"}, "has white space around it; remove it"),
    ],
)
def test_credentials_that_do_not_do(
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str | None],
    said: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert said in refusal(bucket.uri("x"), bucket.secrets)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            saying(403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>"),
            "denied it; the credentials need s3:ListBucket, s3:GetObject and, to write, "
            "s3:PutObject and s3:DeleteObject on bucket",
        ),
        (saying(503, "<Error><Code>SlowDown</Code></Error>"), "cannot be used (SlowDown, 503)"),
        (
            saying(403, "<Error><Code>two\nlines</Code></Error>"),
            "cannot be used (ClientError, 403)",
        ),
        (saying(200, "<html></html>"), "does not speak S3; correct AWS_ENDPOINT_URL"),
        (saying(200, "<html><p>a page</html>"), "cannot be used (ClientError, 500); check AWS_END"),
        (saying(404, "not here"), "cannot be used (ClientError, 404)"),
        (socket.socket.close, "cannot be used (ConnectionClosedError"),
    ],
)
def test_servers_that_answer_something_else(
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[socket.socket], None],
    said: str,
) -> None:
    with server(answer) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        assert refusal(bucket.uri("x")).startswith(f"{address} {said}")


def test_a_server_that_is_not_there(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    assert refusal(bucket.uri("x")).startswith(f"no server was reached at {address}; start it")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert refusal(bucket.uri("x")).startswith("AWS_ENDPOINT_URL is no address; write http://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@127.0.0.1:9")
    assert "takes no credentials" in refusal(bucket.uri("x"), ["password"])


def test_http_where_https_was_said(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("http", "https"))
    assert refusal(bucket.uri("x")).startswith("no secure connection to https://127.0.0.1")


def test_a_silent_server_is_noticed(
    bucket: Bucket, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", silent)
    begun = time.monotonic()
    said = refusal(bucket.uri("x"), seconds=3)
    assert time.monotonic() - begun < 20
    assert said.startswith(f"{silent} did not answer within 3 s; is it an S3 server")


def test_a_server_that_falls_silent_is_noticed(
    bucket: Bucket, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = locate(bucket.uri(), KEY, seconds=1, attempts=1).filesystem.handler
    stuck = Location("", fs.PyFileSystem(replace(handler, endpoint=silent)), bucket.name)
    for use in (list_files, partial(open_input, relative="y")):
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"did not answer within 1 s|Timeout was reached"):
            use(stuck)
        assert time.monotonic() - begun < 20


def test_a_location_pickles_without_secrets_and_reads_elsewhere(bucket: Bucket) -> None:
    bucket.put("a/b.txt", b"hello")
    location = locate(bucket.uri("a"), KEY)
    assert list_files(location)  # its clients are there
    data = pickle.dumps(location)
    shown = repr(location) + repr(location.filesystem.handler) + repr(data)
    assert not any(secret in shown for secret in bucket.secrets)
    assert pickle.loads(data) == location

    code = (
        "import pickle, sys\nfrom amint_ray.storage import open_input\n"
        "location = pickle.load(sys.stdin.buffer)\n"
        "with open_input(location, 'b.txt') as file: print(file.read().decode())"
    )

    def read(**changes: str) -> subprocess.CompletedProcess[bytes]:
        env = {k: v for k, v in (os.environ | changes).items() if v}
        return subprocess.run(
            [sys.executable, "-c", code], input=data, capture_output=True, env=env
        )

    done = read()
    assert done.stdout == b"hello\n", done.stderr
    for changes in ({SECRET: "not-quite-the-secret"}, {ACCESS: "", SECRET: ""}):
        done = read(**changes)
        assert done.returncode == 1
        assert b"OSError" in done.stderr
        assert not any(secret.encode() in done.stderr for secret in bucket.secrets)


def fill(place: Location, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with write_atomically(place, name) as file:
            file.write(content)


def test_files_are_listed_alike_on_both(place: Location) -> None:
    assert list_files(place) == []
    assert not exists(place)
    names = ["b.parquet", "a/z.parquet", "a/b/c.parquet", "a.txt", "Ä/1.parquet"]
    hidden = [".b.parquet", "_b.parquet", ".cache/1.parquet", "a/_x/1.parquet"]
    fill(place, {name: name.encode() for name in [*names, *hidden]})
    found = list_files(place)
    assert [entry.name for entry in found] == sorted(names)
    assert [entry.size for entry in found] == [len(name.encode()) for name in sorted(names)]
    assert [entry.path for entry in found] == [f"{place.path}/{name}" for name in sorted(names)]
    assert [e.name for e in list_files(place, ".txt")] == ["a.txt"]
    assert exists(place)
    assert exists(place, "a/b")
    assert exists(place, "a/b/c.parquet")
    assert not exists(place, "a/b/c")

    with place.filesystem.open_input_file(found[0].path) as file:
        assert file.read() == found[0].name.encode()
    with open_input(place, "a/z.parquet") as file:
        file.seek(2)
        assert file.read() == b"z.parquet"
    with pytest.raises(FileNotFoundError):
        open_input(place, "none")

    before = list_files(place, ".txt")
    assert list_files(place, ".txt") == before
    fill(place, {"a.txt": b"A.txt"})
    assert list_files(place, ".txt")[0].version != before[0].version


def test_a_location_can_be_one_file(place: Location) -> None:
    fill(place, {"a/_one.parquet": b"1", "a/_one.parquet2": b"2"})
    one = Location(place.uri, place.filesystem, f"{place.path}/a/_one.parquet")
    assert [(e.name, e.path) for e in list_files(one, ".parquet")] == [("_one.parquet", one.path)]
    assert list_files(one, ".txt") == []
    part = Location(place.uri, place.filesystem, f"{place.path}/a/_o")
    assert list_files(part) == []


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(locate(str(tmp_path / "elsewhere"), KEY), {"1.txt": b"1", "deep/2.txt": b"2"})
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    (base / "first").symlink_to(tmp_path / "elsewhere")
    (base / "second").symlink_to(tmp_path / "elsewhere")
    (base / "sub" / "up").symlink_to(base)
    (tmp_path / "elsewhere" / "deep" / "self").symlink_to(tmp_path / "elsewhere" / "deep")
    (base / "file.txt").symlink_to(tmp_path / "elsewhere" / "1.txt")
    place = locate(str(base), KEY)
    assert [entry.name for entry in list_files(place)] == [
        *("file.txt", "first/1.txt", "first/deep/2.txt", "second/1.txt", "second/deep/2.txt"),
    ]
    (base / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="broken"):
        list_files(place)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failed_write_leaves_nothing(
    place: Location, error: type[BaseException], before: bytes | None
) -> None:
    if before is not None:
        fill(place, {"a/b.bin": before})
    with pytest.raises(error), write_atomically(place, "a/b.bin") as file:
        for _ in range(7):  # more than one part of an upload
            file.write(bytes(2**20))
        raise error
    assert exists(place, "a/b.bin") is (before is not None)
    left = place.filesystem.get_file_info(
        fs.FileSelector(place.path, allow_not_found=True, recursive=True)
    )
    assert len([info for info in left if info.is_file]) == (before is not None)
    if before is not None:
        with open_input(place, "a/b.bin") as stored:
            assert stored.read() == before


def test_nothing_shows_before_the_end_of_a_write(place: Location) -> None:
    with write_atomically(place, "a/b.bin") as file:
        file.write(bytes(9 * 2**20))
        file.flush()
        assert not exists(place, "a/b.bin")
        assert list_files(place) == []
    assert [(entry.name, entry.size) for entry in list_files(place)] == [("a/b.bin", 9 * 2**20)]


def test_a_draft_tells_whose_it_is(tmp_path: Path) -> None:
    with write_atomically(locate(str(tmp_path), KEY), "a/b.bin"):
        (draft,) = (tmp_path / "a").iterdir()
        assert re.fullmatch(r"\.b\.bin\.[0-9a-f]{32}\.tmp", draft.name)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    fill(locate(str(tmp_path), KEY), {"a": b""})
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_errors_while_writing_pass(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError), write_atomically(locate(str(tmp_path), KEY), "file/x"):
        pass
    place = locate(bucket.uri(), KEY)
    gone = Location("s3://gone", place.filesystem, "gone-bucket")
    with (
        pytest.raises(OSError, match=r"s3://gone-bucket/x: .*has no bucket 'gone-bucket'"),
        write_atomically(gone, "x") as file,
    ):
        file.write(b"x")


def test_parquet_goes_there_and_back(place: Location) -> None:
    rows = 4000
    noise = np.random.default_rng(0).bytes(rows * 3000)
    cells = [noise[3000 * i : 3000 * (i + 1)] for i in range(rows)]
    table = pa.table({"n": range(rows), "image": pa.array(cells, pa.binary())})
    with (
        write_atomically(place, "a/b.parquet") as file,
        pq.ParquetWriter(file, table.schema) as writer,
    ):
        for start in range(0, rows, 1000):
            writer.write_table(table.slice(start, 1000))
    (entry,) = list_files(place, ".parquet")
    assert entry.size > 2 * 5 * 2**20
    with open_input(place, entry.name) as stored:
        assert pq.ParquetFile(stored).read_row_group(2).equals(table.slice(2000, 1000))
    assert pq.read_table(entry.path, filesystem=place.filesystem, columns=["n"]).num_rows == rows


def test_folders_are_copied_in_and_out_as_ray_does_it(bucket: Bucket, tmp_path: Path) -> None:
    fill(locate(str(tmp_path / "in"), KEY), {"a": b"a", "b/c": b"c", "b/empty": b""})
    place = locate(bucket.uri("runs/one"), KEY)
    place.filesystem.create_dir(place.path)
    fs.copy_files(str(tmp_path / "in"), place.path, destination_filesystem=place.filesystem)
    assert bucket.keys == ["runs/one/a", "runs/one/b/c", "runs/one/b/empty"]
    (tmp_path / "out").mkdir()
    fs.copy_files(place.path, str(tmp_path / "out"), source_filesystem=place.filesystem)
    assert [e.name for e in list_files(locate(str(tmp_path / "out"), KEY))] == [
        "a",
        "b/c",
        "b/empty",
    ]


def test_no_directory_markers_are_left(bucket: Bucket) -> None:
    place = locate(bucket.uri("runs"), KEY)
    store, path = place.filesystem, place.path
    store.create_dir(f"{path}/one/two", recursive=True)
    assert bucket.keys == []
    fill(place, {"one/two/a": b"a", "one/two/b": b"b", "one/c": b"c", "onerous": b"d"})
    with store.open_output_stream(f"{path}/one/big") as file:
        file.write(bytes(12 * 2**20))
    assert store.get_file_info(f"{path}/one/big").size == 12 * 2**20
    store.copy_file(f"{path}/one/big", f"{path}/copy")
    store.move(f"{path}/copy", f"{path}/moved")
    assert bucket.keys == [
        *("runs/moved", "runs/one/big", "runs/one/c"),
        *("runs/one/two/a", "runs/one/two/b", "runs/onerous"),
    ]
    store.delete_file(f"{path}/one/two/a")
    store.delete_file(f"{path}/one/two/b")
    with pytest.raises(FileNotFoundError):
        store.delete_file(f"{path}/one/two/b")
    assert bucket.keys == ["runs/moved", "runs/one/big", "runs/one/c", "runs/onerous"]
    store.delete_dir(f"{path}/one")
    assert bucket.keys == ["runs/moved", "runs/onerous"]
    store.delete_dir_contents(bucket.name)
    assert bucket.keys == []


def test_a_folder_that_may_not_be_written_to_is_found_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:  # to whom no folder is closed: what its owner would be told
        monkeypatch.setattr(
            os, "access", lambda path, mode: bool(Path(path).stat().st_mode & 0o200)
        )
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for path in (closed, closed / "below"):
        with pytest.raises(UserError, match=rf"key: cannot write to '{path}' .*closed may not be"):
            check_access(locate(str(path), "key"), "key")
    check_access(locate(str(tmp_path / "to/be/made"), "key"), "key")
    assert list(tmp_path.iterdir()) == [closed]
