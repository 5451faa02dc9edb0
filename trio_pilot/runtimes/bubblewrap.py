"""The runtime by bubblewrap, without a daemon: its images are unpacked directories, and this machine's own root."""

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
from trio_pilot.processes import cgroups
from trio_pilot.processes.children import Child, Children, Command
from trio_pilot.processes.orphans import MARKER, mark
from trio_pilot.runtimes import ENVFILE, HOST_ROOT, NOT_EXECUTABLE, NOT_FOUND, Container, Exit, Options, cannot_run
from trio_pilot.runtimes.confinement import NOT_ENTERED, Confinement, Limiter, OpenGroups, open_limiter

# Directories of a container's own: bubblewrap makes them, the host's would undo the isolation, or they must be writable.
OWN_DIRECTORIES = ("proc", "dev", "sys", "tmp", "run")
NOT_FROM_THE_IMAGE = {f"/{name}" for name in (*OWN_DIRECTORIES, DATA_DIRECTORY)}

HOME = "/tmp"  # noqa: S108 -- the container's own: its scratch directory is mounted there
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

BWRAP_FAILED = 1  # bubblewrap's own exit code
# Exit codes that are not the payload's, unless bubblewrap has reported that of the payload.
NOT_THE_PAYLOADS = (BWRAP_FAILED, NOT_ENTERED, NOT_EXECUTABLE, NOT_FOUND)
BWRAPS_OWN = 2  # bubblewrap's processes for each container: the one outside, and the first of the namespace

PROBE_TIMEOUT = 10.0  # seconds for a container that runs `true`


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- as for any other runtime
    """Return the reason why bubblewrap does not work here; None if it works."""
    return await trio.to_thread.run_sync(_fault)


