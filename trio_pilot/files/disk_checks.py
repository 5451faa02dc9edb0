"""What a machine must have to run anything: a disk to write to, and a clock that is right. Everything here blocks."""

import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from trio_pilot.errors import NodeError, map_exceptions

YEARS = range(2026, 2100)  # that a clock may show
MOST_SKEW = 60.0  # seconds between our clock and that of the data directory's file system
TRIAL = 2**14  # bytes


def check_writable(directory: Path) -> None:
    """Write a file, and have it on the disk. Raises NodeError if that does not work."""
    with map_exceptions({OSError: NodeError}, f"cannot write in {directory}"), tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"?" * TRIAL)
        file.flush()
        os.fsync(file.fileno())


def disk_fault(directory: Path) -> str:
    """Say that a disk is full, if it is."""
    try:
        free = os.statvfs(directory)
    except OSError as error:
        return f"(and its disk fails: {error.strerror})"
    return "(there is no room left on the disk)" if free.f_bavail * free.f_frsize < TRIAL else ""


def clock_skew(directory: Path) -> float:
    """Give the seconds that a directory's file system is ahead of our clock. Raises NodeError if either is wrong."""
    if (now := datetime.now(UTC)).year not in YEARS:
        raise NodeError(f"the clock says {now:%Y-%m-%d}")
    with map_exceptions({OSError: NodeError}, f"no file in {directory}"), tempfile.TemporaryFile(dir=directory) as file:
        skew = os.fstat(file.fileno()).st_mtime - time.time()
    if abs(skew) > MOST_SKEW:
        raise NodeError(f"the file system of {directory} is {skew:+.0f} s off our clock")
    return skew
