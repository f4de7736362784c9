"""What a full disk says."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainsys.data.errors import DiskFullError, PreparedError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def room(out_dir: Path) -> Iterator[None]:
    """Turns what a full disk or quota raises into DiskFullError, and a refused write into PreparedError."""
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSED:
            raise PreparedError(f"{out_dir}: cannot be written ({error}); name another folder") from error
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFullError(
            f"{out_dir}: no room for the tokens ({os.strerror(error.errno)}); "
            "free some and run again, it goes on where it stopped"
        ) from error
