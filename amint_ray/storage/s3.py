"""S3: a filesystem that leaves no directory markers, and errors in one line without secrets.

Credentials are in no object of this module: boto3 and pyarrow each find them in the environment of
the process that they run in (the standard AWS variables or a profile), so that what is defined here
can be pickled, printed and logged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any
from urllib.parse import urlsplit

from pyarrow import fs

from amint_ray.contracts import first_line

_SET_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_REFUSED = f"{{server}} refused the credentials; {_SET_KEYS}"
_UNREACHED = "no server was reached at {server}; start it, or correct AWS_ENDPOINT_URL"
_REASONS = {
    "NoSuchBucket": "{server} has no bucket {bucket!r}; make it, or name one that is there",
    "AccessDenied": "{server} denied it; the credentials need s3:ListBucket, s3:GetObject and, "
    "to write, s3:PutObject and s3:DeleteObject on bucket {bucket!r}",
    "InvalidAccessKeyId": _REFUSED,
    "SignatureDoesNotMatch": _REFUSED,
    "InvalidToken": _REFUSED,
    "ExpiredToken": "the credentials have expired; fetch new ones",
    "MissingContentLength": "{server} takes no trailing checksums; "
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    "RequestTimeTooSkewed": "{server} has another time than this machine; set the clock",
    "NoCredentialsError": f"no credentials were found; {_SET_KEYS}",
    "PartialCredentialsError": f"only half of the credentials was found; {_SET_KEYS}",
    "ProfileNotFound": "AWS_PROFILE names a profile that is not in ~/.aws; correct or unset it",
    "ReadTimeoutError": "{server} did not answer within {seconds:g} s; is it an S3 server, and up?",
    "ConnectTimeoutError": _UNREACHED,
    "EndpointConnectionError": _UNREACHED,
    "SSLError": "no secure connection to {server}; http instead of https, or set AWS_CA_BUNDLE",
    "ParamValidationError": "{bucket!r} is not the name of a bucket",
    "ResponseParserError": "{server} does not speak S3; correct AWS_ENDPOINT_URL",
    "ValueError": "AWS_ENDPOINT_URL is no address; write http://HOST:PORT",
}
"""What a mistake is called by S3 (a code) or by its Python class, and what to say."""


class AddressError(Exception):
    """What is wrong with an address and what to do, in one line that does not repeat it."""


def _delegated(name: str, **options: Any) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.filesystem, name)(*args, **options)


@dataclass(frozen=True)
class Objects(fs.FileSystemHandler):  # type: ignore[misc]
    """S3 without directory markers, for `pyarrow.fs.PyFileSystem`.

    pyarrow's S3FileSystem puts an empty object `folder/` for each folder that is made and for the
    parent of each file that is deleted. Object stores have no folders: this is junk to them, and
    rclone's server keeps it as a file, below which nothing can be written.

    Attributes:
        endpoint: the server's address; None: Amazon's.
        region: of the bucket.
        seconds: how long the server may keep silent before a request is tried again.
        attempts: how often a request is tried, at growing intervals of up to 20 s.
    """

    endpoint: str | None
    region: str
    seconds: float
    attempts: int

    get_file_info = _delegated("get_file_info")
    get_file_info_selector = _delegated("get_file_info")
    copy_file = _delegated("copy_file")
    open_input_file = _delegated("open_input_file")
    open_input_stream = _delegated("open_input_stream", compression=None)
    open_append_stream = _delegated("open_append_stream", compression=None)

    def __reduce__(self) -> tuple[Any, ...]:
        # and not the clients
        return Objects, (self.endpoint, self.region, self.seconds, self.attempts)

    @cached_property
    def filesystem(self) -> fs.S3FileSystem:
        """What reads and writes, made by each process for itself."""
        scheme, _, server = (self.endpoint or "https://").partition("://")
        return fs.S3FileSystem(
            endpoint_override=server.rstrip("/") or None,
            scheme=scheme,
            region=self.region,
            connect_timeout=self.seconds,
            request_timeout=self.seconds,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=self.attempts),
            tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
        )

    @cached_property
    def _client(self) -> Any:
        return _client(self.seconds, self.attempts, endpoint=self.endpoint, region=self.region)

    @contextmanager
    def client(self, path: str) -> Iterator[tuple[Any, dict[str, str]]]:
        """boto3's client and what it calls a path; its errors come out as OSErrors."""
        bucket, _, key = path.partition("/")
        try:
            yield self._client, {"Bucket": bucket, "Key": key}
        except AddressError as error:
            raise OSError(f"s3://{path}: {error}") from None
        except _failures() as error:
            reason = _reason(error, bucket, self.endpoint, self.seconds)
            raise OSError(f"s3://{path}: {reason}") from None

    def get_type_name(self) -> str:
        """Implements the handler."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """Implements the handler."""
        return path

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Implements the handler."""
        return self.filesystem.open_output_stream(path, compression=None, metadata=metadata)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Does nothing."""

    def delete_file(self, path: str) -> None:
        """Implements the handler."""
        if self.filesystem.get_file_info(path).type != fs.FileType.File:
            raise FileNotFoundError(f"s3://{path}: there is no such file")
        with self.client(path) as (client, place):
            client.delete_object(**place)

    def delete_dir(self, path: str) -> None:
        """The same as `delete_dir_contents`: nothing else is there."""
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete key by key: not every server takes many keys at once."""
        with self.client(path) as (client, place):
            for found in self.below(path):
                client.delete_object(Bucket=place["Bucket"], Key=found["Key"])

    def delete_root_dir_contents(self) -> None:
        """Refuses to delete every bucket."""
        raise NotImplementedError("deleting every bucket")

    def move(self, src: str, dest: str) -> None:
        """Implements the handler, for files."""
        self.copy_file(src, dest)
        self.delete_file(src)

    def upload(self, file: IO[bytes], path: str) -> None:
        """Put a file in its place, in several parts where it is large; whole or not at all."""
        with self.client(path) as (client, place):
            client.upload_fileobj(file, **place)

    def below(self, path: str) -> Iterator[dict[str, Any]]:
        """What S3 tells (Key, Size, ETag) of each object below a path."""
        with self.client(path.rstrip("/") + "/") as (client, place):
            pages = client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=place["Bucket"], Prefix=place["Key"]):
                yield from page.get("Contents", [])

    def at(self, path: str) -> list[dict[str, Any]]:
        """The same of the object at a path; empty where there is none."""
        with self.client(path) as (client, place):
            answer = client.list_objects_v2(
                Bucket=place["Bucket"], Prefix=place["Key"], MaxKeys=1
            )  # of all keys that begin so, the key itself is the first
        return [found for found in answer.get("Contents", []) if found["Key"] == place["Key"]]


