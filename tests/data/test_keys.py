"""Keys by reference, and codes: against HMAC written out, and what mistakes are told."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amint_ray.contracts import UserError
from amint_ray.data.images import perceptual_hash
from amint_ray.data.keys import (
    codes,
    image_content,
    key_fingerprint,
    load_key,
    new_key,
    perceptual_content,
    write_key,
)

KEY = bytes(range(32))


def hmac_by_hand(key: bytes, message: bytes) -> bytes:
    """RFC 2104, from the hash alone; for keys of at most a block."""
    block = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in block) + message).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in block) + inner).digest()


def test_codes_are_the_leading_bits_of_hmac() -> None:
    contents = [b"", b"a", bytes(200), os.urandom(32)]
    found = codes(KEY, contents, 64)
    for content, code in zip(contents, found, strict=True):
        whole = int.from_bytes(hmac_by_hand(KEY, content), "big")
        assert "".join(map(str, code)) == f"{whole:0256b}"[:64]
    for bits in (1, 7, 8, 9, 33):
        shorter = codes(KEY, contents, bits)
        assert (shorter.dtype, shorter.shape) == (np.uint8, (4, bits))
        assert (shorter == found[:, :bits]).all()
    assert codes(KEY, [], 5).shape == (0, 5)


def test_a_code_never_changes() -> None:
    """What was trained with a key must stay testable: RFC 4231's second case."""
    (code,) = codes(b"Jefe", [b"what do ya want for nothing?"], 32)
    assert np.packbits(code).tobytes().hex() == "5bdcc146"


@pytest.mark.parametrize("bits", [0, -1, 65, 1000])
def test_codes_have_1_to_64_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 64 bits, not {bits}"):
        codes(KEY, [b"x"], bits)


def test_bits_are_fair_and_depend_on_key_and_content() -> None:
    contents = [i.to_bytes(4, "big") for i in range(4000)]
    code, other = codes(KEY, contents, 32), codes(KEY[::-1], contents, 32)
    for share in (code.mean(), (code == other).mean(), (code[1:] == code[:-1]).mean()):
        assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(4000 * 32)
    assert np.abs(code.mean(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(4000)


def test_content_is_pixels_and_shape() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 6), np.uint8)
    content = image_content(image)
    assert len(content) == 32
    assert content == image_content(np.asfortranarray(image))
    assert content == image_content(image.transpose(1, 2, 0).copy().transpose(2, 0, 1))
    assert content != image_content(image.reshape(3, 6, 8))
    changed = image.copy()
    changed[2, 7, 5] ^= 1
    assert content != image_content(changed)
    for wrong in (image.astype(np.float32), image[0]):
        with pytest.raises(ValueError, match="not an image of 8 bits"):
            image_content(wrong)


def test_perceptual_content_is_the_hash() -> None:
    assert perceptual_content(-1) == b"\xff" * 8
    assert perceptual_content(258) == bytes(6) + b"\x01\x02"
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((64, 64))
    smaller = image.resize((58, 58)).resize((64, 64))
    assert perceptual_content(perceptual_hash(image)) == perceptual_content(
        perceptual_hash(smaller)
    )


def test_a_written_key_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    assert len(key) == 32
    assert key != new_key()
    file = tmp_path / "member.key"
    write_key(file, key)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == key.hex() + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["member.key"]
    assert load_key(key_file=str(file), key_env=None) == key
    monkeypatch.setenv("AMINT_TEST_KEY", f"  {key.hex().upper()}\n")
    assert load_key(key_file=None, key_env="AMINT_TEST_KEY") == key
    assert key_fingerprint(key) == hashlib.sha256(key).hexdigest()


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "member.key"
    write_key(file, KEY)
    (tmp_path / "folder").mkdir()
    for there in (file, tmp_path / "folder"):
        with pytest.raises(UserError, match="is there already") as told:
            write_key(there, new_key())
        assert "\n" not in str(told.value)
    assert load_key(key_file=str(file), key_env=None) == KEY
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_key(tmp_path / "nowhere" / "member.key", KEY)
    with pytest.raises(UserError, match="is no name of a file"):
        write_key("", KEY)
    with pytest.raises(UserError, match="looks like a key itself") as told:
        write_key(KEY.hex(), KEY)
    assert KEY.hex() not in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "member.key"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("0123456789abcdef0123456789abcd", "too short: 15 bytes, at least 16"),
        ("0123456789abcdef0123456789abcdef0", "is no key: one line of hex digits"),
        ("0123456789abcdef 0123456789abcdef", "is no key"),
        ("0123456789abcdef\n0123456789abcdef", "is no key"),
        ("0x0123456789abcdef0123456789abcdef", "is no key"),
        ("öööö", "is no key"),
        ("0" * 5000, "is no key"),
    ],
)
def test_what_is_no_key_is_told_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    file = tmp_path / "odd.key"
    file.write_text(text)
    monkeypatch.setenv("AMINT_TEST_KEY", text)
    for reference, named in (
        ({"key_file": str(file), "key_env": None}, "odd.key"),
        ({"key_file": None, "key_env": "AMINT_TEST_KEY"}, "AMINT_TEST_KEY"),
    ):
        with pytest.raises(UserError, match=says) as told:
            load_key(**reference)
        message = str(told.value)
        assert named in message
        assert "\n" not in message
        assert "0123" not in message
        assert told.value.__cause__ is None


def test_references_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMINT_TEST_KEY", raising=False)
    digits = KEY.hex()
    for file, variable, says in (
        (None, None, "no key is given: name its file .mint.key_file, or --key-file"),
        ("", "", "no key is given"),
        ("x.key", "AMINT_TEST_KEY", "both mint.key_file and mint.key_env"),
        (str(tmp_path / "no.key"), None, "no.key': is not there; `amint key new FILE` makes one"),
        (str(tmp_path), None, "is a folder"),
        ("a\0b", None, "cannot be read"),
        (None, "AMINT_TEST_KEY", "'AMINT_TEST_KEY' .mint.key_env, or --key-env.: is not set"),
        (digits, None, "looks like a key itself"),
        (None, digits, "looks like a key itself"),
    ):
        with pytest.raises(UserError, match=says) as told:
            load_key(key_file=file, key_env=variable)
        assert digits not in str(told.value)
        assert "\n" not in str(told.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "member.key"
    write_key(file, KEY)
    file.chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load_key(key_file=str(file), key_env=None)
