"""What a pilot asks of a container runtime; one module per family does it."""

import errno
import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trio_pilot.errors import NodeError

# What a shell says of a command that it cannot run.
NOT_FOUND, NOT_EXECUTABLE = 127, 126
NOT_FOUND_REASONS = os.strerror(errno.ENOENT), os.strerror(errno.ENOTDIR)

DATA_DIRECTORY = "ewms-pilot-data"  # in the root of every container, and in the pilot's own directory


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of this machine in a container."""

    source: Path
    target: str
    writable: bool = False


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


class Runtime(Protocol):
    """Runs containers to their ends."""

    name: str
    mounts: bool
    """Whether a container sees a mount at its target; else it sees this machine's own paths."""

    async def prepare(self, image: str) -> None:
        """Get an image ready to run.

        Raises:
            NodeError: the image, or the runtime itself, does not work on this machine.
        """

    async def run(self, container: Container) -> int:
        """Run a container to its end, and give its exit code: 0 to 255, 128 + n for death by signal n.

        On every way out, being cancelled first of all, every process of the container is gone and reaped: it gets SIGTERM,
        `kill_grace` seconds later SIGKILL.

        Raises:
            NodeError: the container could not be started, for a reason that is not its own.
        """


def cannot_run(reason: str) -> int:
    """Give the exit code of a command that could not be executed, from a text that ends with the reason."""
    return NOT_FOUND if reason.endswith(NOT_FOUND_REASONS) else NOT_EXECUTABLE


def open_runtime(name: str, image: str, kill_grace: float) -> AbstractAsyncContextManager[Runtime]:
    """Open the runtime of that name; `auto` is the first that works here.

    Raises:
        NodeError: it does not work here.
    """
    from trio_pilot.runtimes import bubblewrap, process

    if name == "process":
        return process.open_runtime(kill_grace)
    fault = bubblewrap.fault()
    if fault is None:
        return bubblewrap.open_runtime(kill_grace)
    if name == "auto" and image in ("", "/"):
        return process.open_runtime(kill_grace)
    raise NodeError(f"bubblewrap does not work here: {fault}")
