"""The runtime without containers: a process with its own session and scratch directory, and nothing in its way."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from trio_pilot.children import Child, Children, Command
from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import Container, Exit, Options, cannot_run


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- as for any other runtime
    """Say that it works."""
    return None


@asynccontextmanager
async def open_runtime(options: Options) -> AsyncIterator["ProcessRuntime"]:
    """Open the runtime, and say what it is not."""
    LOGGER.warning("runtime 'process': tasks are NOT contained; they can read and write whatever this user can")
    yield ProcessRuntime(options.kill_grace)


class ProcessRuntime:
    """Runs the arguments of a container as a command of this machine; its image is not used."""

    name = "process"
    mounts = False
    engine: Path | None = None

    def __init__(self, kill_grace: float) -> None:
        self._kill_grace = kill_grace
        self._children = Children()

    async def prepare(self, image: str) -> None:
        """Need nothing."""

    async def run(self, container: Container) -> Exit:
        """Run the command to its end; on every way out its whole process tree is gone."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with (
            map_exceptions({OSError: NodeError}, "cannot start a process"),
            container.stdout.open("wb", 0) as stdout,
            container.stderr.open("wb", 0) as stderr,
        ):
            command = Command(
                container.args,
                self._environment(container),
                container.scratch,
                stdout,
                stderr,
                marker=container.name,
            )
            try:
                child = self._children.spawn(command)
            except OSError as error:
                if error.filename != container.args[0]:
                    raise  # this machine's fault: it has no memory, process or file descriptor left
                reason = f"{container.args[0]}: {error.strerror}"
                stderr.write(os.fsencode(f"{reason}\n"))
                return cannot_run(reason)
        return Exit(await self._see_to_its_end(child))

    async def _see_to_its_end(self, child: Child) -> int:
        try:
            return await child.wait()
        finally:
            await child.end(
                lambda: child.signal_group(signal.SIGTERM),
                lambda: child.signal_group(signal.SIGKILL),
                self._kill_grace,
            )

    def _environment(self, container: Container) -> dict[str, str]:
        scratch = str(container.scratch)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": scratch,
            "TMPDIR": scratch,
            **container.env,
        }
