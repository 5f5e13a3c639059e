"""One door to where runs are kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from amint_ray.contracts import UserError, first_line


def writable_folder(path: str | Path, key: str) -> Path:
    """The absolute path of a folder that can be written or made; nothing is left behind by asking.

    Args:
        path: the folder, relative to the working directory or absolute; it need not exist.
        key: the configuration key or variable that set it, for the error.

    Raises:
        UserError: it cannot be made or written to.
    """
    if "://" in str(path):
        raise UserError(f"{key} = {str(path)!r}: only folders are supported, no addresses")
    try:
        folder = Path(path).expanduser().absolute()
        standing = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryDirectory(dir=standing):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{key}: cannot write to {str(path)!r} (in {Path.cwd()}): {reason}; "
            "name another folder, or work in one that is writable"
        ) from error
    return folder
