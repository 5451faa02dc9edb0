"""The runtime by bubblewrap, without a daemon: its images are unpacked directories, and this machine's own root."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.data_directory import root_in
from trio_pilot.files.error_summary import error_summary
from trio_pilot.files.task_logs import open_log
from trio_pilot.log import LOGGER
from trio_pilot.processes import cgroups, threads
from trio_pilot.processes.children import Child, Children, Command
from trio_pilot.processes.orphans import MARKER, mark
from trio_pilot.runtimes import (
    HOST_ROOT,
    NAMESPACES,
    NOT_EXECUTABLE,
    NOT_FOUND,
    Container,
    Exit,
    Mount,
    Options,
    command_refused,
    no_command,
)
from trio_pilot.runtimes.apptainer_directory import USUAL_PATH, ImageDirectory
from trio_pilot.runtimes.bubblewrap_root import HOME, HOST, Root, is_own, root_of
from trio_pilot.runtimes.confinement import NOT_ENTERED, Confinement, Limiter, OpenGroups, open_limiter
from trio_pilot.runtimes.hidden_paths import NOTHING, HiddenPath, HiddenPaths
from trio_pilot.runtimes.image_shell import Launch, launch
from trio_pilot.runtimes.kernel_files import kernel_files
from trio_pilot.runtimes.seccomp import seccomp_filter
from trio_pilot.runtimes.session_keyring import join_new_session_keyring

OWN_VARIABLES = {"HOME": HOME, "TMPDIR": HOME}

# Root would keep its capabilities, and could undo the rest with them.
UNPRIVILEGED = ("--cap-drop", "ALL", "--die-with-parent")
BWRAP_FAILED = 1  # bubblewrap's own exit code
# Exit codes that are not the payload's, unless bubblewrap has reported that of the payload.
NOT_THE_PAYLOADS = (BWRAP_FAILED, NOT_ENTERED, NOT_EXECUTABLE, NOT_FOUND)
NO_COMMAND = "bwrap: execvp "  # its error for a command that it cannot execute, before the command and the reason
BWRAPS_OWN = 2  # bubblewrap's processes for each container: the one outside, and the first of the namespace

PROBE_TIMEOUT = 10.0  # seconds for a container that runs `true`


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- as for any other runtime
    """Return the reason why bubblewrap does not work here; None if it works."""
    return await threads.run_sync(_fault)


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
    join_new_session_keyring()
    async with open_limiter(BWRAPS_OWN, open_groups) as limiter:
        yield BubblewrapRuntime(bwrap, options, await _isolation(bwrap, options), limiter)


@dataclass(frozen=True, slots=True)
class _Isolation:
    """What cuts a container off, whatever its image."""

    options: Sequence[str]
    kernel: Sequence[str]  # the options that protect the files of the kernel in /proc
    filter: bytes | None  # of system calls


async def _isolation(bwrap: str, options: Options) -> _Isolation:
    words = ["--unshare-all", *(("--share-net",) if options.has_network else ()), *UNPRIVILEGED]
    allow_namespaces = NAMESPACES in options.privileges
    calls = seccomp_filter(allow_namespaces=allow_namespaces)
    if calls is None and not allow_namespaces:
        help_text = await trio.run_process([bwrap, "--help"], capture_stdout=True, check=False)
        if b"--disable-userns" in help_text.stdout:
            words += ["--unshare-user", "--disable-userns"]
        else:
            LOGGER.warning("bubblewrap: tasks can make user namespaces: there is no filter of system calls for this machine")
    return _Isolation(words, list(_kernel_options(allow_namespaces=allow_namespaces)), calls)


def _kernel_options(*, allow_namespaces: bool) -> Iterator[str]:
    """Yield the options that protect /proc from root; other users cannot write to anything there but their own.

    One mount that is read-only as a whole costs nearly nothing, and what a kernel may add is protected too. But a process
    that makes a user namespace has to write to files of its own there.
    """
    if os.geteuid():
        return
    if allow_namespaces:
        yield from (word for path in kernel_files() for word in ("--ro-bind", str(path), str(path)))
    else:
        yield from ("--remount-ro", "/proc")


class BubblewrapRuntime:
    """Runs containers in namespaces of their own (the network apart), on a read-only image."""

    name = "bubblewrap"
    has_mounts = True
    engine: Path | None = None
    has_unremoved_containers = False
    image_directory: Path | None = None

    def __init__(self, bwrap: str, options: Options, isolation: _Isolation, limiter: Limiter) -> None:
        self._bwrap = bwrap
        self._kill_grace = options.kill_grace
        self._isolation = isolation
        self._hidden = HiddenPaths(options.hidden, root_in(options.data_parent), is_own)
        self._children = Children()
        self._limiter = limiter
        self._directories: dict[str, ImageDirectory] = {}
        self._roots: dict[tuple[str, tuple[str, ...]], Root] = {}

    async def prepare(self, image: str, *, has_args: bool = True) -> None:
        """Read the image directory. Raises NodeError if there is none, or no command in it where one is needed."""
        await self._root(image, ())
        if not has_args and not (await self._directory(image)).runscript.has_command:
            raise no_command(image)

    async def has_entrypoint(self, image: str) -> bool:
        """Return whether an image has a runscript, or the entrypoint of a Docker image."""
        return (await self._directory(image)).runscript.has_entrypoint

    async def _directory(self, image: str) -> ImageDirectory:
        if image in HOST_ROOT:
            return ImageDirectory()
        if image not in self._directories:
            self._directories[image] = await threads.run_sync(ImageDirectory.of, Path(image))
        return self._directories[image]

    async def _root(self, image: str, targets: tuple[str, ...]) -> Root:
        key = image, targets
        if key not in self._roots:
            self._roots[key] = await threads.run_sync(root_of, Path(image or "/"), targets)
        return self._roots[key]

    async def run(self, container: Container) -> Exit:
        """Run a container to its end; on every way out its PID namespace has ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        root = await self._root(container.image, tuple(mount.target for mount in container.mounts))
        payload = launch(await self._directory(container.image), container, OWN_VARIABLES)
        async with self._limiter.confine(container) as confinement:
            with map_exceptions({OSError: NodeError}, "cannot start bubblewrap"), StatusPipe() as status:
                child = self._start(container, _Plan(root, payload, status.writing, confinement))
                # The namespace ends with its parent, which SIGKILL ends.
                code = await child.wait_and_end(
                    self._kill_grace, terminate=lambda: child.terminate_below(status.read().get("child-pid"))
                )
                if code in NOT_THE_PAYLOADS and "exit-code" not in status.read():
                    return _own_fault(container, code, confinement)
                if refusal := payload.refusal(code, container.stderr):
                    return command_refused(container, refusal)
            return Exit(code, code != 0 and confinement.out_of_memory)

    def _start(self, container: Container, plan: "_Plan") -> Child:
        # Variables such as LD_PRELOAD are for the payload alone, and may be secret: bubblewrap reads them from a file.
        path = os.environ.get("PATH", USUAL_PATH) if container.image in HOST_ROOT else USUAL_PATH
        env = {"PATH": path, **plan.payload.env}
        with (
            open_log(container.stdout) as stdout,
            open_log(container.stderr) as stderr,
            _open_contents(self._contents(env, plan.root), container.scratch) as contents,
        ):
            command = Command(
                plan.confinement.argv(self._argv(container, plan, contents), {}),
                {},
                container.scratch,
                stdout,
                stderr,
                container.name,
                [plan.status, *contents],
                container.cpu_set,
            )
            return self._children.spawn(command)

    def _contents(self, env: Mapping[str, str], root: Root) -> Iterator[bytes]:
        """Yield what bubblewrap reads from files: the variables, the content of files, and the filter if there is one."""
        yield _variables(env)
        yield from root.files.values()
        if self._isolation.filter:
            yield self._isolation.filter

    def _argv(self, container: Container, plan: "_Plan", contents: Sequence[int]) -> list[str]:
        root, variables, files = plan.root, contents[0], contents[1 : 1 + len(plan.root.files)]
        own = [word for place in root.scratch for word in ("--bind", str(container.scratch), place)]
        mounts = [replace(mount, target=target) for mount, target in zip(container.mounts, root.targets, strict=True)]
        of_host = [Mount(HOST, str(HOST))] if container.image in HOST_ROOT else []
        made = [word for file, place in zip(files, root.files, strict=True) for word in ("--ro-bind-data", str(file), place)]
        return [
            self._bwrap,
            *self._isolation.options,
            *(("--seccomp", str(contents[-1])) if self._isolation.filter else ()),
            *("--json-status-fd", str(plan.status), "--args", str(variables)),
            *root.options,
            *("--proc", "/proc", *self._isolation.kernel, *_devices(), *own),
            *made,
            *(word for mount in mounts for word in _bound(mount)),
            *root.devices,
            *_covers(self._hidden.seen_through([*of_host, *mounts])),
            *("--remount-ro", "/", "--chdir", HOME, "--"),
            *plan.payload.argv,
        ]


