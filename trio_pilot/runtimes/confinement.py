"""What keeps a container that is a child process within its limits: control groups where we may make them, else rlimits.

A process is within its limits from its first instruction: a shell sets them for itself, and becomes it. Between fork and
exec of a program with threads nothing is safe to do, and an engine, which could do it for us, is not there.
"""

import itertools
import os
import resource
import shlex
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.processes import cgroups
from trio_pilot.processes.cgroup_removal import REMOVE_TIMEOUT
from trio_pilot.processes.identity import THREADS, stat_of
from trio_pilot.runtimes import NOT_EXECUTABLE, NOT_FOUND, Container, Limits

NO_LIMITS = Limits()
NOT_ENFORCED = "not enforced"

SHELL, SHELL_NAME = "/bin/sh", "trio-pilot"
NOT_ENTERED = 125  # the shell's exit code if it could not set a limit for itself
OF_SHELLS = ("PWD", "OLDPWD", "SHLVL")  # variables that shells add

CALL_TIMEOUT = REMOVE_TIMEOUT + 1.0  # seconds for what has a deadline of its own

CONTROLLERS = {"memory": "memory", "cpus": "cpu", "pids": "pids"}  # of each of the limits


class Confinement:
    """The limits of one container, in force while it is entered. These are none."""

    async def __aenter__(self) -> "Confinement":
        """Get ready. Raises NodeError if that fails."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill what is left of the container, as far as it is known by its control group."""

    def argv(self, argv: Sequence[str], env: Mapping[str, str]) -> Sequence[str]:  # noqa: ARG002
        """Give the arguments that run `argv` within the limits."""
        return argv

    def refusal(self, code: int, stderr: Path) -> str | None:  # noqa: ARG002
        """Give what the shell has said, if it could not set the limits (NOT_ENTERED), or not run what it should."""
        return None

    @property
    def out_of_memory(self) -> bool:
        """Whether a process of the container was killed for want of memory."""
        return False


UNCONFINED = Confinement()


@asynccontextmanager
async def open_limiter(extra_pids: int = 0) -> AsyncIterator["Limiter"]:
    """Open what confines the containers of a runtime, which itself adds some processes to each; close it at the end."""
    limiter = Limiter(extra_pids)
    try:
        yield limiter
    finally:
        await limiter.close()


class Limiter:
    """Confines the containers of a runtime."""

    def __init__(self, extra_pids: int) -> None:
        self._extra_pids = extra_pids
        self._means: Means | None = None
        self._lock = trio.Lock()

    def confine(self, container: Container) -> Confinement:
        """Give the limits of a container, to be entered around all of its life. Without limits nothing is done."""
        return UNCONFINED if container.limits == NO_LIMITS else _Confined(self, container, self._extra_pids)

    async def means(self, limits: Limits) -> "Means":
        """Find out once what there is, and say then what of the limits it cannot enforce."""
        async with self._lock:
            if self._means is None:
                self._means = await trio.to_thread.run_sync(Means)
                for kind, by in self._means.how(limits).items():
                    if by.startswith(NOT_ENFORCED):
                        LOGGER.warning("--task-%s is %s", kind, by)
        return self._means

    async def close(self) -> None:
        """Remove what was made for all containers."""
        if self._means:
            with trio.move_on_after(CALL_TIMEOUT, shield=True):
                await trio.to_thread.run_sync(self._means.close)


async def how(limits: Limits) -> Mapping[str, str]:
    """Tell what would enforce each of the limits that are set, here and now; what begins with NOT_ENFORCED says why not."""
    return await trio.to_thread.run_sync(_how, limits)


def _how(limits: Limits) -> Mapping[str, str]:
    means = Means()
    try:
        return means.how(limits)
    finally:
        means.close()


class Means:
    """What there is on this machine to limit a process with. Blocks."""

    def __init__(self) -> None:
        self.groups = cgroups.Groups()
        self.taskset = shutil.which("taskset")
        self._turns = itertools.count()

    def close(self) -> None:
        """Remove what was made."""
        self.groups.close()

    def how(self, limits: Limits) -> Mapping[str, str]:
        """Tell what enforces each of the limits that are set."""
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
        """Tell whether it is control groups that enforce a limit."""
        return CONTROLLERS[kind] in self.groups.controllers

    def some_cpus(self, number: float) -> Sequence[int]:
        """Take some of our CPUs, others each time."""
        ours = sorted(os.sched_getaffinity(0))
        count = min(max(int(number), 1), len(ours))
        first = next(self._turns) * count
        return sorted({ours[(first + one) % len(ours)] for one in range(count)})


