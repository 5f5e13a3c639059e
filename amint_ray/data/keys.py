"""The key of a keyed MINT head, and the code that it gives to an image's content.

A code is the beginning of HMAC-SHA256(key, content). Whoever does not have the key cannot tell it
from fair coin flips, and that it is fair is all that the tests of `evaluation/keyed.py` assume. So
the key is handled by reference: a file or an environment variable is named, and what is recorded
is its fingerprint.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amint_ray.contracts import MAYBE_KEY, UserError, first_line

KEY_BYTES = 32
"""What a new key has: as many as SHA-256 gives."""
FEWEST_KEY_BYTES = 16
MOST_BITS = 64
"""Longest code."""
_LONGEST_FILE = 4096
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+")
_MAKE_ONE = "`amint key new FILE` makes one"


def load_key(*, key_file: str | None, key_env: str | None) -> bytes:
    """The key's bytes, from where the configuration says that they are.

    Args:
        key_file: a file with one line of hex digits, as `write_key` writes it.
        key_env: name of an environment variable with the same digits.

    Raises:
        UserError: none or both are given, or what is named is not there or is no key. The text
            never has anything of the key in it.
    """
    if key_file and key_env:
        raise UserError("both mint.key_file and mint.key_env name a key; give one of them")
    if key_file:
        return _key_of(_read(key_file), f"key file {_shown(key_file)}")
    if key_env:
        where = f"environment variable {_shown(key_env)} (mint.key_env, or --key-env)"
        if key_env not in os.environ:
            raise UserError(f"{where}: is not set; it must hold the key's hex digits")
        return _key_of(os.environ[key_env], where)
    raise UserError(
        "no key is given: name its file (mint.key_file, or --key-file) or the environment "
        f"variable that holds it (mint.key_env, or --key-env); {_MAKE_ONE}"
    )


def key_fingerprint(key: bytes) -> str:
    """What may be published of a key: the SHA-256 of its bytes, in hex.

    It commits to the key and tells nothing of it: 32 random bytes cannot be guessed.
    """
    return hashlib.sha256(key).hexdigest()


def new_key() -> bytes:
    """A random key, from the operating system's source for cryptography."""
    return secrets.token_bytes(KEY_BYTES)


def write_key(path: str | Path, key: bytes) -> None:
    """Write a key as one line of hex, for its owner alone (mode 0600), whole or not at all.

    Args:
        path: the file; its folder must be there.
        key: the key's bytes.

    Raises:
        UserError: there is something of that name already, or it cannot be written.
    """
    if not Path(path).name:
        raise UserError(f"key file {str(path)!r}: is no name of a file")
    if MAYBE_KEY.fullmatch(str(path)):
        raise UserError(f"key file {_shown(str(path))}; name a file")
    try:
        final = Path(path).expanduser()
        # No file beside it that is renamed: that would replace what is there.
        descriptor = os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(key.hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # Ctrl-C, too: half a key would stand in the way of a whole one
            final.unlink(missing_ok=True)
            raise
    except FileExistsError:
        raise UserError(
            f"key file {str(path)!r}: is there already; a key is never overwritten, since what was "
            "trained with it could not be tested any more; name another file"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: NUL; RuntimeError: ~nobody
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"key file {str(path)!r}: cannot be written: {reason}") from error


def image_content(image: npt.NDArray[np.uint8]) -> bytes:
    """What stands for an image where codes come from pixels: SHA-256 over its shape and bytes.

    Args:
        image: (C, H, W) the canonical image: decoded, EXIF rotation applied, RGB, resized to the
            model's input, 8 bits.

    Returns:
        32 bytes.

    Raises:
        ValueError: it is not of 8 bits, or not of three dimensions.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"not an image of 8 bits: {image.dtype}, shape {image.shape}")
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.digest()


def perceptual_content(perceptual: int) -> bytes:
    """What stands for an image where codes come from its looks: 8 bytes, big-endian.

    Args:
        perceptual: `data.images.perceptual_hash`, a signed 64-bit integer.
    """
    return perceptual.to_bytes(8, "big", signed=True)


def codes(key: bytes, contents: Sequence[bytes], bits: int) -> npt.NDArray[np.uint8]:
    """Each content's code: the leading bits of HMAC-SHA256(key, content) (RFC 2104).

    A code of fewer bits is the beginning of one of more.

    Args:
        key: the key's bytes.
        contents: n contents, of `image_content` or `perceptual_content`.
        bits: 1 to 64.

    Returns:
        (n, bits) of 0 and 1, the most significant bit of the first byte first.

    Raises:
        ValueError: a code cannot be of so many bits.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"a code has 1 to {MOST_BITS} bits, not {bits}")
    whole = -(-bits // 8)
    digests = b"".join(hmac.digest(key, content, "sha256")[:whole] for content in contents)
    octets = np.frombuffer(digests, np.uint8).reshape(len(contents), whole)
    return np.unpackbits(octets, axis=1, count=bits)


def _read(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(_LONGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"key file {_shown(path)}: is not there; {_MAKE_ONE}") from None
    except IsADirectoryError:
        raise UserError(f"key file {_shown(path)}: is a folder; name the file in it") from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL; RuntimeError: ~nobody
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"key file {_shown(path)}: cannot be read: {reason}") from None
    return raw.decode("latin-1")


def _key_of(text: str, where: str) -> bytes:
    digits = text.strip()
    if not digits:
        raise UserError(f"{where}: is empty; {_MAKE_ONE}")
    if len(digits) > _LONGEST_FILE or not _HEX.fullmatch(digits):
        raise UserError(
            f"{where}: is no key: one line of hex digits is expected, two a byte and at most "
            f"{_LONGEST_FILE}; {_MAKE_ONE}"
        )
    key = bytes.fromhex(digits)
    if len(key) < FEWEST_KEY_BYTES:
        raise UserError(
            f"{where}: the key is too short: {len(key)} bytes, at least {FEWEST_KEY_BYTES} are "
            f"needed; {_MAKE_ONE}"
        )
    return key


def _shown(name: str) -> str:
    """A name as an error shows it; a key that was given in its place is not repeated."""
    if MAYBE_KEY.fullmatch(name):
        return "(not shown: it looks like a key itself, and a reference to one is expected)"
    return repr(name)
