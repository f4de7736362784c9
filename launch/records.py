"""Files of JSON lines beside a job, which tell afterwards what happened."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)


def append_line(path: Path, fields: Mapping[str, object]) -> None:
    """Append a JSON line to a record; one that cannot be written, as on a full disk, ends no job and is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
    except OSError as error:
        log.warning("%s: could not be written: %s: %s", path, error, json.dumps(fields))
