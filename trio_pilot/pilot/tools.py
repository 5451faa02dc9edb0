"""Opening what containers are run with: the guardian, the data directory, and the runtime."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from trio_pilot.cleanup.client import Guardian, open_guardian
from trio_pilot.files.data_directory import open_data_directory, root_in
from trio_pilot.pilot.container_runs import Tools, open_hub
from trio_pilot.runtimes import Runtime
from trio_pilot.runtimes.selection import open_runtime
from trio_pilot.settings import Settings


@asynccontextmanager
async def open_tools(settings: Settings, image: str, *, has_args: bool = True, keep: bool = False) -> AsyncIterator[Tools]:
    """Open what containers of an image are run with for once, without queues; `keep` is for the files of tasks.

    Raises:
        NodeError: the data directory, the runtime or the image does not work; it may be in a group of one.
    """
    parent, external = settings.data_dir_parent_path_on_host, settings.external_directories
    async with open_guardian() as guardian:
        guardian.watch("data", root_in(parent))
        with open_data_directory(parent, external, keep=keep) as data_directory:
            opening = open_runtime(settings.runtime, settings.task_image, settings.runtime_options)
            async with guarded(opening, guardian) as runtime:
                await runtime.prepare(image, has_args=has_args)
                tools = Tools(guardian, data_directory, runtime, ())
                async with open_hub(tools, image):
                    yield tools


@asynccontextmanager
async def guarded(opening: AbstractAsyncContextManager[Runtime], guardian: Guardian) -> AsyncIterator[Runtime]:
    """Open a runtime, and let the guardian know what it may leave elsewhere than below this pilot."""
    runtime: Runtime | None = None
    try:
        async with opening as runtime:
            if runtime.engine:
                guardian.watch("engine", runtime.engine)
            if runtime.image_directory:
                guardian.watch("images", runtime.image_directory)
            yield runtime
    finally:
        if runtime and runtime.has_unremoved_containers:
            guardian.outlive_pilot()
