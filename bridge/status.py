"""What a running program is doing, in a file that other commands read: status.json in its folder."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from threading import get_ident
from typing import Any

_NAME = "status.json"


def write_status(folder: Path, facts: dict[str, Any]) -> None:
    """Replace the status of the program whose folder this is. It need not survive a power failure."""
    temporary = folder / f"{_NAME}.{get_ident()}"  # another thread may write its own at the same time
    temporary.write_text(json.dumps({**facts, "time": time.time()}) + "\n")
    temporary.replace(folder / _NAME)


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status that was written last, with `time` (Unix, seconds); {} if there is none."""
    try:
        status: dict[str, Any] = json.loads((folder / _NAME).read_text())
    except (OSError, ValueError):
        return {}
    return status


def is_locked(path: Path) -> bool:
    """Whether a running program holds a lock file."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
