"""One door to where data and runs are kept: local folders and S3."""

from amint_ray.storage.locations import (
    FileEntry,
    Location,
    exists,
    list_files,
    locate,
    open_input,
    writable_folder,
    write_atomically,
)

__all__ = [
    "FileEntry",
    "Location",
    "exists",
    "list_files",
    "locate",
    "open_input",
    "writable_folder",
    "write_atomically",
]
