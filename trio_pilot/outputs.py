"""What a task says on its stdout and stderr, and how much of it is kept. Everything here blocks."""

import os
from pathlib import Path
from typing import IO


def open_output(path: Path) -> IO[bytes]:
    """Open an output of a task, empty. Each write goes to its end, wherever that is by then: so it can be cut meanwhile."""
    return open(path, "wb", 0, opener=_open_to_append)


def _open_to_append(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND, 0o666)