class _Confined(Confinement):
    """The limits of a container that has some."""

    def __init__(self, limiter: Limiter, container: Container, extra_pids: int) -> None:
        self._limiter = limiter
        self._container = container
        self._extra_pids = extra_pids
        self._name = f"{SHELL_NAME}-{uuid.uuid4().hex}"  # how the shell begins what it has to say, and no payload could
        self._steps: list[str] = []
        self._group: cgroups.Group | None = None

    async def __aenter__(self) -> Confinement:
        means = await self._limiter.means(self._container.limits)
        with map_exceptions({OSError: NodeError}, "cannot limit what a container uses"):
            await trio.to_thread.run_sync(self._prepare, means)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._group:
            with trio.move_on_after(CALL_TIMEOUT, shield=True):
                if not await trio.to_thread.run_sync(self._group.remove):
                    LOGGER.error("the control group of %s cannot be removed", self._container.name)

    def _prepare(self, means: Means) -> None:
        rlimits = list(_rlimits(self._container.limits, self._extra_pids, means))
        if settings := list(_settings(self._container.limits, self._extra_pids, means)):
            self._group = means.groups.make(self._container.name, settings)
            self._steps += [f"echo 0 > {shlex.quote(str(entrance))}" for entrance in self._group.entrances]
        self._steps += rlimits

    def argv(self, argv: Sequence[str], env: Mapping[str, str]) -> Sequence[str]:
        """Have a shell set the limits for itself, and become the program."""
        theirs = " ".join(name for name in OF_SHELLS if name not in env)
        script = f'{" && ".join(self._steps) or ":"} || exit {NOT_ENTERED}; unset {theirs}; exec "$@"'
        return [SHELL, "-c", script, self._name, *argv]

    def refusal(self, code: int, stderr: Path) -> str | None:
        """Give the first line of what the shell has said; nothing if it was another who ended with such a code."""
        if code not in (NOT_ENTERED, NOT_EXECUTABLE, NOT_FOUND):
            return None
        said = ""
        with suppress(OSError), stderr.open("rb") as file:
            said = file.readline(4096).decode(errors="replace").strip()
        return said.replace(self._name, SHELL_NAME) if said.startswith(f"{self._name}: ") else None

    @property
    def out_of_memory(self) -> bool:
        """Ask the control group."""
        return self._group is not None and self._group.out_of_memory


def _settings(limits: Limits, extra_pids: int, means: Means) -> Iterator[cgroups.Setting]:
    if limits.memory is not None and means.in_group("memory"):
        yield cgroups.memory(limits.memory)
    if limits.cpus is not None and means.in_group("cpus"):
        yield cgroups.cpus(limits.cpus)
    if limits.pids is not None and means.in_group("pids"):
        yield cgroups.pids(limits.pids + extra_pids)


def _rlimits(limits: Limits, extra_pids: int, means: Means) -> Iterator[str]:
    """Give a shell's commands for what no control group enforces; last what would keep the others from starting."""
    if limits.cpus is not None and not means.in_group("cpus") and means.taskset:
        cpus = ",".join(map(str, means.some_cpus(limits.cpus)))
        yield f"{shlex.quote(means.taskset)} -cp {cpus} $$ > /dev/null"
    if limits.memory is not None and not means.in_group("memory"):
        yield f"ulimit -v {_at_most(limits.memory, resource.RLIMIT_AS) // 1024}"
    if limits.pids is not None and not means.in_group("pids") and os.geteuid():
        # The kernel counts all of this user's, on the whole machine: so many more than there are.
        number = _at_most(_processes_of_this_user() + limits.pids + extra_pids, resource.RLIMIT_NPROC)
        yield f"{{ ulimit -u {number} 2> /dev/null || ulimit -p {number}; }}"  # bash's word for it, or dash's


def _at_most(number: int, which: int) -> int:
    """Stay below a limit that we have ourselves, and cannot raise."""
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
