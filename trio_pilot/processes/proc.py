"""Facts about other processes, read from /proc. Standard library only: the guardian loads nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path

from trio_pilot.processes.identity import ENV_END, ENV_START, FLAGS, PARENT, THREADS, stat_of

UID_MAP = Path("/proc/self/uid_map")
PF_EXITING = 0x4  # linux/sched.h


def is_dying(pid: int) -> bool:
    """Return whether a process is exiting or a zombie. Its first thread may end before the others do.

    Raises:
        FileNotFoundError: There is no such process.
    """
    fields = _stat(pid)
    return bool(int(fields[FLAGS]) & PF_EXITING) and int(fields[THREADS]) <= 1


def environment_of(pid: int) -> bytes | None:
    """Return the environment of a process; None in the middle of execve(2), when it looks empty, or after its death.

    Raises:
        OSError: There is no such process any more, or it is another user's.
    """
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except ProcessLookupError:  # it has just died: what it started may be an orphan by now
        return None
    fields = _stat(pid)
    is_empty = int(fields[ENV_START]) == int(fields[ENV_END]) > 0
    return environment if environment or is_empty else None


def real_user_of(pid: int) -> int | None:
    """Return the user that started a process, whatever user it has become by a set-uid program; None if it is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123 -- of thousands of processes
            return next(int(line.split()[1]) for line in file if line.startswith(b"Uid:"))
    except (OSError, StopIteration):
        return None


def _stat(pid: int) -> list[str]:
    if (fields := stat_of(pid)) is None:
        raise FileNotFoundError(pid)
    return fields


def knows_all_users() -> bool:
    """Return whether each user is the same in the user namespace of this process as on the machine: user_namespaces(7)."""
    try:
        return UID_MAP.read_text().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


def is_relative(pid: int) -> bool:
    """Return whether a process is this process, one of its ancestors or one of its descendants."""
    return pid in with_ancestors(os.getpid()) or os.getpid() in with_ancestors(pid)


def with_ancestors(pid: int) -> Iterator[int]:
    """Yield a process, its parent, and so on."""
    while pid:
        yield pid
        fields = stat_of(pid)
        pid = int(fields[PARENT]) if fields else 0
