"""Running containers to their ends: tasks, the init container, probes of the node; and removing their directories."""

import math
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from trio_pilot.brokers import Sink
from trio_pilot.cleanup.client import Guardian
from trio_pilot.errors import (
    ContainerOutOfMemoryError,
    ContainerRunError,
    ContainerTimeoutError,
    NodeError,
    PilotError,
)
from trio_pilot.files import disk_checks, task_directory
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.data_directory import DATA_DIRECTORY, HUB, TASK_IO, DataDirectory
from trio_pilot.files.error_summary import NO_REASON, error_summary, without_words
from trio_pilot.files.filesystem import is_directory, is_locked, locked_directories
from trio_pilot.files.log_copies import copy_logs
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.files.task_logs import TaskLogs
from trio_pilot.pilot.foreign_files import open_directories
from trio_pilot.pilot.running_clock import RunningClock
from trio_pilot.processes import threads
from trio_pilot.runtimes import NOT_FOUND_REASONS, Container, Engine, Exit, Limits, Mount, Runtime
from trio_pilot.settings import Settings

PROBE, PROBE_TIMEOUT = ("true",), 60.0  # seconds; a busy node needs a few
CLEARING_TIMEOUT = 10.0  # seconds to remove files of another user


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to run in a container: a task, or what initialises the node."""

    alias: str  # its name in error texts
    image: str
    args: tuple[str, ...]
    env: Mapping[str, str]
    timeout: float | None  # seconds
    limits: Limits
    dump: bool  # copy its stdout and stderr to those of the pilot even if it succeeds
    keep: bool  # keep its files
    reads_hub: bool = False  # it may not write to the data hub
    cpu_set: tuple[int, ...] = ()  # CPUs to run on; empty: any

    @classmethod
    def task(cls, settings: Settings) -> "RunSpec":
        """Return what is run for each event."""
        what = settings.task_image, settings.task_args, settings.task_env_json, settings.task_timeout
        how = settings.dump_task_output, settings.keep_all_task_files, settings.has_read_only_hub
        return cls("task", *what, settings.limits, *how)

    @classmethod
    def init(cls, settings: Settings) -> "RunSpec":
        """Return what is run before the first event."""
        what = settings.init_image, settings.init_args, settings.init_env_json, settings.init_timeout
        return cls("init-container", *what, settings.limits, settings.dump_task_output, settings.keep_all_task_files)


@dataclass(frozen=True, slots=True)
class Tools:
    """What containers are run with."""

    guardian: Guardian
    data_directory: DataDirectory
    runtime: Runtime
    sinks: Sequence[Sink]
    clock: RunningClock = field(default_factory=RunningClock)

    @property
    def any_user(self) -> bool:
        """Whether a container may run as another user than the pilot."""
        return self.runtime.engine is not None

    @property
    def engine(self) -> Engine | None:
        """The runtime, if its containers may be other users than the pilot."""
        return self.runtime if self.any_user and isinstance(self.runtime, Engine) else None

    @property
    def root_mode(self) -> int:
        """The mode of the directory of a task whose container may be any user."""
        is_passable = self.engine is not None and not self.engine.passes_closed_directories
        return task_directory.PASSABLE if is_passable else task_directory.CLOSED

    def make(self, files: TaskFiles) -> None:
        """Make the directory of a container. Blocks. Raises NodeError if it cannot be made."""
        task_directory.make(files, any_user=self.any_user, root_mode=self.root_mode)


def task_files(tools: Tools, settings: Settings) -> TaskFiles:
    """Make up a name for a task, and with it the paths of its files."""
    name = tools.data_directory.new_name()
    return TaskFiles(
        tools.data_directory.root / name,
        infile=f"infile-{name}{settings.infile_ext}",
        outfile=f"outfile-{name}{settings.outfile_ext}",
    )


async def run(tools: Tools, disk: BlockingCalls, logs: TaskLogs, spec: RunSpec, files: TaskFiles) -> None:
    """Run a container to its end. Time for which this process was stopped is not the container's.

    Raises:
        ContainerRunError: it ended with an error.
        ContainerTimeoutError: it did not end in time.
        ContainerOutOfMemoryError: it was killed because it used too much memory.
        NodeError: it could not be started.
    """
    timeout, ended, reason = spec.timeout or math.inf, None, None
    with logs.growing(files.stdout, files.stderr):
        try:
            with tools.clock.move_on_after(timeout):
                ended = await tools.runtime.run(container_for(tools, spec, files))
        finally:
            reason = await disk.finish(0, _conclude, logs, files, ended)
    failed = ended is None or ended.out_of_memory or ended.code != 0
    if spec.dump or failed:
        await logs.show(files, failed=failed)
    if ended is None:
        raise ContainerTimeoutError(f"{spec.alias} failed: [Timeout-Error] timed out after {timeout:g}s")
    if ended.out_of_memory:
        limit = f"more than {spec.limits.memory} bytes" if spec.limits.memory else "more than there was"
        raise ContainerOutOfMemoryError(f"{spec.alias} failed (exit code {ended.code}): out of memory: it used {limit}")
    if ended.code:
        raise ContainerRunError(f"{spec.alias} failed (exit code {ended.code}): {reason or NO_REASON}")


def _conclude(logs: TaskLogs, files: TaskFiles, ended: Exit | None) -> str:
    """Return the reason of a failure from the end of stderr, and only then cut logs that are too long."""
    reason = ""
    if ended and ended.code:
        reason = error_summary(files.stderr) or disk_checks.disk_fault(files.root)  # a full disk may be why stderr is empty
        reason = reason or without_words(ended.code)
    logs.finish(files.stdout, files.stderr)
    return reason


async def run_init(tools: Tools, settings: Settings, logs: TaskLogs) -> None:
    """Run the init container. Raises what `run` raises."""
    check_paths(tools, RunSpec.init(settings))
    async with _open_directory(tools, "init", settings.init_image, keep=settings.keep_all_task_files) as files:
        await tools.runtime.prepare(settings.init_image, has_args=bool(settings.init_args))
        await run(tools, BlockingCalls(), logs, RunSpec.init(settings), files)


async def run_once(tools: Tools, settings: Settings, data: Any) -> int:
    """Run the task for an event, show its stdout and stderr, and return its exit code. Its output is not sent.

    Raises:
        ContainerTimeoutError: it took too long.
        NodeError: it could not be run.
    """
    check_paths(tools, RunSpec.task(settings))
    files, disk, timeout = task_files(tools, settings), BlockingCalls(), settings.task_timeout or math.inf
    try:
        await disk.call(0, tools.make, files)
        await disk.call(math.inf, partial(task_directory.write_infile, any_user=tools.any_user), files, data)
        ended = None
        with tools.clock.move_on_after(timeout):
            ended = await tools.runtime.run(container_for(tools, replace(RunSpec.task(settings), dump=True), files))
        await threads.run_sync(copy_logs, files, abandon_on_cancel=True)
    finally:
        await remove(tools, disk, files, settings.task_image, keep=settings.keep_all_task_files)
    if ended is None:
        raise ContainerTimeoutError(f"task failed: [Timeout-Error] timed out after {timeout:g}s")
    return ended.code


async def probe(tools: Tools, settings: Settings, error: PilotError | None = None) -> None:
    """Check disk and clock, and run `true` in a container like that of a task; `error` is of the task that failed, if any.

    Raises:
        NodeError: the node is broken, or the image has neither `true` nor the task's own command.
    """
    await BlockingCalls().call(math.inf, _check_machine, tools.data_directory.root)
    async with _open_directory(tools, "probe", settings.task_image, keep=False) as files:
        spec = replace(RunSpec.task(settings), args=PROBE, env={})
        with trio.move_on_after(PROBE_TIMEOUT):
            ended = await tools.runtime.run(replace(container_for(tools, spec, files), without_entrypoint=True))
            reason = (error_summary(files.stderr) or without_words(ended.code)) if ended.code else ""
            is_missing = reason.endswith(NOT_FOUND_REASONS)
            command = next(iter(settings.task_args), None)  # none: that of the image
            if is_missing and command and str(error).endswith(tuple(f" {command}: {why}" for why in NOT_FOUND_REASONS)):
                raise NodeError(f"the image has neither `{command}` nor `{PROBE[0]}`")
            if ended.code and not is_missing:
                raise NodeError(f"`{PROBE[0]}` in a container fails (exit code {ended.code}): {reason}")
            return
        raise NodeError(f"`{PROBE[0]}` in a container takes more than {PROBE_TIMEOUT:g} s")


def _check_machine(root: Path) -> None:
    disk_checks.check_writable(root)
    disk_checks.clock_skew(root)


@asynccontextmanager
async def _open_directory(tools: Tools, what: str, image: str, *, keep: bool) -> AsyncIterator[TaskFiles]:
    """Make the directory of a container other than a task's, and remove it at the end."""
    name = f"{what}-{tools.data_directory.new_name().replace('-', '')}"
    files, disk = TaskFiles(tools.data_directory.root / name, infile="", outfile=""), BlockingCalls()
    try:
        await disk.call(0, tools.make, files)
        yield files
    finally:
        await remove(tools, disk, files, image, keep=keep)


