"""Limits of containers that are child processes: control groups where the pilot may make them, rlimits elsewhere.

A process is within its limits from its first instruction: a shell sets them for itself, and then executes the program.
Nothing is safe to do between fork and exec of a program with threads, and there is no engine that could set them.
"""

import itertools
import os
import resource
import shlex
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.processes import cgroups, threads
from trio_pilot.processes.cgroup_removal import REMOVE_TIMEOUT
from trio_pilot.processes.identity import THREADS, stat_of
from trio_pilot.runtimes import NOT_EXECUTABLE, NOT_FOUND, Container, Limits

NO_LIMITS = Limits()
NOT_ENFORCED = "not enforced"

SHELL, SHELL_NAME = "/bin/sh", "trio-pilot"
NOT_ENTERED = 125  # the shell's exit code if it could not set a limit for itself
SHELL_VARIABLES = ("PWD", "OLDPWD", "SHLVL")  # which shells add to the environment

CALL_TIMEOUT = REMOVE_TIMEOUT + 1.0  # seconds for a call that has a deadline of its own

CONTROLLERS = {"memory": "memory", "cpus": "cpu", "pids": "pids"}  # of each of the limits

OpenGroups = Callable[[], cgroups.Groups]


class Confinement:
    """The limits of one container, in force while it is entered. This base class sets none."""

    async def __aenter__(self) -> "Confinement":
        """Prepare the limits. Raises NodeError if that fails."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill the processes that are left in the container's control group, if it has one."""

    def argv(self, argv: Sequence[str], env: Mapping[str, str]) -> Sequence[str]:  # noqa: ARG002
        """Return the arguments that run `argv` within the limits."""
        return argv

    def refusal(self, code: int, stderr: Path) -> str | None:  # noqa: ARG002
        """Return the shell's error if it could not set the limits (NOT_ENTERED) or execute the program, else None."""
        return None

    @property
    def out_of_memory(self) -> bool:
        """Whether a process of the container was killed because the container exceeded its memory."""
        return False


UNCONFINED = Confinement()


@asynccontextmanager
async def open_limiter(extra_pids: int = 0, open_groups: OpenGroups = cgroups.Groups) -> AsyncIterator["Limiter"]:
    """Open the limiter of a runtime's containers, and close it at the end.

    Args:
        extra_pids: the processes and threads that the runtime itself adds to each container.
        open_groups: opens the control groups.
    """
    limiter = Limiter(extra_pids, open_groups)
    try:
        yield limiter
    finally:
        await limiter.close()


class Limiter:
    """Limits the containers of a runtime."""

    def __init__(self, extra_pids: int, open_groups: OpenGroups = cgroups.Groups) -> None:
        self._extra_pids = extra_pids
        self._open_groups = open_groups
        self._means: Means | None = None
        self._lock = trio.Lock()

    def confine(self, container: Container) -> Confinement:
        """Return the limits of a container, to be entered while it runs. Without limits it does nothing."""
        return UNCONFINED if container.limits == NO_LIMITS else _Limited(self, container, self._extra_pids)

    async def means(self, limits: Limits) -> "Means":
        """Return the means of this machine. The first call looks for them, and logs which of the limits are not enforced."""
        async with self._lock:
            if self._means is None:
                self._means = await threads.run_sync(lambda: Means(self._open_groups()))
                for kind, by in self._means.enforcement(limits).items():
                    if by.startswith(NOT_ENFORCED):
                        LOGGER.warning("--task-%s is %s", kind, by)
        return self._means

    async def close(self) -> None:
        """Remove what was made for all containers."""
        if self._means:
            with trio.move_on_after(CALL_TIMEOUT, shield=True):
                await threads.run_sync(self._means.close)


async def enforcement(limits: Limits) -> Mapping[str, str]:
    """Return what enforces each of the limits that are set, or NOT_ENFORCED and the reason."""
    return await threads.run_sync(_enforcement, limits)


def _enforcement(limits: Limits) -> Mapping[str, str]:
    means = Means(cgroups.Groups())
    try:
        return means.enforcement(limits)
    finally:
        means.close()


class Means:
    """The means of this machine to limit a process. Calls block."""

    def __init__(self, groups: cgroups.Groups) -> None:
        self.groups = groups
        self.taskset = shutil.which("taskset")
        self._turns = itertools.count()

    def close(self) -> None:
        """Remove what was made."""
        self.groups.close()

    def enforcement(self, limits: Limits) -> Mapping[str, str]:
        """Return what enforces each of the limits that are set."""
        return {kind: self._by(kind) for kind in CONTROLLERS if getattr(limits, kind) is not None}

    def _by(self, kind: str) -> str:
        if self.in_group(kind):
            return "control group"
        why = self.groups.fault(CONTROLLERS[kind])
        if kind == "memory":
            return f"rlimit, the address space of each process for itself ({why})"
        if kind == "cpus" and self.taskset:
            return f"affinity, whole CPUs, which a task can undo ({why})"
        if kind == "pids" and os.geteuid():
            return f"rlimit, all processes of this user together ({why})"
        return f"{NOT_ENFORCED}: {why}, and {'there is no taskset' if kind == 'cpus' else 'rlimits do not bind root'}"

    def in_group(self, kind: str) -> bool:
        """Return whether a control group enforces a limit."""
        return CONTROLLERS[kind] in self.groups.controllers

    def some_cpus(self, number: float) -> Sequence[int]:
        """Return so many of the pilot's CPUs, others with each call."""
        allowed = sorted(os.sched_getaffinity(0))
        count = min(max(int(number), 1), len(allowed))
        first = next(self._turns) * count
        return sorted({allowed[(first + one) % len(allowed)] for one in range(count)})


