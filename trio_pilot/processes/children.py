"""Child processes: started on the Trio thread, waited for by pidfd, and never left behind.

A child is started by `subprocess.Popen` on the Trio thread itself: it costs 0.3 ms there, and PR_SET_PDEATHSIG (bubblewrap's
`--die-with-parent`) is tied to the *thread* that started the child; a worker thread of Trio ends after 10 s idle.

The pilot is a child subreaper (PR_SET_CHILD_SUBREAPER(2const)): when a process dies anywhere below it, its children become
the pilot's own. So the tree below a child is ended by listing the pilot's own children, again and again, and killing those
that belong to the tree: they carry the child's marker in their environment, or are in its session. A dying process has no
environment any more, and its children become the pilot's only when it is dead; in the middle of execve(2) a process has no
environment yet. So both are waited for.

A process that has changed both is known by the number that its task has passed on (`descent`). One that has changed that too
is a stray: strays are ended when no child runs, and until then what tasks have used is not used again. What descends from
processes that were there before the pilot, as in `helper & exec trio-pilot`, is left alone: the pilot has not started it.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, ClassVar

import trio

from trio_pilot.errors import NoProcessError
from trio_pilot.log import LOGGER
from trio_pilot.processes import descent
from trio_pilot.processes.identity import DEAD_STATES, PARENT, STATE, stat_of
from trio_pilot.processes.orphans import MARKER, mark
from trio_pilot.processes.proc import environment_of, is_dying
from trio_pilot.processes.secrecy import passing_on_core_limit
from trio_pilot.processes.signals import signal_if

# Seconds that killing and reaping a process tree may take. SIGKILL acts at once, except on a process that waits in the
# kernel, for a hanging file system, say: nothing but waiting helps then.
REAP_TIMEOUT = 5.0
REAP_INTERVAL = 0.002  # seconds between two searches for what became an orphan by the last kill
DEATH_INTERVAL = 0.01  # the same while a process is dying: for one of bubblewrap's, the kernel has a lot to undo

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

# By these, HTCondor's condor_procd finds the processes of a job that it has to kill, whatever their parents are by then.
_OF_CONDOR = {name: value for name, value in os.environ.items() if name.startswith("_CONDOR_ANCESTOR_")}


@dataclass(frozen=True, slots=True)
class Command:
    """A program to start: arguments, environment, directory, files for its output, and the marker of its processes."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stdout: IO[bytes]
    stderr: IO[bytes]
    marker: str
    pass_fds: Sequence[int] = ()
    cpus: Sequence[int] = ()  # that it may run on; none: all that this process may


