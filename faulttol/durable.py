"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write_whole(path: Path, content: bytes, mark: str = "new") -> None:
    """Write the file beside, wait until it is on disk, and rename it over `path`.

    `mark` names the file beside: writers that may meet each have their own. Raises: OSError; `path` is as it was
    then, unless only its folder could not be synced.
    """
    beside = path.with_name(f"{path.name}.{mark}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the entries of the folder are on disk, on a file system that lets one; others see to it themselves."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def is_there(path: Path) -> bool:
    """Whether there is such a file. Raises: OSError where nobody can tell; `Path.exists` does not in every Python."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True