class _Limited(Confinement):
    """The limits of a container that has some."""

    def __init__(self, limiter: Limiter, container: Container, extra_pids: int) -> None:
        self._limiter = limiter
        self._container = container
        self._extra_pids = extra_pids
        self._name = f"{SHELL_NAME}-{uuid.uuid4().hex}"  # the beginning of the shell's errors, which no payload can know
        self._steps: list[str] = []
        self._group: cgroups.Group | None = None

    async def __aenter__(self) -> Confinement:
        means = await self._limiter.means(self._container.limits)
        with map_exceptions({OSError: NodeError}, "cannot limit what a container uses"):
            await threads.run_sync(self._prepare, means)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._group:
            with trio.move_on_after(CALL_TIMEOUT, shield=True):
                if not await threads.run_sync(self._group.remove):
                    LOGGER.error("the control group of %s cannot be removed", self._container.name)

    def _prepare(self, means: Means) -> None:
        commands = list(rlimit_commands(self._container.limits, self._extra_pids, means))
        if settings := list(_settings(self._container.limits, self._extra_pids, means)):
            self._group = means.groups.make(self._container.name, settings)
            self._steps += [f"echo 0 > {shlex.quote(str(entrance))}" for entrance in self._group.entrances]
        self._steps += commands

    def argv(self, argv: Sequence[str], env: Mapping[str, str]) -> Sequence[str]:
        """Return the arguments of a shell that sets the limits for itself, and then executes the program."""
        added = " ".join(name for name in SHELL_VARIABLES if name not in env)
        script = f'{" && ".join(self._steps) or ":"} || exit {NOT_ENTERED}; unset {added}; exec "$@"'
        return [SHELL, "-c", script, self._name, *argv]

    def refusal(self, code: int, stderr: Path) -> str | None:
        """Return the first line of the shell's error; None if not the shell ended with such a code, but the program."""
        if code not in (NOT_ENTERED, NOT_EXECUTABLE, NOT_FOUND):
            return None
        line = ""
        with suppress(OSError), stderr.open("rb") as file:
            line = file.readline(4096).decode(errors="replace").strip()
        return line.replace(self._name, SHELL_NAME) if line.startswith(f"{self._name}: ") else None

    @property
    def out_of_memory(self) -> bool:
        """Whether the control group has counted such a kill."""
        return self._group is not None and self._group.out_of_memory


def _settings(limits: Limits, extra_pids: int, means: Means) -> Iterator[cgroups.Setting]:
    if limits.memory is not None and means.in_group("memory"):
        yield cgroups.memory(limits.memory)
    if limits.cpus is not None and means.in_group("cpus"):
        yield cgroups.cpus(limits.cpus)
    if limits.pids is not None and means.in_group("pids"):
        yield cgroups.pids(limits.pids + extra_pids)


def rlimit_commands(limits: Limits, extra_pids: int, means: Means) -> Iterator[str]:
    """Yield a shell's commands for the limits that no control group enforces, in the order in which all can be executed."""
    if limits.cpus is not None and not means.in_group("cpus") and means.taskset:
        cpus = ",".join(map(str, means.some_cpus(limits.cpus)))
        yield f"{shlex.quote(means.taskset)} -cp {cpus} $$ > /dev/null"
    if limits.memory is not None and not means.in_group("memory"):
        yield f"ulimit -v {_at_most(limits.memory, resource.RLIMIT_AS) // 1024}"
    if limits.pids is not None and not means.in_group("pids") and os.geteuid():
        # The kernel counts all processes of this user on the whole machine: so those that exist are added.
        number = _at_most(_processes_of_this_user() + limits.pids + extra_pids, resource.RLIMIT_NPROC)
        yield f"{{ ulimit -u {number} 2> /dev/null || ulimit -p {number}; }}"  # the flag of bash, or that of dash


def _at_most(number: int, which: int) -> int:
    """Return a limit, lowered to the hard limit of the pilot, which it cannot raise."""
    hard = resource.getrlimit(which)[1]
    return number if hard == resource.RLIM_INFINITY else min(number, hard)


def _processes_of_this_user() -> int:
    entries = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return sum(_threads(entry) for entry in entries)


def _threads(process: Path) -> int:
    try:
        return int((stat_of(int(process.name)) or [])[THREADS]) if process.stat().st_uid == os.geteuid() else 0
    except (OSError, IndexError):  # it has ended meanwhile
        return 0