class Children:
    """The children of this process, which becomes a subreaper for the rest of its life."""

    # Shared by all instances: the child of one is no orphan to another.
    _living: ClassVar[set[int]] = set()
    _running: ClassVar[dict[int, "Child"]] = {}
    _unkillable: ClassVar[set[int]] = set()  # orphans, such as processes that have become another user's

    def __init__(self, death_interval: float = DEATH_INTERVAL) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
        # Inherited from a careless parent, SIG_IGN would let the kernel reap the children, and every exit code be 0.
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.death_interval = death_interval
        descent.own_mark()

    def spawn(self, command: Command) -> "Child":
        """Start a child in a session of its own, with an empty stdin.

        Raises:
            NoProcessError: There is no process left to start, for the moment.
            OSError: It cannot be started for another reason.
        """
        number = descent.new_number()
        with _restricted_to(command.cpus), descent.passing_on(number), passing_on_core_limit():
            try:
                process = _popen(command)
            except BlockingIOError as error:
                raise NoProcessError(f"no process can be started for the moment: {error.strerror}") from error
        try:
            child = Child(process, command.marker, self, number)
        except OSError:  # no file descriptor is left
            process.kill()
            process.wait()
            raise
        self._living.add(process.pid)
        self._running[process.pid] = child
        return child

    @classmethod
    def orphans(cls) -> list[int]:
        """Return the children that this process did not start itself, but one that it has started did."""
        return [pid for pid in _own_children() if pid not in cls._living and _has_been_started_here(pid)]

    @classmethod
    def strays(cls) -> list[int]:
        """Return the orphans of which no running child is known to have started them."""
        return [pid for pid in cls.orphans() if not any(child.may_have_started(pid) for child in cls._running.values())]

    @classmethod
    async def end_strays(cls, child: "Child") -> None:
        """Kill and reap the orphans that a child has left, and if no other runs, all. Shielded, at most for REAP_TIMEOUT."""
        pids: list[int] = []
        with trio.move_on_after(REAP_TIMEOUT, shield=True) as ending:
            while pids := [pid for pid in cls._killable() if not cls._running or child.has_numbered(pid)]:
                dying = [pid for pid in pids if not _kill_and_reap(pid)]
                if dying:
                    await _wait_for_death(dying[0], DEATH_INTERVAL)
        if ending.cancelled_caught:
            LOGGER.error("process %d, which a task has left, cannot be killed: it is left behind", pids[0])
            cls._unkillable.update(pids)

    @classmethod
    def _killable(cls) -> list[int]:
        pids = cls.orphans()
        cls._unkillable.intersection_update(pids)
        return [pid for pid in pids if pid not in cls._unkillable]

    @classmethod
    @contextmanager
    def reaping(cls) -> Iterator[None]:
        """Reap each orphan as soon as it has ended, while the body runs: until then it counts as a process."""
        token = trio.lowlevel.current_trio_token()
        before = signal.signal(signal.SIGCHLD, lambda *_: token.run_sync_soon(cls.reap, idempotent=True))
        signal.siginterrupt(signal.SIGCHLD, False)
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, before)

    @classmethod
    def reap(cls) -> None:
        """Reap the children that have ended and that no other code reaps."""
        for pid in _own_children():
            if pid not in cls._living and pid not in _OUTLIVING and (stat_of(pid) or DEAD_STATES)[STATE] in DEAD_STATES:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                    _FROM_BEFORE.discard(pid)

    @classmethod
    def register(cls, pid: int) -> None:
        """Register a child that other code starts and reaps."""
        cls._living.add(pid)

    @classmethod
    def unregister(cls, pid: int) -> None:
        """Unregister a child that was reaped."""
        cls._living.discard(pid)
        cls._running.pop(pid, None)


class Child:
    """A child process and the tree below it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", marker: str, children: Children, number: int | None = None
    ) -> None:
        self.pid = process.pid
        self._number = number
        self._process = process
        self._marker = f"{MARKER}={mark(marker)}".encode()
        self._children = children
        self._pidfd = os.pidfd_open(process.pid)

    @property
    def running(self) -> bool:
        """Whether the child itself has not been reaped."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait for the child itself; return its exit code, 128 + n for death by signal n. Cancelling leaves it running."""
        while self._process.poll() is None:
            await trio.lowlevel.wait_readable(self._pidfd)
        return exit_code(self._process.returncode)

    async def wait_and_end(self, grace: float, terminate: Callable[[], None] | None = None) -> int:
        """Wait for the child, and `end` it and all processes below it in any case; return its exit code."""
        try:
            return await self.wait()
        finally:
            await self.end(grace, terminate)

    async def end(self, grace: float, terminate: Callable[[], None] | None = None) -> None:
        """End the child and all processes below it: `terminate` (SIGTERM), after `grace` seconds SIGKILL. Shielded."""
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
            LOGGER.error("process %d, or one that it started, cannot be killed: it is left behind", self.pid)
        self._close()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the child's process group, unless the child is reaped: the number may be another's then."""
        if self.running:
            with suppress(ProcessLookupError, PermissionError):  # the child may have become another user
                os.killpg(self.pid, number)

    def terminate_below(self, pid: int | None) -> None:
        """Send SIGTERM to the children of a process below; if it has none yet, to the child's process group."""
        started: list[str] = []
        with suppress(OSError):
            started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for one in started:
                signal_if(int(one), signal.SIGTERM, partial(_is_child_of, pid, int(one)))
        if not started:
            self.signal_group(signal.SIGTERM)

    async def _reap_orphans(self) -> None:
        below: set[int] = set()
        while True:
            verdicts = {pid: pid in below or self._is_below(pid) for pid in self._children.orphans()}
            below = {pid for pid, verdict in verdicts.items() if verdict}
            if not below and None not in verdicts.values():
                return
            dying = [pid for pid in below if not _kill_and_reap(pid)]
            if dying:
                await _wait_for_death(dying[0], self._children.death_interval)
            else:  # their children are this process's by now
                await trio.sleep(REAP_INTERVAL if None in verdicts.values() else 0)

    def _is_below(self, pid: int) -> bool | None:
        """Return whether an orphan belongs to this child's tree, or is dying; None while that is unknown."""
        try:
            if os.getsid(pid) == self.pid or is_dying(pid):
                return True
            environment = environment_of(pid)
        except OSError:  # gone in the meantime, or another user's
            return False
        return None if environment is None else self._marker in environment.split(b"\0")

    def may_have_started(self, pid: int) -> bool:
        """Return whether an orphan belongs to this child's tree, as far as is known."""
        return self.has_numbered(pid) or self._is_below(pid) is not False

    def has_numbered(self, pid: int) -> bool:
        """Return whether a process has inherited the number that this child has passed on."""
        return self._number is not None and descent.number_of(pid) == self._number

    def _close(self) -> None:
        os.close(self._pidfd)
        self._children.unregister(self.pid)