def open_bucket(bucket: str, prefix: str, *, seconds: float, attempts: int) -> Objects:
    """What reads and writes a bucket, once it has shown that it can be listed.

    Args:
        bucket: its name.
        prefix: to be listed.
        seconds: in which an answer must come.
        attempts: of each later request.

    Raises:
        AddressError: it cannot.
    """
    endpoint = None
    try:
        patience = max((seconds - 1) / 2, seconds / 4)  # two tries and a pause of up to a second
        client = _client(patience, attempts=2)
        endpoint = client.meta.endpoint_url
        if "@" in endpoint:
            raise AddressError(f"AWS_ENDPOINT_URL takes no credentials; {_SET_KEYS}")
        answer = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        if "Name" not in answer:  # some other document
            raise AddressError(_REASONS["ResponseParserError"].format(server=endpoint))
    except _failures() as error:
        raise AddressError(_reason(error, bucket, endpoint, seconds)) from None
    headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
    objects = Objects(
        endpoint=None if _is_amazon(endpoint) else endpoint,
        region=headers.get("x-amz-bucket-region") or client.meta.region_name or "us-east-1",
        seconds=seconds,
        attempts=attempts,
    )
    try:
        objects.filesystem.get_file_info(bucket)
    except OSError as error:  # it has a client of its own, with fewer ways to find credentials
        reason = f"boto3 can list it, pyarrow cannot ({first_line(error)}); {_SET_KEYS}"
        raise AddressError(reason) from None
    return objects


def _client(
    seconds: float, attempts: int, *, endpoint: str | None = None, region: str | None = None
) -> Any:
    """A client of boto3's, which takes most of a second to import.

    Raises:
        AddressError, BotoCoreError: no usable credentials.
        ValueError: the endpoint is no address.
    """
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import NoCredentialsError

    session = Session()
    credentials = session.get_credentials()
    if credentials is None:
        raise NoCredentialsError
    for part in credentials.get_frozen_credentials():
        if part and (part != part.strip() or not part.isprintable()):
            raise AddressError("the access key or the secret has white space around it; remove it")
    config = Config(
        connect_timeout=seconds,
        read_timeout=seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _failures() -> tuple[type[Exception], ...]:
    """What boto3's client raises; the ValueError is about the endpoint."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return BotoCoreError, ClientError, ResponseParserError, ValueError


def _is_amazon(endpoint: str | None) -> bool:
    host = urlsplit(endpoint or "").hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _reason(error: Exception, bucket: str, endpoint: str | None, seconds: float) -> str:
    """One line that quotes nothing: botocore's own texts can hold the signed header."""
    url = urlsplit(endpoint or "")
    amazon = endpoint is None or _is_amazon(endpoint)
    server = "S3" if amazon else f"{url.scheme}://{url.netloc}"
    answer = getattr(error, "response", None) or {}  # a ClientError's
    name = str(answer.get("Error", {}).get("Code") or type(error).__name__)
    if name in _REASONS:
        return _REASONS[name].format(server=server, bucket=bucket, seconds=seconds)
    if not re.fullmatch(r"[A-Za-z]{1,40}", name):
        name = type(error).__name__
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", "no answer")
    checks = "check AWS_ENDPOINT_URL, the server, and the credentials"
    return f"{server} cannot be used ({name}, {status}); {checks}"
