"""Files in /proc by which root can change the kernel (it owns them, and needs no capability), or learn about it."""

import os
from collections.abc import Iterator
from pathlib import Path

NAMES = (  # of what can be written
    "sys",
    "sysrq-trigger",
    "irq",
    "bus",
    "mtrr",
    "fs",
    "acpi",
    "scsi",
    "pressure",
    "driver",
    "asound",
)
# What docker hides: the names of keys, and what the kernel does.
MASKED = ("keys", "timer_list", "sched_debug", "latency_stats", "timer_stats")


def kernel_files() -> Iterator[Path]:
    """Yield the files and directories to mount read-only in a container whose user is root here; else none."""
    if os.geteuid() == 0:
        yield from (path for path in (Path("/proc", name) for name in NAMES) if path.exists())


def masked_files() -> Iterator[Path]:
    """Yield the files of the kernel to hide in a container."""
    yield from (path for path in (Path("/proc", name) for name in MASKED) if path.exists())
