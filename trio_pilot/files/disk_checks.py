"""Checks of what each machine needs: a disk that can be written, and a clock that is right. Everything here blocks."""

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from trio_pilot.errors import NodeError, map_exceptions

YEARS = range(2026, 2100)  # that a clock that is right may show
MOST_SKEW = 60.0  # seconds between the clock of this machine and that of the data directory's file system
TRIAL = 2**14  # bytes to write as a test


def check_writable(directory: Path) -> None:
    """Write a file and sync it to disk. Raises NodeError if that fails."""
    with map_exceptions({OSError: NodeError}, f"cannot write in {directory}"), _trial(directory) as file:
        os.fsync(file)


def is_full(directory: Path) -> bool:
    """Return whether this user cannot write in a directory because the disk, or the quota, is used up."""
    try:
        with _trial(directory):
            return False
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _trial(directory: Path) -> Iterator[int]:
    """Write a file that has no name."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"?" * TRIAL)
        file.flush()
        yield file.fileno()


def disk_fault(directory: Path) -> str:
    """Return what is wrong with the disk of a directory: it is full, or fails; an empty text if nothing is."""
    try:
        free = os.statvfs(directory)
    except OSError as error:
        return f"(and its disk fails: {error.strerror})"
    return "(there is no room left on the disk)" if free.f_bavail * free.f_frsize < TRIAL else ""


def clock_skew(directory: Path) -> float:
    """Return the seconds by which the file system of a directory is ahead of this machine's clock.

    Raises:
        NodeError: This machine's clock, or that of the file system, is wrong.
    """
    if (now := datetime.now(UTC)).year not in YEARS:
        raise NodeError(f"the clock says {now:%Y-%m-%d}")
    with map_exceptions({OSError: NodeError}, f"no file in {directory}"), tempfile.TemporaryFile(dir=directory) as file:
        skew = os.fstat(file.fileno()).st_mtime - time.time()
    if abs(skew) > MOST_SKEW:
        raise NodeError(f"the file system of {directory} is {skew:+.0f} s off this machine's clock")
    return skew