async def remove(tools: Tools, disk: BlockingCalls, files: TaskFiles, image: str, *, keep: bool = False) -> None:
    """Remove the directory of a container, cancelled or not; of one to `keep`, what EWMS's own pilot would not keep.

    What other users have left in it is opened by the engine, or, if that fails, removed by another container.
    """
    remove_now = task_directory.keep_only_files if keep else task_directory.remove
    try_to_remove = task_directory.try_to_keep_only_files if keep else task_directory.try_to_remove
    if not (image and tools.any_user):
        await disk.finish(math.inf, remove_now, files)
    elif await disk.finish(math.inf, try_to_remove, files) is False:
        with trio.move_on_after(CLEARING_TIMEOUT, shield=True):
            with suppress(NodeError):
                if tools.engine:
                    await open_directories(tools.engine, image, files.root)
            if await disk.finish(math.inf, try_to_remove, files) is False:
                await _empty(tools, [files.scratch] if keep else [files.scratch, files.io], image)
        await disk.finish(math.inf, remove_now, files)


@asynccontextmanager
async def open_hub(tools: Tools, image: str) -> AsyncIterator[None]:
    """Let containers of any user write in the data hub. The last pilot removes what they have left in it at the end."""
    engine, data_directory = tools.engine, tools.data_directory
    if engine:
        data_directory.open_hub(None if engine.passes_closed_directories else engine.group)
    try:
        yield
    finally:
        with trio.move_on_after(CLEARING_TIMEOUT, shield=True), suppress(NodeError, OSError):
            if engine and await _has_locked(data_directory.data_hub):
                async with _open_directory(tools, "clearing", image, keep=False) as own:
                    await _take_hub(engine, image, data_directory, own.io)