@contextmanager
def _restricted_to(cpus: Sequence[int]) -> Iterator[None]:
    """Restrict this thread to some CPUs in the body: a child started there is restricted from its first instruction."""
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
            error.filename = command.argv[0]  # as the caller named it
        raise


@cache
def _program(name: str, path: str) -> str | None:
    """Find a program in PATH once, not by trial in each child: the pilot is blocked until the child's execve(2)."""
    found = None if "/" in name else shutil.which(name, path=path)
    return found if found and found.startswith("/") else None  # a child has another working directory


def exit_code(returncode: int) -> int:
    """Return the exit code that a shell would show for a return code of `subprocess`: 128 + n for death by signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def end_all_children() -> None:
    """Kill and reap all that this program has started: it is about to exit.

    Left alone is what is to outlive this process, and what descends from processes that were there before it.
    """
    deadline = time.monotonic() + REAP_TIMEOUT
    while (pids := _all_started_here()) and time.monotonic() < deadline:
        for pid in pids:
            _kill_and_reap(pid)
        time.sleep(REAP_INTERVAL)


def _all_started_here() -> Collection[int]:
    return [pid for pid in _own_children() if _has_been_started_here(pid)]


def _own_children() -> list[int]:
    """Return the children of the main thread: it starts all children, and orphans become its children."""
    with open(f"/proc/self/task/{os.getpid()}/children", "rb", 0) as file:  # noqa: PTH123 -- once an event: half the time of Path
        return [int(pid) for pid in file.read().split()]


# Children from before an exec, as in `helper & exec trio-pilot`. What they start may become a child of this process later.
_FROM_BEFORE = set(_own_children())
# The first process of a PID namespace also gets the orphans of those who enter it, by `docker exec`, say.
_HAS_STRANGERS = bool(_FROM_BEFORE) or os.getpid() == 1
_OUTLIVING: set[int] = set()


def _has_been_started_here(pid: int) -> bool:
    """Return whether a child of this process was started by it, or by what it has started. By default, all were."""
    if pid in _FROM_BEFORE or pid in _OUTLIVING:
        return False
    return not _HAS_STRANGERS or descent.own_mark() is None or descent.is_descendant(pid)


def let_outlive(pid: int) -> None:
    """Let a child outlive this process: never end it."""
    _OUTLIVING.add(pid)


def _is_child_of(parent: int | None, pid: int) -> bool:
    facts = stat_of(pid)
    return facts is not None and int(facts[PARENT]) == parent


def _kill_and_reap(pid: int) -> bool:
    """Kill a child; return whether it is reaped already: it may take a while to die."""
    with suppress(ProcessLookupError, ChildProcessError, PermissionError):
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return False


async def _wait_for_death(pid: int, seconds: float) -> None:
    """Wait until a process is dead, or for some seconds: there may be others by then."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # the process is gone, or no file descriptor is left
        await trio.sleep(REAP_INTERVAL)
        return
    try:
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
