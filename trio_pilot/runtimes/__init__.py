"""The interface of container runtimes; one module per family implements it."""

import errno
import os
from collections.abc import Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from trio_pilot.errors import NodeError

# The exit codes of a shell for a command that it cannot execute.
NOT_FOUND, NOT_EXECUTABLE = 127, 126
NOT_FOUND_REASONS = os.strerror(errno.ENOENT), os.strerror(errno.ENOTDIR)

HOST_ROOT = ("", "/")  # names of the image that is this machine's root
ENVFILE = "ewms_htcondor_envfile.sh"  # EWMS's file of the pilot's variables, tokens included: hidden from every container

NO_NETWORK = "none"

# What containers may do beyond what nearly all need. The capabilities are those of capabilities(7), without CAP_.
NAMESPACES = "namespaces"  # bubblewrap: make namespaces of their own, as nested containers do
SET_UID = "set-uid"  # docker, podman: execute programs with the rights of another user, as sudo does
CAPABILITIES = (
    *("AUDIT_CONTROL", "AUDIT_READ", "AUDIT_WRITE", "BLOCK_SUSPEND", "BPF", "CHECKPOINT_RESTORE", "CHOWN", "DAC_OVERRIDE"),
    *("DAC_READ_SEARCH", "FOWNER", "FSETID", "IPC_LOCK", "IPC_OWNER", "KILL", "LEASE", "LINUX_IMMUTABLE", "MAC_ADMIN"),
    *("MAC_OVERRIDE", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_RAW", "PERFMON", "SETFCAP", "SETGID"),
    *("SETPCAP", "SETUID", "SYSLOG", "SYS_ADMIN", "SYS_BOOT", "SYS_CHROOT", "SYS_MODULE", "SYS_NICE", "SYS_PACCT"),
    *("SYS_PTRACE", "SYS_RAWIO", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "WAKE_ALARM"),
)
PRIVILEGES = (NAMESPACES, SET_UID, *CAPABILITIES)

# The variables of two settings of apptainer, for errors that name them.
APPTAINER_BUILD = ("_EWMS_PILOT_APPTAINER_BUILD_WORKDIR",)
APPTAINER_IMAGE = ("_EWMS_PILOT_APPTAINER_IMAGE_DIRECTORY_MUST_BE_PRESENT",)


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of this machine in a container."""

    source: Path
    target: str
    writable: bool = False
    propagates: bool = True  # of one that is read-only: what is mounted below it later is seen in the container


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a container; None is no limit."""

    memory: int | None = None  # bytes
    cpus: float | None = None
    pids: int | None = None  # processes and threads


@dataclass(frozen=True, slots=True)
class Container:
    """A container to run once. Its environment is `env`, plus what the runtime has to add."""

    name: str  # unique to this run
    image: str
    args: tuple[str, ...]
    env: Mapping[str, str]
    mounts: tuple[Mount, ...]
    scratch: Path  # an empty directory of this machine, for this container alone
    stdout: Path
    stderr: Path
    limits: Limits = Limits()
    cpu_set: tuple[int, ...] = ()  # the CPUs that it may run on; empty: any
    without_entrypoint: bool = False  # run the arguments without the image's entrypoint
    needs_logs: bool = True  # stdout and stderr are needed even if it succeeds; if not, a runtime may skip them then


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended: its exit code, 0 to 255, or 128 + n if signal n ended it."""

    code: int
    out_of_memory: bool = False  # it was killed because it exceeded its memory, as far as is known


@dataclass(frozen=True, slots=True)
class Options:
    """The user's options for runtimes; each runtime uses those that it supports."""

    kill_grace: float = 2.0  # seconds between SIGTERM and SIGKILL
    network: str = ""  # NO_NETWORK, or an engine's name of a network; empty: the runtime's default
    user: str = ""  # in the container, UID[:GID]; empty: the image's
    shm_size: int | None = None  # bytes of /dev/shm
    engine_patience: float = 60.0  # seconds that an engine may be away
    debug: bool = False  # log more
    build_directory: Path = field(default=Path("/var/tmp"))  # noqa: S108 -- upstream's; where images are unpacked
    data_parent: Path = field(default=Path())  # of the data directory; temporary files beside it are swept with it
    only_directories: bool = True  # accept only an unpacked directory as apptainer's image
    privileges: frozenset[str] = frozenset()  # PRIVILEGES that containers keep
    hidden: tuple[Path, ...] = ()  # files and directories of this machine that no container may see
    protects_hub: bool = False  # containers may only read the data hub

    @property
    def has_network(self) -> bool:
        """Whether containers have a network at all."""
        return self.network != NO_NETWORK


class Runtime(Protocol):
    """Runs containers to their ends."""

    name: str
    has_mounts: bool
    """Whether a container sees a mount at its target; if not, it sees this machine's own paths."""
    engine: Path | None
    """The socket of the daemon that runs the containers; None if they are processes below the pilot."""
    has_unremoved_containers: bool
    """Whether a container is left that the runtime could not remove by the time it was closed."""
    image_directory: Path | None
    """The directory that it unpacks images in; None if it unpacks none, or leaves that to a daemon."""

    async def prepare(self, image: str, *, has_args: bool = True) -> None:
        """Get an image ready to run, with arguments or with the command of its own.

        Raises:
            NodeError: the image, or the runtime itself, does not work on this machine; or it has no command of its own.
        """

    async def has_entrypoint(self, image: str) -> bool:
        """Return whether an image that is prepared has an entrypoint, which decides what its arguments mean."""

    async def run(self, container: Container) -> Exit:
        """Run a container to its end.

        On every way out, cancellation included, every process of the container has ended and is reaped: it gets SIGTERM,
        and SIGKILL `kill_grace` seconds later.

        Raises:
            NodeError: the container could not be started, for a reason other than its own.
            ContainerLostError: it ended with its engine, or how it ended is unknown.
        """


class ForeignFiles(Protocol):
    """A directory in which containers have left files of other users, seen with the rights of their engine."""

    async def open_directories(self, directories: Collection[Path]) -> None:
        """Let every user list and change some of the directories in it. Raises NodeError if the engine cannot."""

    async def copy(self, file: Path, destination: Path) -> None:
        """Copy a plain file in it to a new file of this user. Raises NodeError if that fails."""


@runtime_checkable
class Engine(Protocol):
    """A runtime whose containers may be other users than the pilot: a daemon runs them."""

    passes_closed_directories: bool
    """Whether the engine can reach a directory of this user below one that is closed to all others."""
    group: int
    """The group id of the engine."""

    def open_foreign_files(self, image: str, root: Path) -> AbstractAsyncContextManager[ForeignFiles]:
        """Open a directory of this machine with the engine's rights; no program of the image is run.

        Raises:
            NodeError: the engine does not have the image, or fails.
        """


def no_command(image: str) -> NodeError:
    """Return the error for an image that is run without arguments, and has no command of its own."""
    return NodeError(f"the image {image or '/'} has no command of its own: say what to run in it (TASK_ARGS, INIT_ARGS)")


def command_refused(container: Container, line: str) -> Exit:
    """Return the exit of a command that could not be executed, and append the line that says so to its stderr.

    Raises:
        OSError: stderr cannot be written.
    """
    with container.stderr.open("ab", 0) as stderr:
        stderr.write(os.fsencode(f"{line}\n"))
    return cannot_run(line)


def cannot_run(reason: str) -> Exit:
    """Return the exit of a command that could not be executed, from a text that ends with the reason."""
    return Exit(NOT_FOUND if reason.endswith(NOT_FOUND_REASONS) else NOT_EXECUTABLE)
