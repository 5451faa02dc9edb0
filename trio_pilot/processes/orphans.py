"""Processes that a dead pilot left: found, and killed. Everything here blocks.

Used by the guardian, which loads nothing but the standard library, and by the sweep at the start of a pilot.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trio_pilot.processes.identity import DEAD_STATES, PARENT, SESSION, STATE, Identity, own, stat_of

MARKER = "TRIO_PILOT_CONTAINER"  # environment variable that marks the processes of a container: PILOT/CONTAINER

KILL_TIMEOUT = 5.0  # seconds for SIGKILL to act; a process that waits in the kernel may take longer, and nothing helps
KILL_INTERVAL = 0.01  # seconds between two searches

PilotFilter = Callable[[Identity], bool]  # selects the pilots whose processes, groups or containers are removed


def mark(container: str) -> str:
    """Return the value of MARKER for a container of this pilot."""
    return f"{own()}/{container}"


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    session: int
    pilot: Identity | None  # that it runs for, by its environment


def end_processes(theirs: PilotFilter) -> int:
    """Kill all processes of some pilots, and their descendants; return the number of processes.

    The processes of a container are found by the marker in their environment, those that have cleaned it by their session
    or their parent.
    """
    killed: set[int] = set()
    sessions: set[int] = set()  # of all searches: what is forked during one may be all that is left of a session at the next
    deadline = time.monotonic() + KILL_TIMEOUT
    while (found := _find(theirs, sessions)) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
        time.sleep(KILL_INTERVAL)
    return len(killed)


def _find(theirs: PilotFilter, sessions: set[int]) -> set[int]:
    processes = list(_processes())
    marked = [one for one in processes if one.pilot and theirs(one.pilot)]
    sessions |= {one.session for one in marked} - {os.getsid(0)}
    found = {one.pid for one in processes if one.session in sessions} | {one.pid for one in marked}
    while below := {one.pid for one in processes if one.parent in found} - found:
        found |= below
    return found - {os.getpid()}


def _processes() -> Iterator[_Process]:
    for name in os.listdir("/proc"):  # noqa: PTH208 -- thousands of them
        facts = stat_of(int(name)) if name.isdigit() else None
        if facts and facts[STATE] not in DEAD_STATES:
            yield _Process(int(name), int(facts[PARENT]), int(facts[SESSION]), _pilot_of(name))


def _pilot_of(pid: str) -> Identity | None:
    with suppress(OSError):  # gone, or another user's
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == MARKER.encode():
                return Identity.parse(value.decode(errors="replace").partition("/")[0])
    return None
