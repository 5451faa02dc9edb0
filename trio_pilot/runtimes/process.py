"""The runtime without containers: a process with its own session and scratch directory, and no isolation."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.task_logs import open_log
from trio_pilot.log import LOGGER
from trio_pilot.processes import cgroups
from trio_pilot.processes.children import Child, Children, Command
from trio_pilot.runtimes import NOT_FOUND, Container, Exit, Options, cannot_run
from trio_pilot.runtimes.confinement import NOT_ENTERED, Confinement, Limiter, OpenGroups, open_limiter


async def fault(options: Options) -> str | None:
    """Return which of the options this runtime cannot keep to; None: it works everywhere."""
    if not options.has_network:
        return "it cannot cut tasks off the network (--task-network none): choose a runtime of containers"
    if options.protects_hub:
        return "it cannot protect the data hub from tasks (--data-hub read-only): choose a runtime of containers"
    return None


@asynccontextmanager
async def open_runtime(options: Options, open_groups: OpenGroups = cgroups.Groups) -> AsyncIterator["ProcessRuntime"]:
    """Open the runtime, and warn that it does not isolate."""
    LOGGER.warning("runtime 'process': tasks are NOT contained; they can read and write whatever this user can")
    async with open_limiter(open_groups=open_groups) as limiter:
        runtime = ProcessRuntime(options.kill_grace, limiter)
        with Children.reaping():  # zombies of a task count among its processes
            yield runtime


class ProcessRuntime:
    """Runs the arguments of a container as a command of this machine; its image is not used."""

    name = "process"
    has_mounts = False
    engine: Path | None = None
    has_unremoved_containers = False
    image_directory: Path | None = None

    def __init__(self, kill_grace: float, limiter: Limiter) -> None:
        self._kill_grace = kill_grace
        self._children = Children()
        self._limiter = limiter

    async def prepare(self, image: str, *, has_args: bool = True) -> None:  # noqa: ARG002 -- there is no image
        """Raise NodeError if there are no arguments: there is no image, and no command of its own."""
        if not has_args:
            raise NodeError("the runtime process has no command of an image: say what to run (TASK_ARGS, INIT_ARGS)")

    async def has_entrypoint(self, image: str) -> bool:  # noqa: ARG002
        """Return False: there is no image."""
        return False

    async def run(self, container: Container) -> Exit:
        """Run the command to its end; on every way out its whole process tree has ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        async with self._limiter.confine(container) as confinement:
            started = self._start(container, confinement)
            if isinstance(started, Exit):
                return started
            try:
                code = await started.wait_and_end(self._kill_grace)
            finally:
                await self._children.end_strays(started)
            if refusal := confinement.refusal(code, container.stderr):
                return _cannot_run(container, code, refusal)
            return Exit(code, code != 0 and confinement.out_of_memory)

    def _start(self, container: Container, confinement: Confinement) -> Child | Exit:
        """Start the command; if it cannot be executed for a reason of its own, return the exit that a shell would give."""
        scratch = str(container.scratch)
        path = os.environ.get("PATH", os.defpath)
        env = {"PATH": path, "HOME": scratch, "TMPDIR": scratch, **container.env}
        argv = confinement.argv(container.args, env)
        with (
            map_exceptions({OSError: NodeError}, "cannot start a process"),
            open_log(container.stdout) as stdout,
            open_log(container.stderr) as stderr,
        ):
            try:
                return self._children.spawn(
                    Command(argv, env, container.scratch, stdout, stderr, marker=container.name, cpus=container.cpu_set)
                )
            except OSError as error:
                if error.filename != container.args[0]:
                    raise  # this machine's fault: it has no memory, process or file descriptor left
                reason = f"{container.args[0]}: {error.strerror}"
                stderr.write(os.fsencode(f"{reason}\n"))
                return cannot_run(reason)


def _cannot_run(container: Container, code: int, refusal: str) -> Exit:
    """Return the exit of a command that the shell before it could not execute, and write the reason as without a shell."""
    if code == NOT_ENTERED:
        raise NodeError(f"cannot limit what a container uses: {refusal}")
    reason = f"{container.args[0]}: {os.strerror(errno.ENOENT if code == NOT_FOUND else errno.EACCES)}"
    with map_exceptions({OSError: NodeError}, "cannot write for a container"):
        container.stderr.write_bytes(os.fsencode(f"{reason}\n"))
    return cannot_run(reason)
