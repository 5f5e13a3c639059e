"""The secret codes of a run's images; only the driver ever has the key."""

from __future__ import annotations

import contextlib
import os

from amint_ray.config.schema import Config
from amint_ray.contracts import UserError
from amint_ray.data.keys import (
    MOST_BITS,
    codes,
    image_content,
    key_fingerprint,
    load_key,
    perceptual_content,
)
from amint_ray.data.loading import Codes
from amint_ray.launch.dataset import Dataset

_CHECKED: dict[str, bytes] = {}
"""Keys by their fingerprints: a run has the one that was checked, whatever becomes of its file."""


def with_key(config: Config) -> Config:
    """The configuration with its key's fingerprint in it, where it asks for codes.

    Raises:
        UserError: the key cannot be had, or is not the one that the configuration wants.
    """
    if not config.wants_codes:
        return config
    mint = config.mint
    key, wanted = take_key(key_file=mint.key_file, key_env=mint.key_env), mint.keyed.fingerprint
    found = key_fingerprint(key)
    if wanted is not None and wanted != found:
        raise UserError(
            f"{_where(config)}: its fingerprint is {found[:16]}…, which is not the one that "
            "mint.keyed.fingerprint wants; bring the key that belongs to it"
        )
    _CHECKED[found] = key
    keyed = mint.keyed.model_copy(update={"fingerprint": found})
    return config.model_copy(update={"mint": mint.model_copy(update={"keyed": keyed})})


def keyless(config: Config) -> Config:
    """The configuration for what reads a run's images and teaches nobody their codes.

    A variable that holds a key is taken out of what later processes inherit all the same.
    """
    variable = config.mint.key_env
    if variable is not None:
        with contextlib.suppress(UserError):  # what is no key is not wanted either
            take_key(key_file=None, key_env=variable)
    mint = config.mint.model_copy(update={"key_file": None, "key_env": None})
    loss = config.loss.model_copy(update={"lambda_mint": 0.0})
    return config.model_copy(update={"mint": mint, "loss": loss})


def codes_of(config: Config, dataset: Dataset) -> Codes | None:
    """(n, 64) of 0 and 1 in the index's order: a search may try several lengths.

    None where codes are not asked for.

    Args:
        config: with its key, as `with_key` gave it in this process.
        dataset: the images.
    """
    if not config.wants_codes:
        return None
    assert config.mint.keyed.fingerprint is not None
    key = _CHECKED[config.mint.keyed.fingerprint]
    index = dataset.index
    if config.mint.keyed.code_from == "perceptual":
        assert index.perceptual is not None
        contents = [perceptual_content(each) for each in index.perceptual.tolist()]
    elif dataset.images is not None:
        contents = [image_content(image) for image in dataset.images]
    else:
        assert index.scored is not None
        contents = index.scored
    return codes(key, contents, MOST_BITS)


_TAKEN: dict[str, bytes] = {}
"""Keys by the environment variables that held them."""


def take_key(*, key_file: str | None, key_env: str | None) -> bytes:
    """The key; the variable that held it is no longer there for processes that are started later.

    Args:
        key_file: as for `load_key`.
        key_env: likewise; once it was taken, this process alone still has it.

    Raises:
        UserError: as `load_key`.
    """
    if key_env is not None and key_env not in os.environ and key_env in _TAKEN:
        return _TAKEN[key_env]
    key = load_key(key_file=key_file, key_env=key_env)
    if key_env is not None:
        del os.environ[key_env]
        _TAKEN[key_env] = key
    return key


def _where(config: Config) -> str:
    if config.mint.key_file is not None:
        return f"mint.key_file = {config.mint.key_file!r}"
    return f"mint.key_env = {config.mint.key_env}"
