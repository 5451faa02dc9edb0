"""Checks of `trio-pilot check`: the container runtime, what enforces limits, images, and commands in them."""

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.cli.check_finding import Check, SkippedError
from trio_pilot.errors import NodeError, PilotError, first
from trio_pilot.files.filesystem import is_directory, is_link
from trio_pilot.pilot.container_runs import RunSpec, Tools, check_paths
from trio_pilot.pilot.tools import open_tools
from trio_pilot.pilot.trial import find_command, try_files
from trio_pilot.processes import threads
from trio_pilot.runtimes import HOST_ROOT, Runtime, confinement
from trio_pilot.runtimes.apptainer_directory import USUAL_PATH
from trio_pilot.runtimes.bubblewrap_root import is_own
from trio_pilot.runtimes.selection import ENGINES, choose, open_runtime
from trio_pilot.settings import Settings

Kind = Callable[[Settings], RunSpec]


def container_checks(settings: Settings) -> list[Check]:
    """Return the checks of the runtime and the limits, and of each image and command."""
    runtime_advice = "install it, or choose another in EWMS_PILOT_RUNTIME"
    limits_advice = "leave it out, or run where control groups may be made, or with docker or podman"
    image_advice = "correct it; docker and podman take a tag, bubblewrap and (as set) apptainer an unpacked directory"
    container_advice = "correct what it names: --task-user, EWMS_PILOT_EXTERNAL_DIRECTORIES, --task-memory, the image"
    command_advice = "correct it, or name its directory in EWMS_PILOT_EXTERNAL_DIRECTORIES"
    return [
        Check("runtime", partial(_runtime, settings), runtime_advice),
        Check("limits", partial(check_limits, settings), limits_advice),
        *(Check(name, partial(_image, settings, image, args), image_advice) for name, image, args in _images(settings)),
        *(
            check
            for prefix, kind in _kinds(settings)
            for check in (
                Check(f"{prefix}container", partial(_container, settings, kind), container_advice),
                Check(f"{prefix}command", partial(_command, settings, kind), command_advice),
            )
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


def _kinds(settings: Settings) -> list[tuple[str, Kind]]:
    """List the kinds of containers that are run: the beginning of the names of their checks, and how each is specified."""
    has_init = settings.init_image or settings.init_args
    return [("", RunSpec.task), *([("init ", RunSpec.init)] if has_init else [])]


def _spec(settings: Settings, kind: Kind) -> RunSpec:
    return kind(fitted(settings, find_allocation(os.environ)))


@asynccontextmanager
async def _open_tools(settings: Settings, image: str) -> AsyncIterator[Tools]:
    """Open what a container is run with. Raises SkippedError if that fails, or there is no image: other checks report it."""
    async with AsyncExitStack() as stack:
        try:
            tools = await stack.enter_async_context(open_tools(settings, image))
        except Exception as error:
            if isinstance(first(error), PilotError):
                raise SkippedError from error
            raise
        yield tools


async def _container(settings: Settings, kind: Kind) -> str:
    spec = _spec(settings, kind)
    async with _open_tools(settings, spec.image) as tools:
        check_paths(tools, spec)
        begun = trio.current_time()
        facts = await try_files(tools, settings, spec)
        return f"started and ended in {trio.current_time() - begun:.1f} s; {facts}"


async def _command(settings: Settings, kind: Kind) -> str:
    spec = _spec(settings, kind)
    command = next(iter(spec.args), None)
    if command is None:
        raise SkippedError  # the image's own
    if "{{" in command:
        return f"{command}: known only when a task runs"
    async with _open_tools(settings, spec.image) as tools:
        if await tools.runtime.has_entrypoint(spec.image):
            return f"{command}: an argument of the entrypoint of this image"
        found = await find_command(tools, settings, spec)
        root = Path("/") if spec.image in HOST_ROOT or not tools.runtime.has_mounts else Path(spec.image)
        if found is None:  # no shell has looked for it
            if tools.runtime.engine or not await threads.run_sync(is_directory, root):
                return f"{command}: cannot be looked for in this image"
            paths = (path for path in _candidates(command) if _is_executable(path, root, settings))
            found = next(map(str, paths), "")
    if not found:
        raise NodeError(f"{command} is not there, as the container will see it")
    return found


def _candidates(command: str) -> Iterator[Path]:
    """Yield the paths that a command may have in an image. Its working directory is new and empty."""
    if command.startswith("/"):
        yield Path(command)
    elif "/" not in command:
        yield from (Path(directory, command) for directory in USUAL_PATH.split(":"))


def _is_executable(path: Path, root: Path, settings: Settings) -> bool:
    """Return whether a path is that of a program, as a container with this root sees it."""
    if any(path.is_relative_to(directory) for directory in settings.external_directories):
        return os.access(path, os.X_OK) and path.is_file()
    if is_own(path):
        return False
    outside = root / path.relative_to("/")
    # A link in an image may point below the image's own root, and cannot be followed from outside.
    return is_link(outside) or (os.access(outside, os.X_OK) and outside.is_file())