def _fault() -> str | None:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "there is no bwrap on PATH (Debian's package is bubblewrap)"
    probe = [bwrap, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", *_devices(), "true"]
    try:
        # In a session of its own: Ctrl-C is for the pilot.
        done = subprocess.run(
            probe,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT,
            check=False,
            start_new_session=True,
            env={**os.environ, MARKER: mark("probe")},  # by which it is found if the pilot is killed just now
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.decode(errors="replace").strip() or None if done.returncode else None


def _devices() -> tuple[str, ...]:
    """Return the options for devices of the container's own; inside apptainer, which lacks some of them, for those there."""
    return ("--dev", "/dev") if Path("/dev/full").exists() else ("--dev-bind", "/dev", "/dev", "--tmpfs", "/dev/shm")  # noqa: S108 -- the container's own


@asynccontextmanager
async def open_runtime(options: Options, open_groups: OpenGroups = cgroups.Groups) -> AsyncIterator["BubblewrapRuntime"]:
    """Open the runtime. Raises NodeError if there is no bubblewrap; `fault` checks whether it works."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NodeError("there is no bwrap on PATH (Debian's package is bubblewrap)")
    async with open_limiter(BWRAPS_OWN, open_groups) as limiter:
        yield BubblewrapRuntime(bwrap, options.kill_grace, limiter)


class BubblewrapRuntime:
    """Runs containers in namespaces of their own (the network apart), on a read-only image."""

    name = "bubblewrap"
    has_mounts = True
    engine: Path | None = None
    has_unremoved_containers = False
    image_directory: Path | None = None

    def __init__(self, bwrap: str, kill_grace: float, limiter: Limiter) -> None:
        self._bwrap = bwrap
        self._kill_grace = kill_grace
        self._children = Children()
        self._limiter = limiter
        self._roots: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}

    async def prepare(self, image: str) -> None:
        """Read the image directory. Raises NodeError if there is none."""
        await self._root(image, ())

    async def _root(self, image: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        key = image, targets
        if key not in self._roots:
            self._roots[key] = await trio.to_thread.run_sync(root_options, Path(image or "/"), targets)
        return self._roots[key]

    async def run(self, container: Container) -> Exit:
        """Run a container to its end; on every way out its PID namespace has ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        root = await self._root(container.image, tuple(mount.target for mount in container.mounts))
        async with self._limiter.confine(container) as confinement:
            with map_exceptions({OSError: NodeError}, "cannot start bubblewrap"), StatusPipe() as status:
                child = self._start(container, root, status, confinement)
                # The namespace ends with its parent, which SIGKILL ends.
                code = await child.wait_and_end(
                    self._kill_grace, terminate=lambda: child.terminate_below(status.read().get("child-pid"))
                )
                if code in NOT_THE_PAYLOADS and "exit-code" not in status.read():
                    return _own_fault(container, code, confinement)
            return Exit(code, code != 0 and confinement.out_of_memory)

    def _start(self, container: Container, root: Sequence[str], status: "StatusPipe", confinement: Confinement) -> Child:
        with open_log(container.stdout) as stdout, open_log(container.stderr) as stderr:
            path = os.environ.get("PATH", PATH) if container.image in HOST_ROOT else PATH
            env = {"PATH": path, "HOME": HOME, "TMPDIR": HOME, **container.env}
            command = Command(
                confinement.argv(self._argv(container, root, status.writing), env),
                env,
                container.scratch,
                stdout,
                stderr,
                container.name,
                [status.writing],
                container.cpu_set,
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


class StatusPipe:
    """The pipe that bubblewrap writes the status of a container to."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._status: dict[str, int] = {}
        self._rest = b""  # of a line that is not complete: bubblewrap writes them in pieces

    def __enter__(self) -> "StatusPipe":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reading)
        os.close(self.writing)

    def read(self) -> dict[str, int]:
        """Return the status so far: `child-pid`, the first process of the namespace; `exit-code`, if the payload ran."""
        with suppress(BlockingIOError):
            *lines, self._rest = (self._rest + os.read(self._reading, 65536)).split(b"\n")
            for line in lines:
                self._status.update(json.loads(line))
        return self._status


def _own_fault(container: Container, code: int, confinement: Confinement) -> Exit:
    """Return the exit of a command that cannot be executed; raise NodeError if the container could not be made."""
    if refusal := confinement.refusal(code, container.stderr):
        raise NodeError(f"cannot limit what a container uses: {refusal}")
    if code != BWRAP_FAILED:
        return Exit(code)
    error = container.stderr.read_text(errors="replace").strip()
    if error.startswith("bwrap: execvp"):
        return cannot_run(error)
    raise NodeError(f"bubblewrap could not make the container: {error_summary(container.stderr)}")


def root_options(image: Path, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the options that mount an image, with mount points at `targets`. Raises NodeError if it is not a directory."""
    try:
        options = list(_mounted(image, PurePath("/"), [PurePath(target) for target in targets]))
    except OSError as error:
        raise NodeError(f"the image {image} must be an unpacked directory, or /: {error.strerror}") from error
    # Tasks must not see the tokens that EWMS leaves in the pilot's working directory.
    envfile = Path(ENVFILE).absolute()
    hide = ("--ro-bind", "/dev/null", str(envfile)) if image == Path("/") and envfile.exists() else ()
    return *options, "--tmpfs", "/run", *hide


def _mounted(directory: Path, place: PurePath, targets: Sequence[PurePath]) -> Iterator[str]:
    """Yield the options that mount the entries of a directory one by one, so that mount points can be made beside them."""
    for entry in sorted(directory.iterdir()):
        inside = place / entry.name
        below = [target for target in targets if target.is_relative_to(inside)]
        if str(inside) in NOT_FROM_THE_IMAGE or not os.access(entry, os.R_OK, follow_symlinks=False):
            continue
        if entry.is_symlink():
            yield from ("--symlink", os.readlink(entry), str(inside))  # noqa: PTH115 -- Path would normalize the target
        elif entry.is_dir() and _stays_empty(entry, inside):
            yield from (
                "--dir",
                str(inside),
            )  # in most images, mounts of these would cost an eighth of a container
        elif all((entry / target.relative_to(inside)).is_dir() for target in below):
            yield from ("--ro-bind", str(entry), str(inside))
        else:  # a mount point has to be made below it, where a mount of it would not allow that
            yield from ("--dir", str(inside), *_mounted(entry, inside, below))


def _stays_empty(directory: Path, inside: PurePath) -> bool:
    """Return whether a directory of an image is empty; in this machine's own root, something may yet be mounted there."""
    return directory != inside and not any(directory.iterdir())
