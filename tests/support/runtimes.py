"""What the tests of runtimes, children and files share."""

import functools
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_pilot.runtimes import Container, Mount, Options

PATIENCE = 20.0  # seconds for what should take milliseconds, on a machine that may be busy
NOBODY = 65534

AS_ROOT = os.geteuid() == 0
# One who may read everything (Python may be installed in a home directory), and write nothing.
UNPRIVILEGED = (
    [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    ]
    if AS_ROOT
    else []
)

needs_root = pytest.mark.skipif(not AS_ROOT, reason="mounting file systems and changing users takes root")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be one to whom file permissions mean something; which those who are not root are already."""
    if not AS_ROOT:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def small_disk(directory: Path, kib: int, *, inodes: int = 0) -> Iterator[Path]:
    """Mount a file system of that size there; as root."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k,nr_inodes={inodes}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def new_container(
    directory: Path,
    args: Iterable[str],
    *,
    image: str = "/",
    env: Mapping[str, str] | None = None,
    mounts: Iterable[Mount] = (),
) -> Container:
    """Order a container with directories of its own below `directory`."""
    name = str(uuid.uuid4())
    root = directory / name
    (root / "scratch").mkdir(parents=True)
    return Container(
        name=name,
        image=image,
        args=tuple(args),
        env=env or {},
        mounts=tuple(mounts),
        scratch=root / "scratch",
        stdout=root / "stdoutfile",
        stderr=root / "stderrfile",
    )


def processes_with(mark: str) -> list[int]:
    """List the processes, zombies too, that have the mark in their command line or environment."""
    return [pid for pid in _all_processes() if mark.encode() in _told(pid)]


def command_line(pid: int) -> list[str]:
    """Give the arguments of a process, none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def _all_processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid())


def _told(pid: int) -> bytes:
    told = b""
    for name in ("cmdline", "environ"):
        try:
            told += Path(f"/proc/{pid}/{name}").read_bytes()
        except OSError:
            continue
    return told


def own_children() -> set[int]:
    """List the children of this process, zombies too."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def new_children(before: set[int]) -> list[str]:
    """Say of each child that was not there before what it is."""
    return [f"{pid} {_words_of(pid)}" for pid in own_children() - before]


def _words_of(pid: int) -> str:
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(errors="replace").split()
    except OSError:
        return "gone meanwhile"
    return " ".join([*facts[1:6], *command_line(pid)])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@asynccontextmanager
async def serving(serve: Callable[[trio.SocketStream], Awaitable[object]], path: Path) -> AsyncIterator[None]:
    """Serve whoever connects to a Unix socket, until the end of the body."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for what another process does."""
    with trio.move_on_after(PATIENCE) as scope:
        while not condition():  # noqa: ASYNC110 -- another process tells nobody
            await trio.sleep(0.005)
    assert not scope.cancelled_caught, f"in vain: {what or condition}"


def until_sync(condition: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what or condition}"
        time.sleep(0.005)


@functools.cache
def bubblewrap_fault() -> str | None:
    """Install bubblewrap where that is possible; say why it does not work."""
    from trio_pilot.runtimes import bubblewrap

    if shutil.which("bwrap") is None:
        _apt_install("bubblewrap")
    with ThreadPoolExecutor(1) as pool:  # we may be in a Trio run already
        return pool.submit(trio.run, bubblewrap.fault, Options()).result()


@functools.cache
def busybox() -> str | None:
    """Find a busybox that needs no libraries; install it where that is possible."""
    if not Path("/bin/busybox").exists():
        _apt_install("busybox-static")
    found = shutil.which("busybox")
    if found is None:
        return None
    libraries = subprocess.run(["ldd", found], capture_output=True, check=False)
    return found if libraries.returncode else None


def _apt_install(package: str) -> None:
    if AS_ROOT and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-qq", "-y", package], env=env, stdout=sys.stderr, timeout=120, check=False)


def make_image(directory: Path) -> Path:
    """Make a small image: a directory with a busybox, and the rest of what images have."""
    program = busybox()
    if program is None:
        pytest.skip("there is no static busybox, and it cannot be installed")
    for name in ("bin", "etc", "home", "tmp", "usr/share", "proc", "dev", "var"):
        (directory / name).mkdir(parents=True)
    shutil.copy(program, directory / "bin/busybox")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if not (directory / "bin" / applet).exists():
            (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc/this-is-the-image").touch()
    (directory / "sbin").symlink_to("bin")
    return directory


class PilotCommand:
    """The installed command, in a directory of its own, with the embedded broker."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._program = str(Path(sys.executable).with_name("trio-pilot"))
        self._started: list[Running] = []
        self.variables: dict[str, str] = {}

    def __enter__(self) -> "PilotCommand":
        return self

    def __exit__(self, *_: object) -> None:
        for pilot in self._started:
            pilot.kill()

    def send(self, *events: object) -> None:
        lines = "".join(f"{json.dumps(event)}\n" for event in events)
        self._run("send", "events", given=lines)

    def receive(self) -> list[object]:
        return [json.loads(line) for line in self._run("receive", "outputs", "--idle", "0.1").splitlines()]

    def start(self, *args: str, runtime: str = "process", prefix: Iterable[str] = (), **settings: object) -> "Running":
        """Start a pilot that runs `args` for each event."""
        settings = {
            "queue_incoming": "events",
            "queue_outgoing": "outputs",
            "timeout_queue_incoming": 0.3,
            "task_image": "/",
            "runtime": runtime,
            "task_args": shlex.join(args),
            **settings,
        }
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        command = [*prefix, self._program, "run", *flags]
        log = self.directory / f"pilot-{uuid.uuid4().hex}.log"
        with log.open("wb") as stderr:
            # In a session of its own: an interrupt at the terminal is for the tests.
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=self._environment(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        pilot = Running(process, log)
        self._started.append(pilot)
        return pilot

    def run(self, *args: str, **settings: Any) -> "Running":
        pilot = self.start(*args, **settings)
        pilot.wait()
        return pilot

    def queue(self, name: str = "events") -> list[tuple[int, bool]]:
        """List what is in a queue: of each message how often it was tried, and whether it is claimed."""
        with closing(sqlite3.connect(self.directory / "trio-pilot-queues.sqlite", timeout=PATIENCE)) as connection:
            rows = connection.execute("SELECT attempts, consumer FROM message WHERE queue = ? ORDER BY position", (name,))
            return [(attempts, bool(consumer)) for attempts, consumer in rows]

    @property
    def data(self) -> Path:
        return self.directory / "ewms-pilot-data"

    def _environment(self) -> dict[str, str]:
        return {**{name: value for name, value in os.environ.items() if "EWMS" not in name}, **self.variables}

    def _run(self, *arguments: str, given: str = "") -> str:
        return subprocess.run(
            [self._program, *arguments],
            cwd=self.directory,
            env=self._environment(),
            input=given,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=True,
        ).stdout


class Running:
    """A pilot that was started; it is waited for, and not left behind."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self._log = log
        self.stdout = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def last_line(self) -> str:
        return self.stderr.splitlines()[-1]

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        if not self.ended:
            self._process.kill()
        if self._process.stdout and not self._process.stdout.closed:
            self._process.communicate()

    def wait(self) -> int:
        if self._process.returncode is None:
            self.stdout = self._process.communicate(timeout=3 * PATIENCE)[0]
        assert "/trio_pilot/" not in self.stderr, f"a traceback of ours: {self.stderr}"
        return self._process.returncode
