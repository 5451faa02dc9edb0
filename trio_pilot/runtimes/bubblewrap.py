"""The runtime without a daemon: bubblewrap, with an unpacked directory (or this machine's own root) as the image."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from trio_pilot.children import Child, Children, Command
from trio_pilot.errors import NodeError
from trio_pilot.last_words import last_words
from trio_pilot.runtimes import DATA_DIRECTORY, Container
from trio_pilot.settings import ENVFILE

# Not the image's: bubblewrap makes its own, the host's would undo the isolation, or the container needs to write there.
NOT_FROM_THE_IMAGE = {"proc", "dev", "sys", "tmp", "run", DATA_DIRECTORY}

OWN_ROOT = ("", "/")  # images that mean this machine
HOME = "/tmp"  # noqa: S108 -- the container's own: its scratch directory is mounted there
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# bubblewrap's own exit code, and a shell's for a command that cannot be found.
BWRAP_FAILED, NOT_FOUND = 1, 127

PROBE_TIMEOUT = 10.0  # seconds for `true` in a container


def fault() -> str | None:
    """Say what keeps bubblewrap from working here, if anything does."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "there is no bwrap on PATH (Debian's package is bubblewrap)"
    probe = [bwrap, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    try:
        done = subprocess.run(probe, capture_output=True, stdin=subprocess.DEVNULL, timeout=PROBE_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.decode(errors="replace").strip() or None if done.returncode else None


@asynccontextmanager
async def open_runtime(kill_grace: float) -> AsyncIterator["BubblewrapRuntime"]:
    """Open the runtime; `fault` says whether it works."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NodeError("there is no bwrap on PATH (Debian's package is bubblewrap)")
    yield BubblewrapRuntime(bwrap, kill_grace)


class BubblewrapRuntime:
    """Runs containers in namespaces of their own (the network apart), on a read-only image."""

    name = "bubblewrap"
    mounts = True

    def __init__(self, bwrap: str, kill_grace: float) -> None:
        self._bwrap = bwrap
        self._kill_grace = kill_grace
        self._children = Children()
        self._roots: dict[str, tuple[str, ...]] = {}

    async def prepare(self, image: str) -> None:
        """Look at the image directory."""
        if image not in self._roots:
            self._roots[image] = await trio.to_thread.run_sync(_root_options, Path(image or "/"))

    async def run(self, container: Container) -> int:
        """Run a container to its end; on every way out its PID namespace is gone."""
        await self.prepare(container.image)
        with _Status() as status:
            child = self._start(container, status)
            code = await self._see_to_its_end(child, status)
            if code == BWRAP_FAILED and "exit-code" not in status.read():
                return _blame(container)
        return code

    def _start(self, container: Container, status: "_Status") -> Child:
        with container.stdout.open("wb") as stdout, container.stderr.open("wb") as stderr:
            command = Command(
                self._argv(container, status.writing),
                self._environment(container),
                container.scratch,
                stdout,
                stderr,
                container.name,
                [status.writing],
            )
            try:
                return self._children.spawn(command)
            except OSError as error:
                raise NodeError(f"cannot start bubblewrap: {error}") from error

    def _argv(self, container: Container, status: int) -> list[str]:
        mounts = [
            option
            for mount in container.mounts
            for option in ("--bind" if mount.writable else "--ro-bind", str(mount.source), mount.target)
        ]
        return [
            self._bwrap,
            *("--unshare-all", "--share-net", "--die-with-parent", "--json-status-fd", str(status)),
            *self._roots[container.image],
            *("--proc", "/proc", "--dev", "/dev", "--bind", str(container.scratch), HOME),
            *mounts,
            *("--remount-ro", "/", "--chdir", HOME, "--"),
            *container.args,
        ]

    def _environment(self, container: Container) -> dict[str, str]:
        path = os.environ.get("PATH", PATH) if container.image in OWN_ROOT else PATH
        return {"PATH": path, "HOME": HOME, "TMPDIR": HOME, **container.env}

    async def _see_to_its_end(self, child: Child, status: "_Status") -> int:
        try:
            return await child.wait()
        finally:
            await child.end(
                lambda: _terminate_payload(status.read().get("child-pid")),
                lambda: child.signal_group(signal.SIGKILL),  # the namespace dies with its parent
                self._kill_grace,
            )


class _Status:
    """The pipe by which bubblewrap tells how the container is."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._said: dict[str, int] = {}

    def __enter__(self) -> "_Status":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reading)
        os.close(self.writing)

    def read(self) -> dict[str, int]:
        """Give what it has told so far: `child-pid`, the namespace's first process; `exit-code`, if the payload ran."""
        with suppress(BlockingIOError):
            for line in os.read(self._reading, 65536).splitlines():
                self._said.update(json.loads(line))
        return self._said


def _terminate_payload(first: int | None) -> None:
    """Send SIGTERM to what runs as the namespace's first command; bubblewrap itself would die of it, and kill them all."""
    with suppress(OSError):
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGTERM)


def _blame(container: Container) -> int:
    """Tell a command that is not in the image, which is its own fault, from a container that could not be made."""
    said = last_words(container.stderr)
    if said.startswith("bwrap: execvp"):
        return NOT_FOUND
    raise NodeError(f"bubblewrap could not make the container: {said}")


def _root_options(image: Path) -> tuple[str, ...]:
    """Mount the entries of the image one by one on an empty root, so that mount points can be made beside them."""
    try:
        entries = sorted(image.iterdir())
    except OSError as error:
        raise NodeError(f"the image {image} must be an unpacked directory, or /: {error.strerror}") from error
    options = [
        option
        for entry in entries
        if entry.name not in NOT_FROM_THE_IMAGE and os.access(entry, os.R_OK, follow_symlinks=False)
        for option in (
            ("--symlink", os.readlink(entry), f"/{entry.name}")  # noqa: PTH115 -- Path would tidy what it says
            if entry.is_symlink()
            else ("--ro-bind", str(entry), f"/{entry.name}")
        )
    ]
    # The tokens that EWMS leaves in the pilot's working directory are not for tasks.
    envfile = Path(ENVFILE).absolute()
    hide = ("--ro-bind", "/dev/null", str(envfile)) if image == Path("/") and envfile.exists() else ()
    return *options, "--tmpfs", "/run", *hide
