"""One door to where runs are kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from amint_ray.contracts import UserError


def open_folder(path: str | Path, key: str) -> Path:
    """An existing, writable folder as an absolute path; made if it was not there.

    Args:
        path: the folder, relative to the working directory or absolute.
        key: the configuration key or variable that set it, for the error.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: cannot write to {folder}: {error.strerror or error}; "
            "name another folder or work in one that is writable"
        ) from error
    return folder