def _bound(mount: Mount) -> tuple[str, str, str]:
    return "--bind" if mount.writable else "--ro-bind", str(mount.source), mount.target


def _covers(hidden: Iterable[HiddenPath]) -> Iterator[str]:
    for path in hidden:
        if path.is_directory:
            yield from ("--tmpfs", path.place, "--remount-ro", path.place)
        else:
            yield from ("--ro-bind", str(NOTHING), path.place)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a container is run with."""

    root: Root
    payload: Launch
    status: int  # the descriptor that bubblewrap writes its status to
    confinement: Confinement


def _variables(env: Mapping[str, str]) -> bytes:
    """Return the options that set variables, as bubblewrap reads them from a file."""
    options = [word for name, value in env.items() for word in ("--setenv", name, value)]
    return b"".join(os.fsencode(word) + b"\0" for word in options)


@contextmanager
def _open_contents(contents: Iterable[bytes], directory: Path) -> Iterator[list[int]]:
    """Open files without names, for a child to read: in memory, or else in a directory."""
    with ExitStack() as stack:
        files = []
        for content in contents:
            file = stack.enter_context(_open_unnamed(directory))
            file.write(content)
            file.flush()
            file.seek(0)
            files.append(file.fileno())
        yield files


def _open_unnamed(directory: Path) -> IO[bytes]:
    if hasattr(os, "memfd_create"):  # not every Python has it
        return os.fdopen(os.memfd_create("trio-pilot"), "w+b")
    return tempfile.TemporaryFile(dir=directory)


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
    if error.startswith(NO_COMMAND):
        return command_refused(container, error.removeprefix(NO_COMMAND))
    raise NodeError(f"bubblewrap could not make the container: {error_summary(container.stderr)}")
