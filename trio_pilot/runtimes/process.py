"""The runtime without containers: a process with its own session and scratch directory, and nothing in its way."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.task_logs import open_log
from trio_pilot.log import LOGGER
from trio_pilot.processes.children import Child, Children, Command
from trio_pilot.runtimes import NOT_FOUND, Container, Exit, Options, cannot_run
from trio_pilot.runtimes.confinement import NOT_ENTERED, Confinement, Limiter, open_limiter


async def fault(options: Options) -> str | None:  # noqa: ARG001 -- as for any other runtime
    """Say that it works."""
    return None


@asynccontextmanager
async def open_runtime(options: Options) -> AsyncIterator["ProcessRuntime"]:
    """Open the runtime, and say what it is not."""
    LOGGER.warning("runtime 'process': tasks are NOT contained; they can read and write whatever this user can")
    async with open_limiter() as limiter:
        yield ProcessRuntime(options.kill_grace, limiter)


class ProcessRuntime:
    """Runs the arguments of a container as a command of this machine; its image is not used."""

    name = "process"
    mounts = False
    engine: Path | None = None
    leaves_some = False
    images: Path | None = None

    def __init__(self, kill_grace: float, limiter: Limiter) -> None:
        self._kill_grace = kill_grace
        self._children = Children()
        self._limiter = limiter

    async def prepare(self, image: str) -> None:
        """Need nothing."""

    async def run(self, container: Container) -> Exit:
        """Run the command to its end; on every way out its whole process tree is gone."""
        await trio.lowlevel.checkpoint_if_cancelled()
        async with self._limiter.confine(container) as confinement:
            started = self._start(container, confinement)
            if isinstance(started, Exit):
                return started
            code = await started.see_to_its_end(self._kill_grace)
            if refusal := confinement.refusal(code, container.stderr):
                return _cannot_run(container, code, refusal)
            return Exit(code, code != 0 and confinement.out_of_memory)

    def _start(self, container: Container, confinement: Confinement) -> Child | Exit:
        """Start the command; where it is itself to blame that it cannot be, give what a shell would."""
        with (
            map_exceptions({OSError: NodeError}, "cannot start a process"),
            open_log(container.stdout) as stdout,
            open_log(container.stderr) as stderr,
        ):
            env = self._environment(container)
            argv = confinement.argv(container.args, env)
            try:
                return self._children.spawn(
                    Command(argv, env, container.scratch, stdout, stderr, marker=container.name, cpus=container.pinned)
                )
            except OSError as error:
                if error.filename != container.args[0]:
                    raise  # this machine's fault: it has no memory, process or file descriptor left
                reason = f"{container.args[0]}: {error.strerror}"
                stderr.write(os.fsencode(f"{reason}\n"))
                return cannot_run(reason)

    def _environment(self, container: Container) -> dict[str, str]:
        scratch = str(container.scratch)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": scratch,
            "TMPDIR": scratch,
            **container.env,
        }


def _cannot_run(container: Container, code: int, refusal: str) -> Exit:
    """Say what the shell before the command could not do, as if there had been none."""
    if code == NOT_ENTERED:
        raise NodeError(f"cannot limit what a container uses: {refusal}")
    reason = f"{container.args[0]}: {os.strerror(errno.ENOENT if code == NOT_FOUND else errno.EACCES)}"
    with map_exceptions({OSError: NodeError}, "cannot write for a container"):
        container.stderr.write_bytes(os.fsencode(f"{reason}\n"))
    return cannot_run(reason)
