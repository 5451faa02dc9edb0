"""Removal of control groups, with the processes in them. Everything here blocks.

Standard library only: the guardian loads nothing else.
"""

import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from trio_pilot.processes.cgroup_hierarchies import PAYLOAD, PILOT
from trio_pilot.processes.identity import DEAD_STATES, PARENT, STARTED, STATE, stat_of
from trio_pilot.processes.signals import signal_listed

REMOVE_TIMEOUT = 5.0  # seconds for the kernel to let go of a group whose last process has ended; as a rule it takes none
REMOVE_INTERVAL = 0.002  # seconds between two attempts


def remove(group: Path) -> bool:
    """Kill and reap the processes in a group and those below it, and remove the groups; return whether they are gone."""
    deadline = time.monotonic() + REMOVE_TIMEOUT
    killed: dict[int, str] = {}  # when each of them started
    while True:
        _rmdir(group)
        killed = {pid: started for pid, started in killed.items() if not _is_reaped(pid, started, killed)}
        if not killed and not group.exists():
            return True
        if time.monotonic() > deadline:
            return False
        for one in _with_subgroups(group):
            killed |= _kill_in(one)
        time.sleep(REMOVE_INTERVAL)


def _kill_in(group: Path) -> dict[int, str]:
    """Kill the processes in a group; return when each of them started."""
    sent = signal_listed(signal.SIGKILL, partial(processes_in, group))
    return {pid: facts[STARTED] for pid in sent if (facts := stat_of(pid))}


def _rmdir(group: Path) -> None:
    """Remove a group and those below it, as far as they are empty."""
    with suppress(OSError):  # as a rule there is one group below, and both are empty
        (group / PAYLOAD).rmdir()
        group.rmdir()
        return
    for one in reversed(list(_with_subgroups(group))):
        with suppress(OSError):
            one.rmdir()


def remove_empty(top: Path) -> None:
    """Remove the group of a pilot, if it is empty."""
    for one in (top / PILOT, top):
        with suppress(OSError):
            one.rmdir()


def _is_reaped(pid: int, started: str, killed: Collection[int]) -> bool:
    """Return whether this process need not reap a killed process any more: it is gone, or dead and another's child.

    The child of another killed process becomes a child of this process a moment after both were killed.
    """
    fields = stat_of(pid)
    if fields is None or fields[STARTED] != started:  # its number may be that of a new child, which is reaped elsewhere
        return True
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return fields[STATE] in DEAD_STATES and int(fields[PARENT]) not in {*killed, os.getpid()}


def _with_subgroups(group: Path) -> Iterator[Path]:
    """Yield a group and all those below it, from the top down."""
    return (Path(directory) for directory, _, _ in os.walk(group))


def processes_in(group: Path) -> list[int]:
    """Return the processes in a group, except those of another PID namespace: they have no number here, and read 0."""
    with suppress(OSError):
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split() if pid != "0"]
    return []
