"""Processes that a dead pilot left: found, and killed. Everything here blocks.

Used by the guardian, which loads nothing but the standard library, and by the sweep at the start of a pilot.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trio_pilot.processes.identity import DEAD_STATES, PARENT, SESSION, STARTED, STATE, Identity, own, stat_of
from trio_pilot.processes.proc import real_user_of
from trio_pilot.processes.signals import signal_if

MARKER = "TRIO_PILOT_CONTAINER"  # environment variable that marks the processes of a container: PILOT/CONTAINER

KILL_TIMEOUT = 5.0  # seconds for SIGKILL to act; a process that waits in the kernel may take longer, and nothing helps
KILL_INTERVAL = 0.01  # seconds between two searches

# Up to its end: an environment may have megabytes of anything in it.
MARKED = re.compile(rb"(?:^|\0)" + MARKER.encode() + rb"=([^\0/]{1,100})/")

PilotFilter = Callable[[Identity], bool]  # selects the pilots whose processes, groups or containers are removed


def mark(container: str) -> str:
    """Return the value of MARKER for a container of this pilot."""
    return f"{own()}/{container}"


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    started: int
    session: int
    pilot: Identity | None  # that it runs for, by its environment
    parent: int = field(compare=False)  # another one once that has ended


def end_processes(theirs: PilotFilter) -> int:
    """Kill all processes of some pilots, and their descendants; return the number of processes.

    The processes of a container are found by the marker in their environment, those that have cleaned it by their session
    or their parent. Any user may set a marker: it counts in a process that this user has started, and so do the sessions of
    such processes, for other processes that this user has started. The descendants of a process that is found are killed
    whatever user they have become.
    """
    killed: set[int] = set()
    sessions: set[int] = set()  # of all searches: what is forked during one may be all that is left of a session at the next
    deadline = time.monotonic() + KILL_TIMEOUT
    while (found := _find(theirs, sessions)) and time.monotonic() < deadline:
        for process in found:
            signal_if(process.pid, signal.SIGKILL, partial(_is_still, process))
        killed |= {process.pid for process in found}
        time.sleep(KILL_INTERVAL)
    return len(killed)


def _find(theirs: PilotFilter, sessions: set[int]) -> list[_Process]:
    processes = list(_processes())
    marked = [one for one in processes if one.pilot and theirs(one.pilot)]
    sessions |= {one.session for one in marked} - {os.getsid(0)}
    found = {one.pid for one in processes if one.session in sessions and _is_own(one.pid)} | {one.pid for one in marked}
    while below := {one.pid for one in processes if one.parent in found} - found:
        found |= below
    return [one for one in processes if one.pid in found - {os.getpid()}]


def _is_own(pid: int) -> bool:
    return real_user_of(pid) == os.getuid()


def _is_still(process: _Process) -> bool:
    """Return whether a process is the one that was found: it may have ended since, and its number be another's."""
    return _process(process.pid) == process


def _processes() -> Iterator[_Process]:
    for name in os.listdir("/proc"):  # noqa: PTH208 -- thousands of them
        if name.isdigit() and (process := _process(int(name))):
            yield process


def _process(pid: int) -> _Process | None:
    facts = stat_of(pid)
    if not facts or facts[STATE] in DEAD_STATES:
        return None
    return _Process(pid, int(facts[STARTED]), int(facts[SESSION]), _pilot_of(pid), parent=int(facts[PARENT]))


def _pilot_of(pid: int) -> Identity | None:
    with suppress(OSError):  # gone, or another user's
        found = MARKED.search(Path(f"/proc/{pid}/environ").read_bytes())
        if found and _is_own(pid):
            return Identity.parse(found[1].decode(errors="replace"))
    return None
