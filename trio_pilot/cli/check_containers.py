"""Checks of `trio-pilot check`: the container runtime, what enforces limits, images, and commands in them."""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.cli.check_finding import Check, SkippedError
from trio_pilot.errors import NodeError, PilotError
from trio_pilot.files.filesystem import is_directory, is_link
from trio_pilot.runtimes import HOST_ROOT, Runtime, bubblewrap, confinement
from trio_pilot.runtimes.apptainer_directory import ImageDirectory
from trio_pilot.runtimes.bubblewrap_root import is_own
from trio_pilot.runtimes.selection import ENGINES, choose, open_runtime
from trio_pilot.settings import Settings


def container_checks(settings: Settings) -> list[Check]:
    """Return the checks of the runtime and the limits, and of each image and command."""
    runtime_advice = "install it, or choose another in EWMS_PILOT_RUNTIME"
    limits_advice = "leave it out, or run where control groups may be made, or with docker or podman"
    image_advice = "correct it; docker and podman take a tag, bubblewrap and (as set) apptainer an unpacked directory"
    command_advice = "correct it, or name its directory in EWMS_PILOT_EXTERNAL_DIRECTORIES"
    return [
        Check("runtime", partial(_runtime, settings), runtime_advice),
        Check("limits", partial(check_limits, settings), limits_advice),
        *(Check(name, partial(_image, settings, image, args), image_advice) for name, image, args in _images(settings)),
        *(
            Check(name, partial(_command, settings, image, args), command_advice)
            for name, image, args in _commands(settings)
        ),
    ]


async def _runtime(settings: Settings) -> str:
    choice = await choose(settings.runtime, settings.task_image, settings.runtime_options)
    reason = "as set" if settings.runtime != "auto" else "auto: it works"
    passed_over = "".join(f"; {name} does not: {fault}" for name, fault in choice.passed_over)
    return f"{choice.name} ({reason}{passed_over})"


async def check_limits(settings: Settings) -> str:
    """Return what enforces each limit. Raises SkippedError if there are no limits."""
    settings = fitted(settings, find_allocation(os.environ))
    if settings.limits == confinement.NO_LIMITS:
        raise SkippedError
    try:
        choice = await choose(settings.runtime, settings.task_image, settings.runtime_options)
    except PilotError as error:
        raise SkippedError from error
    if choice.name in ENGINES:
        return f"by {choice.name}"
    enforced = await confinement.enforcement(settings.limits)
    if missing := [f"--task-{kind}: {how}" for kind, how in enforced.items() if how.startswith(confinement.NOT_ENFORCED)]:
        raise NodeError("; ".join(missing))
    return ", ".join(f"{kind}: {how}" for kind, how in enforced.items())


@asynccontextmanager
async def _open_runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """Open the runtime. Raises SkippedError if it does not work, which the check of the runtime reports."""
    async with AsyncExitStack() as stack:
        opening = open_runtime(settings.runtime, settings.task_image, settings.runtime_options)
        try:
            runtime = await stack.enter_async_context(opening)
        except PilotError as error:
            raise SkippedError from error
        yield runtime


def _images(settings: Settings) -> list[tuple[str, str, tuple[str, ...]]]:
    task, init = (settings.task_image, settings.task_args), (settings.init_image, settings.init_args)
    return [("image", *task), *([("init image", *init)] if any(init) else [])]


async def _image(settings: Settings, image: str, args: Sequence[str]) -> str:
    async with _open_runtime(settings) as runtime:
        await runtime.prepare(image, has_args=bool(args))
        if runtime.name == "process":
            return f"{image or 'none'}: not used, the process runtime has no images"
        return "/, this machine's own root" if image in HOST_ROOT else image


def _commands(settings: Settings) -> list[tuple[str, str, tuple[str, ...]]]:
    task = ("command", settings.task_image, settings.task_args)
    init = ("init command", settings.init_image, settings.init_args)
    return [(name, image, args) for name, image, args in (task, init) if args]


async def _command(settings: Settings, image: str, args: Sequence[str]) -> str:
    command = args[0]
    if "{{" in command:
        return f"{command}: known only when a task runs"
    async with _open_runtime(settings) as runtime:
        contained = runtime.has_mounts
        try:
            await runtime.prepare(image)
        except PilotError as error:
            raise SkippedError from error
    root = Path("/") if image in HOST_ROOT or not contained else Path(image)
    if runtime.engine or not await trio.to_thread.run_sync(is_directory, root):
        return f"{command}: cannot be looked for in this image"
    if contained and root != Path("/") and await trio.to_thread.run_sync(ImageDirectory.of, root) != ImageDirectory():
        return f"{command}: passed on to the entrypoint, or found in the PATH, of this image when a task runs"
    for path in _candidates(command, root):
        if _is_executable(path, root, settings, contained=contained):
            return str(path)
    raise NodeError(f"{command} is not there, as the container will see it")


def _candidates(command: str, root: Path) -> Iterator[Path]:
    """Yield the paths that a command may have in the container. Its working directory is new and empty."""
    if command.startswith("/"):
        yield Path(command)
    elif "/" not in command:
        search_path = os.environ.get("PATH", os.defpath) if root == Path("/") else bubblewrap.PATH
        yield from (Path(directory, command) for directory in search_path.split(":") if directory.startswith("/"))


def _is_executable(path: Path, root: Path, settings: Settings, *, contained: bool) -> bool:
    """Return whether a path is that of a program, as a container with this root sees it."""
    if not contained or any(path.is_relative_to(directory) for directory in settings.external_directories):
        return os.access(path, os.X_OK) and path.is_file()
    if is_own(path):
        return False
    outside = root / path.relative_to("/")
    # A link in an image may point below the image's own root, and cannot be followed from outside.
    return is_link(outside) or (os.access(outside, os.X_OK) and outside.is_file())
