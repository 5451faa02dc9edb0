"""Child processes: started on the Trio thread, waited for by pidfd, and never left behind.

A child is started by `subprocess.Popen` on the Trio thread itself: it costs 0.3 ms there, and PR_SET_PDEATHSIG (bubblewrap's
`--die-with-parent`) is tied to the *thread* that spawned; a worker thread of Trio's goes away after 10 s idle.

The pilot is a child subreaper (PR_SET_CHILD_SUBREAPER(2const)): when a process dies anywhere below it, its children become
the pilot's own. So the tree below a child is found by looking at the pilot's own children, again and again, killing those
that are of the tree: they carry the child's marker in their environment, or are of its session. A dying process has no
environment any more, and its children come into view only when it is dead; in the middle of execve(2) it has none yet. So
both are waited for.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, ClassVar

import trio

from trio_pilot.log import LOGGER
from trio_pilot.processes.identity import ENV_END, ENV_START, FLAGS, THREADS, stat_of
from trio_pilot.processes.orphans import MARKER, mark

# Seconds that killing and reaping a process tree may take. SIGKILL acts at once, but for a process in the kernel's hands
# (a hanging file system), for which nobody can do more than wait.
REAP_TIMEOUT = 5.0
REAP_INTERVAL = 0.002  # seconds between looks for what became an orphan by the last kill
DEATH_INTERVAL = 0.01  # the same, while one is seen to be dying: bubblewrap's, of which the kernel has a lot to undo

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PF_EXITING = 0x4  # linux/sched.h

# By these HTCondor's condor_procd knows the processes of a job that it is to kill, whoever their parents are by then.
_OF_CONDOR = {name: value for name, value in os.environ.items() if name.startswith("_CONDOR_ANCESTOR_")}


@dataclass(frozen=True, slots=True)
class Command:
    """What to start: arguments, environment, directory, the files for its output, and the marker it is known by."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stdout: IO[bytes]
    stderr: IO[bytes]
    marker: str
    pass_fds: Sequence[int] = ()
    cpus: Sequence[int] = ()  # that it may run on; none: any of ours


class Children:
    """The children of this process, which becomes a subreaper by it for the rest of its life."""

    # Of the whole process: what one starts, no other may take for an orphan.
    _living: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
        # Inherited from a careless parent, it would have the kernel reap our children, and every exit code be 0.
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def spawn(self, command: Command) -> "Child":
        """Start a child in a session of its own, with nothing to read. Raises OSError if it cannot be started."""
        with _on(command.cpus):
            process = _popen(command)
        try:
            child = Child(process, command.marker, self)
        except OSError:  # no file descriptor is left
            process.kill()
            process.wait()
            raise
        self._living.add(process.pid)
        return child

    def orphans(self) -> list[int]:
        """List the children that nobody here has started."""
        return [pid for pid in _own_children() if pid not in self._living and pid not in _SPARED]

    @classmethod
    def know(cls, pid: int) -> None:
        """Take note of a child that is seen to elsewhere."""
        cls._living.add(pid)

    @classmethod
    def forget(cls, pid: int) -> None:
        """Take note that a child is no more."""
        cls._living.discard(pid)


class Child:
    """A child process and the tree below it."""

    def __init__(self, process: "subprocess.Popen[bytes]", marker: str, children: Children) -> None:
        self.pid = process.pid
        self._process = process
        self._marker = f"{MARKER}={mark(marker)}".encode()
        self._children = children
        self._pidfd = os.pidfd_open(process.pid)

    @property
    def running(self) -> bool:
        """Whether the child itself has not been reaped."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait for the child itself; give its exit code, 128 + n for death by signal n. Cancelling leaves it alone."""
        while self._process.poll() is None:
            await trio.lowlevel.wait_readable(self._pidfd)
        return exit_code(self._process.returncode)

    async def see_to_its_end(self, grace: float, terminate: Callable[[], None] | None = None) -> int:
        """Wait for the child, and `end` it and all below it on every way out; give its exit code."""
        try:
            return await self.wait()
        finally:
            await self.end(grace, terminate)

    async def end(self, grace: float, terminate: Callable[[], None] | None = None) -> None:
        """End the child and all below it: `terminate` (SIGTERM), `grace` seconds later SIGKILL, then reap. Shielded."""
        with trio.move_on_after(grace + REAP_TIMEOUT, shield=True) as reaping:
            if self.running and grace > 0:
                (terminate or partial(self.signal_group, signal.SIGTERM))()
                with trio.move_on_after(grace):
                    await self.wait()
            if self.running:
                self.signal_group(signal.SIGKILL)
                await self.wait()
            await self._reap_orphans()
        if reaping.cancelled_caught:
            LOGGER.error("process %d, or one that it started, cannot be killed", self.pid)
        self._close()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the child's process group, as long as its number is sure to be its own."""
        if self.running:
            with suppress(ProcessLookupError, PermissionError):  # it may have become another user's
                os.killpg(self.pid, number)

    def terminate_below(self, pid: int | None) -> None:
        """Send SIGTERM to what a process below has started; while that is nothing, to the child's process group."""
        started: list[str] = []
        with suppress(OSError):
            started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for one in started:
                os.kill(int(one), signal.SIGTERM)
        if not started:
            self.signal_group(signal.SIGTERM)

    async def _reap_orphans(self) -> None:
        ours: set[int] = set()
        while True:
            claims = {pid: pid in ours or self._is_ours(pid) for pid in self._children.orphans()}
            ours = {pid for pid, claim in claims.items() if claim}
            if not ours and None not in claims.values():
                return
            dying = [pid for pid in ours if not _kill_and_reap(pid)]
            if dying:
                await _death_of(dying[0])
            else:  # what they leave us is in view by now
                await trio.sleep(REAP_INTERVAL if None in claims.values() else 0)

    def _is_ours(self, pid: int) -> bool | None:
        """Tell whether a process is to be reaped; None while it cannot be told."""
        try:
            if os.getsid(pid) == self.pid or _is_dying(pid):
                return True
            environment = _environment(pid)
        except OSError:  # gone meanwhile, or another user's
            return False
        return None if environment is None else self._marker in environment.split(b"\0")

    def _close(self) -> None:
        os.close(self._pidfd)
        self._children.forget(self.pid)


