"""What a pilot that is no more has left: its processes. Everything here blocks.

For the guardian, which has no more than the standard library, and for the sweep at the start of the next pilot.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trio_pilot.processes.identity import DEAD_STATES, PARENT, SESSION, STATE, Identity, own, stat_of

MARKER = "TRIO_PILOT_CONTAINER"  # the environment variable by which a container's processes are known: PILOT/CONTAINER

KILL_TIMEOUT = 5.0  # seconds for SIGKILL to act; a process in the kernel's hands may take longer, and nobody can help it
KILL_INTERVAL = 0.01  # seconds between two looks

Theirs = Callable[[Identity], bool]


def mark(container: str) -> str:
    """Give the value of MARKER for a container of ours."""
    return f"{own()}/{container}"


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    session: int
    pilot: Identity | None  # for whom it runs, as far as its environment says


def end_processes(theirs: Theirs) -> int:
    """Kill all processes of some pilots, and what these have started; give their number.

    Known are a container's processes by the marker in their environment; those that have cleaned it, by their session or
    their parent.
    """
    killed: set[int] = set()
    sessions: set[int] = set()  # for all looks: what is forked during one may be all that is left of a session at the next
    deadline = time.monotonic() + KILL_TIMEOUT
    while (found := _find(theirs, sessions)) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
        time.sleep(KILL_INTERVAL)
    return len(killed)


def _find(theirs: Theirs, sessions: set[int]) -> set[int]:
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
