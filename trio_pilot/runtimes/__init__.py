"""What a pilot asks of a container runtime; one module per family does it."""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# What a shell says of a command that it cannot run.
NOT_FOUND, NOT_EXECUTABLE = 127, 126
NOT_FOUND_REASONS = os.strerror(errno.ENOENT), os.strerror(errno.ENOTDIR)

OWN_ROOT = ("", "/")  # images that mean this machine
ENVFILE = "ewms_htcondor_envfile.sh"  # EWMS's file of the pilot's variables, tokens included: hidden from every container

# The variables of two settings of apptainer, for errors that name them.
APPTAINER_BUILD = ("_EWMS_PILOT_APPTAINER_BUILD_WORKDIR",)
APPTAINER_IMAGE = ("_EWMS_PILOT_APPTAINER_IMAGE_DIRECTORY_MUST_BE_PRESENT",)


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of this machine in a container."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use; None is no limit."""

    memory: int | None = None  # bytes
    cpus: float | None = None
    pids: int | None = None  # processes and threads


@dataclass(frozen=True, slots=True)
class Container:
    """What to run, once. Its environment is `env` and no more than the runtime must add."""

    name: str  # of this run, and no other
    image: str
    args: tuple[str, ...]
    env: Mapping[str, str]
    mounts: tuple[Mount, ...]
    scratch: Path  # an empty directory of this machine, for the container alone
    stdout: Path
    stderr: Path
    limits: Limits = Limits()
    pinned: tuple[int, ...] = ()  # CPUs that it may run on; none: any
    plain: bool = False  # run the arguments as they are, without what the image puts before them
    heard: bool = True  # what it says is wanted even if it succeeds; else a runtime need not get it then


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended: its exit code, 0 to 255, 128 + n for death by signal n."""

    code: int
    out_of_memory: bool = False  # it was killed for want of memory, as far as can be told


@dataclass(frozen=True, slots=True)
class Options:
    """What the user wants of a runtime; each takes of it what it has."""

    kill_grace: float = 2.0  # seconds between SIGTERM and SIGKILL
    network: str = ""  # the engine's name of a network; none: its default
    user: str = ""  # in the container, UID[:GID]; none: the image's
    shm_size: int | None = None  # bytes of /dev/shm
    engine_patience: float = 60.0  # seconds that an engine may not answer
    debug: bool = False  # say more
    build_directory: Path = field(default=Path("/var/tmp"))  # noqa: S108 -- upstream's; where images are unpacked
    data_parent: Path = field(default=Path())  # of the data directory; what is beside it for a moment is swept with it
    only_directories: bool = True  # accept only an unpacked directory as apptainer's image


class Runtime(Protocol):
    """Runs containers to their ends."""

    name: str
    mounts: bool
    """Whether a container sees a mount at its target; else it sees this machine's own paths."""
    engine: Path | None
    """The socket of the daemon that keeps the containers, None where they are processes below the pilot's own."""
    leaves_some: bool
    """Whether a container is still there that it could not remove: when it is closed, that is for others to do."""
    images: Path | None
    """The directory that it unpacks images in, None where it unpacks none, or has somebody else do so."""

    async def prepare(self, image: str) -> None:
        """Get an image ready to run.

        Raises:
            NodeError: the image, or the runtime itself, does not work on this machine.
        """

    async def run(self, container: Container) -> Exit:
        """Run a container to its end.

        On every way out, being cancelled first of all, every process of the container is gone and reaped: it gets SIGTERM,
        `kill_grace` seconds later SIGKILL.

        Raises:
            NodeError: the container could not be started, for a reason that is not its own.
            ContainerLostError: it ended with its engine, or nobody knows how it ended.
        """


def cannot_run(reason: str) -> Exit:
    """Give the exit of a command that could not be executed, from a text that ends with the reason."""
    return Exit(NOT_FOUND if reason.endswith(NOT_FOUND_REASONS) else NOT_EXECUTABLE)
