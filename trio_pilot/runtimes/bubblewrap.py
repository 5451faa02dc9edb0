"""The runtime without a daemon: bubblewrap, with an unpacked directory (or this machine's own root) as the image."""

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePath

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.data_directory import DATA_DIRECTORY
from trio_pilot.files.error_summary import error_summary
from trio_pilot.files.task_logs import open_log
from trio_pilot.processes.children import Child, Children, Command
from trio_pilot.processes.orphans import MARKER, mark
from trio_pilot.runtimes import ENVFILE, NOT_EXECUTABLE, NOT_FOUND, OWN_ROOT, Container, Exit, Options, cannot_run
from trio_pilot.runtimes.confinement import NOT_ENTERED, Confinement, Limiter, open_limiter

# What a container has of its own: bubblewrap makes it, the host's would undo the isolation, or it must be written to.
ITS_OWN = ("proc", "dev", "sys", "tmp", "run")
NOT_FROM_THE_IMAGE = {f"/{name}" for name in (*ITS_OWN, DATA_DIRECTORY)}

HOME = "/tmp"  # noqa: S108 -- the container's own: its scratch directory is mounted there
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

BWRAP_FAILED = 1  # bubblewrap's own exit code
NOT_THE_PAYLOADS = (BWRAP_FAILED, NOT_ENTERED, NOT_EXECUTABLE, NOT_FOUND)  # while bubblewrap has not told of one
BWRAPS_OWN = 2  # processes in each container that are bubblewrap's: the one outside, and the first of the namespace

PROBE_TIMEOUT = 10.0  # seconds for `true` in a container


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- none matters
    """Say what keeps bubblewrap from working here, if anything does."""
    return await trio.to_thread.run_sync(_fault)


