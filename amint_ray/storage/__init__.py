"""One door to where data and runs are kept: local folders and S3."""

from amint_ray.storage.locations import (
    FileEntry,
    Location,
    check_access,
    check_folder,
    check_writable,
    delete,
    exists,
    list_files,
    locate,
    open_input,
    without_secrets,
    writable_folder,
    write_atomically,
)

__all__ = [
    "FileEntry",
    "Location",
    "check_access",
    "check_folder",
    "check_writable",
    "delete",
    "exists",
    "list_files",
    "locate",
    "open_input",
    "without_secrets",
    "writable_folder",
    "write_atomically",
]
