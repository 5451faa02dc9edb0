"""The memory, CPUs and processes that control groups leave to this process. Everything here blocks."""

import re
from collections.abc import Iterator
from pathlib import Path

from trio_pilot.processes.cgroup_hierarchies import Hierarchy, hierarchies

NO_MEMORY_LIMIT = 2**62  # bytes: without a limit, version 1 shows the largest number of whole pages


def most_memory() -> int | None:
    """Return the bytes of memory that the group of this process, and those above it, allow; None without a limit."""
    texts = [_text(group / place.main_file("memory")) for group, place in _groups("memory")]
    return min((int(text) for text in texts if text.isdecimal() and int(text) < NO_MEMORY_LIMIT), default=None)


def most_cpus() -> float | None:
    """Return the CPUs that the group of this process, and those above it, allow; None without a limit."""
    quotas = [_cpu_quota(group, place) for group, place in _groups("cpu")]
    found = [re.fullmatch(r"(\d+) (\d+)", quota) for quota in quotas]  # without a quota it is `max`, or -1
    return min((int(quota[1]) / int(quota[2]) for quota in found if quota), default=None)


def most_pids() -> int | None:
    """Return the processes and threads that the group of this process, and those above it, allow; None without a limit."""
    texts = [_text(group / place.main_file("pids")) for group, place in _groups("pids")]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def _cpu_quota(group: Path, place: Hierarchy) -> str:
    """Return `QUOTA PERIOD` of a group."""
    files = ("cpu.max",) if place.unified else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    return " ".join(_text(group / name) for name in files)


def _groups(controller: str) -> Iterator[tuple[Path, Hierarchy]]:
    """Yield the group of this process and those above it in the hierarchies of a controller."""
    for place in hierarchies():
        if controller in place.controllers:
            yield from ((group, place) for group in (place.here, *place.here.parents) if group.is_relative_to(place.mount))


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