def _fault() -> str | None:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "there is no bwrap on PATH (Debian's package is bubblewrap)"
    probe = [bwrap, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", *_devices(), "true"]
    try:
        # In a session of its own: Ctrl-C is for us.
        done = subprocess.run(
            probe,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT,
            check=False,
            start_new_session=True,
            env={**os.environ, MARKER: mark("probe")},  # by which it is found if we are killed just now
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.decode(errors="replace").strip() or None if done.returncode else None


def _devices() -> tuple[str, ...]:
    """Give a container devices of its own; inside apptainer, where bubblewrap lacks some to do so, those there are."""
    return ("--dev", "/dev") if Path("/dev/full").exists() else ("--dev-bind", "/dev", "/dev", "--tmpfs", "/dev/shm")  # noqa: S108 -- not ours


@asynccontextmanager
async def open_runtime(options: Options) -> AsyncIterator["BubblewrapRuntime"]:
    """Open the runtime; `fault` says whether it works."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NodeError("there is no bwrap on PATH (Debian's package is bubblewrap)")
    async with open_limiter(extra_pids=BWRAPS_OWN) as limiter:
        yield BubblewrapRuntime(bwrap, options.kill_grace, limiter)


class BubblewrapRuntime:
    """Runs containers in namespaces of their own (the network apart), on a read-only image."""

    name = "bubblewrap"
    mounts = True
    engine: Path | None = None
    leaves_some = False
    images: Path | None = None

    def __init__(self, bwrap: str, kill_grace: float, limiter: Limiter) -> None:
        self._bwrap = bwrap
        self._kill_grace = kill_grace
        self._children = Children()
        self._limiter = limiter
        self._roots: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}

    async def prepare(self, image: str) -> None:
        """Look at the image directory."""
        await self._root(image, ())

    async def _root(self, image: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        key = image, targets
        if key not in self._roots:
            self._roots[key] = await trio.to_thread.run_sync(_root_options, Path(image or "/"), targets)
        return self._roots[key]

    async def run(self, container: Container) -> Exit:
        """Run a container to its end; on every way out its PID namespace is gone."""
        await trio.lowlevel.checkpoint_if_cancelled()
        root = await self._root(container.image, tuple(mount.target for mount in container.mounts))
        async with self._limiter.confine(container) as confinement:
            with map_exceptions({OSError: NodeError}, "cannot start bubblewrap"), _Status() as status:
                child = self._start(container, root, status, confinement)
                # Killed, it takes its namespace with it: that dies with its parent.
                code = await child.see_to_its_end(
                    self._kill_grace, terminate=lambda: child.terminate_below(status.read().get("child-pid"))
                )
                if code in NOT_THE_PAYLOADS and "exit-code" not in status.read():
                    return _blame(container, code, confinement)
            return Exit(code, code != 0 and confinement.out_of_memory)

    def _start(self, container: Container, root: Sequence[str], status: "_Status", confinement: Confinement) -> Child:
        with open_log(container.stdout) as stdout, open_log(container.stderr) as stderr:
            env = self._environment(container)
            command = Command(
                confinement.argv(self._argv(container, root, status.writing), env),
                env,
                container.scratch,
                stdout,
                stderr,
                container.name,
                [status.writing],
                container.pinned,
            )
            return self._children.spawn(command)

    def _argv(self, container: Container, root: Sequence[str], status: int) -> list[str]:
        mounts = [
            option
            for mount in container.mounts
            for option in ("--bind" if mount.writable else "--ro-bind", str(mount.source), mount.target)
        ]
        return [
            self._bwrap,
            # Root would keep its capabilities, and could undo the rest with them.
            *("--unshare-all", "--share-net", "--cap-drop", "ALL", "--die-with-parent", "--json-status-fd", str(status)),
            *root,
            *("--proc", "/proc", *_devices(), "--bind", str(container.scratch), HOME),
            *mounts,
            *("--remount-ro", "/", "--chdir", HOME, "--"),
            *container.args,
        ]

    def _environment(self, container: Container) -> dict[str, str]:
        path = os.environ.get("PATH", PATH) if container.image in OWN_ROOT else PATH
        return {"PATH": path, "HOME": HOME, "TMPDIR": HOME, **container.env}


class _Status:
    """The pipe by which bubblewrap tells how the container is."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._said: dict[str, int] = {}
        self._rest = b""  # of a line that it has not finished: it writes them in pieces

    def __enter__(self) -> "_Status":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reading)
        os.close(self.writing)

    def read(self) -> dict[str, int]:
        """Give what it has told so far: `child-pid`, the namespace's first process; `exit-code`, if the payload ran."""
        with suppress(BlockingIOError):
            *lines, self._rest = (self._rest + os.read(self._reading, 65536)).split(b"\n")
            for line in lines:
                self._said.update(json.loads(line))
        return self._said


def _blame(container: Container, code: int, confinement: Confinement) -> Exit:
    """Tell a command that is not in the image, which is its own fault, from a container that could not be made."""
    if refusal := confinement.refusal(code, container.stderr):
        raise NodeError(f"cannot limit what a container uses: {refusal}")
    if code != BWRAP_FAILED:
        return Exit(code)
    said = container.stderr.read_text(errors="replace").strip()
    if said.startswith("bwrap: execvp"):
        return cannot_run(said)
    raise NodeError(f"bubblewrap could not make the container: {error_summary(container.stderr)}")


def _root_options(image: Path, targets: Sequence[str]) -> tuple[str, ...]:
    try:
        options = list(_mounted(image, PurePath("/"), [PurePath(target) for target in targets]))
    except OSError as error:
        raise NodeError(f"the image {image} must be an unpacked directory, or /: {error.strerror}") from error
    # The tokens that EWMS leaves in the pilot's working directory are not for tasks.
    envfile = Path(ENVFILE).absolute()
    hide = ("--ro-bind", "/dev/null", str(envfile)) if image == Path("/") and envfile.exists() else ()
    return *options, "--tmpfs", "/run", *hide


def _mounted(directory: Path, place: PurePath, targets: Sequence[PurePath]) -> Iterator[str]:
    """Mount the entries of a directory of the image one by one, so that mount points can be made beside them."""
    for entry in sorted(directory.iterdir()):
        inside = place / entry.name
        below = [target for target in targets if target.is_relative_to(inside)]
        if str(inside) in NOT_FROM_THE_IMAGE or not os.access(entry, os.R_OK, follow_symlinks=False):
            continue
        if entry.is_symlink():
            yield from ("--symlink", os.readlink(entry), str(inside))  # noqa: PTH115 -- Path would tidy what it says
        elif entry.is_dir() and _stays_empty(entry, inside):
            yield from ("--dir", str(inside))  # an eighth of a container's cost in most images is to mount them instead
        elif all((entry / target.relative_to(inside)).is_dir() for target in below):
            yield from ("--ro-bind", str(entry), str(inside))
        else:  # a mount point is to be made somewhere below it, which it would not allow
            yield from ("--dir", str(inside), *_mounted(entry, inside, below))


def _stays_empty(directory: Path, inside: PurePath) -> bool:
    """Tell whether there is nothing in a directory; on this machine's own root, something may be mounted there yet."""
    return directory != inside and not any(directory.iterdir())
