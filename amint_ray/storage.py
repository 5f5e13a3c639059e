"""One door to where runs are kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from amint_ray.contracts import UserError


def writable_folder(path: str | Path, key: str) -> Path:
    """The absolute path of a folder that can be written or made; nothing is left behind by asking.

    Args:
        path: the folder, relative to the working directory or absolute; it need not exist.
        key: the configuration key or variable that set it, for the error.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = Path(path).expanduser().absolute()
    try:
        standing = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryDirectory(dir=standing):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: cannot write to {folder}: {error.strerror or error}; "
            "name another folder, or work in one that is writable"
        ) from error
    return folder