async def _take_hub(engine: Engine, image: str, data_directory: DataDirectory, destination: Path) -> None:
    if is_locked(data_directory.data_hub):
        async with engine.open_foreign_files(image, data_directory.root) as foreign:
            await foreign.open_directories([data_directory.data_hub])
    await threads.run_sync(data_directory.take_hub, destination)


async def _has_locked(directory: Path) -> bool:
    locked: set[Path] = await threads.run_sync(locked_directories, directory)
    return bool(locked)


async def _empty(tools: Tools, directories: Iterable[Path], image: str) -> None:
    """Empty directories that a container could write to, with the rights of the image's user."""
    mounts = [Mount(path, f"/{DATA_DIRECTORY}/{path.name}", writable=True) for path in directories]
    there = tuple(mount for mount in mounts if is_directory(mount.source))
    async with _open_directory(tools, "clearing", "", keep=False) as own:
        args = "rm", "-rf", *(mount.target for mount in there)
        container = Container(
            own.root.name, image, args, {}, there, own.scratch, own.stdout, own.stderr, without_entrypoint=True
        )
        with suppress(NodeError):
            await tools.runtime.run(container)


INSIDE = (f"/{DATA_DIRECTORY}/{TASK_IO}", f"/{DATA_DIRECTORY}/{HUB}")  # where a container has its files mounted


