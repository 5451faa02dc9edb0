"""A toy runtime: containers in memory, with a shell that knows two commands.

It is an exercise: it shows what a new runtime has to be to join the contract suite, which takes one line in `subjects.py`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from trio_pilot.errors import NodeError
from trio_pilot.runtimes import NOT_FOUND, Container, Exit, Options, no_command


class ToyRuntime:
    """Runs `sleep SECONDS` and `sh -c "exit CODE"`."""

    name = "toy"
    has_mounts = False
    engine: Path | None = None
    has_unremoved_containers = False
    image_directory: Path | None = None

    def __init__(self) -> None:
        self.running: set[str] = set()

    async def prepare(self, image: str, *, has_args: bool = True) -> None:
        """Accept the one image that there is, which has no command of its own."""
        await trio.lowlevel.checkpoint()
        if not has_args:
            raise no_command(image)
        if image != "/":
            raise NodeError(f"the image {image} must be /: toy has no other")

    async def has_entrypoint(self, image: str) -> bool:
        """Return False."""
        return image != "/"

    async def run(self, container: Container) -> Exit:
        """Run a container to its end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.running.add(container.name)
        try:
            container.stdout.touch()
            container.stderr.touch()
            match container.args:
                case ("sleep", seconds):
                    await trio.sleep(float(seconds))
                    return Exit(0)
                case ("sh", "-c", script) if script.startswith("exit "):
                    await trio.lowlevel.checkpoint()
                    return Exit(int(script.removeprefix("exit ")))
            container.stderr.write_text(f"{container.args[0]}: No such file or directory\n")
            return Exit(NOT_FOUND)
        finally:
            self.running.remove(container.name)


@asynccontextmanager
async def open_runtime(_options: Options) -> AsyncIterator[ToyRuntime]:
    """Open the runtime; check at the end that no container is left."""
    runtime = ToyRuntime()
    yield runtime
    assert not runtime.running
