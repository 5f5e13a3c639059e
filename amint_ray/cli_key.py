"""`amint key`: making the key of a keyed MINT head, and committing to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document."
)


@click.group()
def key() -> None:
    """Make the key of a keyed MINT head, or show a key's fingerprint.

    The key is never printed. Its fingerprint may be published: it commits to the key.
    """


@key.command()
@click.argument("file")
@_JSON
def new(file: str, as_json: bool) -> None:
    """Write a new random key to FILE, readable by its owner alone, and print its fingerprint.

    A file that is there is not overwritten. For instance: amint key new member.key
    """
    from amint_ray.data.keys import new_key, write_key

    secret = new_key()
    write_key(file, secret)
    _print(file, secret, as_json=as_json)


@key.command()
@click.argument("file")
@_JSON
def fingerprint(file: str, as_json: bool) -> None:
    """Print the fingerprint of the key in FILE: the SHA-256 of its bytes.

    For instance: amint key fingerprint member.key
    """
    from amint_ray.data.keys import load_key

    _print(file, load_key(key_file=file, key_env=None), as_json=as_json)


def _print(file: str, secret: bytes, *, as_json: bool) -> None:
    from amint_ray.data.keys import key_fingerprint
    from amint_ray.tables import print_document

    document = {"key_file": file, "fingerprint": key_fingerprint(secret)}
    print_document(document, _show, sys.stdout, as_json=as_json)


def _show(document: Mapping[str, str], console: Console) -> None:
    """The fingerprint alone, so that a script can take it as it is."""
    console.print(document["fingerprint"], markup=False, highlight=False)