def container_for(tools: Tools, spec: RunSpec, files: TaskFiles) -> Container:
    """Return the container that runs a spec with these files."""
    io, hub = INSIDE if tools.runtime.has_mounts else (files.io, tools.data_directory.data_hub)
    names = {"EWMS_TASK_DATA_HUB_DIR": f"{hub}"}
    if files.infile:
        names |= {"EWMS_TASK_INFILE": f"{io}/{files.infile}", "EWMS_TASK_OUTFILE": f"{io}/{files.outfile}"}
    return Container(
        name=files.root.name,
        image=spec.image,
        args=tuple(_filled_in(arg, names) for arg in spec.args),
        env={**spec.env, **names},
        mounts=_mounts(tools, files.io if files.infile else None, spec),
        scratch=files.scratch,
        stdout=files.stdout,
        stderr=files.stderr,
        limits=spec.limits,
        cpu_set=spec.cpu_set,
        needs_logs=spec.dump or spec.keep,
    )


def check_paths(tools: Tools, *specs: RunSpec) -> None:
    """Check that the paths of this machine can stand in the text of a shell, as an argument may have them in one.

    Where a path is a whole argument, it may be any.

    Raises:
        NodeError: A shell would read a path as something else: its output would be lost, or part of the path be executed.
    """
    root = str(tools.data_directory.root)
    in_texts = any(placeholder in arg != placeholder for spec in specs for arg in spec.args for placeholder in PLACEHOLDERS)
    if in_texts and not tools.runtime.has_mounts and not PLAIN_PATH.fullmatch(root):
        raise NodeError(
            f"the data directory {root!r} has a name that a shell would not take as it is, and without containers"
            " {{INFILE}}, {{OUTFILE}} and {{DATA_HUB}} are paths in it: name another directory in"
            " EWMS_PILOT_DATA_DIR_PARENT_PATH_ON_HOST, or pass them as arguments of their own"
        )


def _mounts(tools: Tools, io: Path | None, spec: RunSpec) -> tuple[Mount, ...]:
    """List the mounts of a container that reads and writes its files in `io`; the init container has none."""
    inside_io, inside_hub = INSIDE
    hub = Mount(tools.data_directory.data_hub, inside_hub, writable=not spec.reads_hub)
    own = [Mount(io, inside_io, writable=True)] if io else []
    return (hub, *own, *(Mount(path, str(path)) for path in tools.data_directory.external))


PLAIN_PATH = re.compile(r"[\w/.+@%:=,-]+")  # letters, digits and what has no meaning in any shell
PLACEHOLDERS = {
    "{{INFILE}}": "EWMS_TASK_INFILE",
    "{{IN_FILE}}": "EWMS_TASK_INFILE",
    "{{OUTFILE}}": "EWMS_TASK_OUTFILE",
    "{{OUT_FILE}}": "EWMS_TASK_OUTFILE",
    "{{DATA_HUB}}": "EWMS_TASK_DATA_HUB_DIR",
    "{{DATAHUB}}": "EWMS_TASK_DATA_HUB_DIR",
}


def _filled_in(arg: str, names: Mapping[str, str]) -> str:
    for placeholder, name in PLACEHOLDERS.items():
        if name in names:
            arg = arg.replace(placeholder, names[name])
    return arg