@contextmanager
def _on(cpus: Sequence[int]) -> Iterator[None]:
    """Have this thread on some CPUs for a moment: what it starts is there from its first instruction."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _popen(command: Command) -> "subprocess.Popen[bytes]":
    program = _program(command.argv[0], command.env.get("PATH", os.defpath))
    try:
        return subprocess.Popen(
            command.argv,
            executable=program,
            stdin=subprocess.DEVNULL,
            stdout=command.stdout,
            stderr=command.stderr,
            env={**command.env, **_OF_CONDOR, MARKER: mark(command.marker)},
            cwd=command.cwd,
            pass_fds=command.pass_fds,
            start_new_session=True,
        )
    except OSError as error:
        if program and error.filename == program:
            error.filename = command.argv[0]  # as it was called
        raise


@cache
def _program(name: str, path: str) -> str | None:
    """Look for a program once, rather than by trial in each child: the pilot stands still until a child's execve(2)."""
    found = None if "/" in name else shutil.which(name, path=path)
    return found if found and found.startswith("/") else None  # a child has another working directory


def exit_code(returncode: int) -> int:
    """Give a shell's view of a return code of `subprocess`: 128 + n for death by signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def end_strays() -> None:
    """Kill and reap all children of a program that is about to exit, and what becomes its child by that.

    Nothing else finds a process with a new session *and* a cleaned environment.
    """
    deadline = time.monotonic() + REAP_TIMEOUT
    while (pids := set(_own_children()) - _SPARED) and time.monotonic() < deadline:
        for pid in pids:
            _kill_and_reap(pid)
        time.sleep(REAP_INTERVAL)


def _own_children() -> list[int]:
    """List this process's children. Orphans become children of its main thread, which is the one that spawns."""
    with open(f"/proc/self/task/{os.getpid()}/children", "rb", 0) as file:  # noqa: PTH123 -- once an event: half the time of Path
        return [int(pid) for pid in file.read().split()]


# Not ours to kill: from before an exec of this program, as in `helper & exec trio-pilot`, or to outlive us.
_SPARED = set(_own_children())


def spare(pid: int) -> None:
    """Have a child outlive us."""
    _SPARED.add(pid)


def _is_dying(pid: int) -> bool:
    """Tell whether a process is on its way out, or a zombie; but its first thread may end before the others."""
    facts = _facts(pid)
    return bool(int(facts[FLAGS]) & PF_EXITING) and int(facts[THREADS]) <= 1


def _environment(pid: int) -> bytes | None:
    """Give the environment of a process; None in the middle of execve(2), where it looks empty, and of one just dead."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except ProcessLookupError:  # what it has started may be our orphan by now: look again
        return None
    facts = _facts(pid)
    is_empty = int(facts[ENV_START]) == int(facts[ENV_END]) > 0
    return environment if environment or is_empty else None


def _facts(pid: int) -> list[str]:
    """Give the fields of /proc/PID/stat. Raises FileNotFoundError if it is gone."""
    if (facts := stat_of(pid)) is None:
        raise FileNotFoundError(pid)
    return facts


def _kill_and_reap(pid: int) -> bool:
    """Kill a child, and tell whether it is no more: it may take its time to die."""
    with suppress(ProcessLookupError, ChildProcessError, PermissionError):
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return False


async def _death_of(pid: int) -> None:
    """Wait until a process is dead, or a moment: there may be others by then."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # it is gone, or no file descriptor is left
        await trio.sleep(REAP_INTERVAL)
        return
    try:
        with trio.move_on_after(DEATH_INTERVAL):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
