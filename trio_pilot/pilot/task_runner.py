"""Running tasks: stage the event, run its container, send its output."""

import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from trio_pilot.allocation.cpu_sets import CpuSets
from trio_pilot.errors import (
    ContainerOutOfMemoryError,
    ContainerRunError,
    ContainerTimeoutError,
    EventError,
    NodeError,
    NoProcessError,
    OutfileError,
)
from trio_pilot.files import task_directory
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.directory_pool import DirectoryPool
from trio_pilot.files.hub_additions import HubAdditions
from trio_pilot.files.late_sync import LateSync
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.files.task_logs import TaskLogs
from trio_pilot.grace_period import GracePeriod
from trio_pilot.log import LOGGER
from trio_pilot.pilot.container_runs import RunSpec, Tools, probe, remove, run
from trio_pilot.pilot.foreign_files import fetch_outfile
from trio_pilot.pilot.node_health import NodeHealth
from trio_pilot.pilot.slots import Slot
from trio_pilot.pilot.task import EventFailed, NodeFailed, Outcome, Success, Task
from trio_pilot.pilot.task_lines import TaskLines
from trio_pilot.processes.children import Children
from trio_pilot.settings import Settings
from trio_pilot.status import RunTimes
from trio_pilot.wire import WIRES, Message

NO_PROCESS_DELAY = 1.0  # seconds for which an event is held that no process can be started for, lest it be taken at once


@asynccontextmanager
async def open_task_runner(settings: Settings, tools: Tools, run_times: RunTimes) -> AsyncIterator["TaskRunner"]:
    """Open what all tasks of a pilot share; at the end, stop what works in the background and remove spare directories."""
    runner = TaskRunner(settings, tools, run_times)
    try:
        async with trio.open_nursery() as background:
            background.start_soon(runner.logs.watch)
            background.start_soon(runner.late_sync.watch)
            background.start_soon(tools.clock.keep)
            yield runner
            background.cancel_scope.cancel()
    finally:
        runner.directory_pool.close()


class TaskRunner:
    """Runs tasks, and knows what they share: their logs, directories and CPUs, and the health of the node."""

    def __init__(self, settings: Settings, tools: Tools, run_times: RunTimes) -> None:
        blocking = BlockingCalls()
        self.logs = TaskLogs(settings.max_output, blocking)
        self.late_sync = LateSync()
        self.directory_pool = DirectoryPool(any_user=tools.any_user, root_mode=tools.root_mode)
        self.grace_period = GracePeriod(settings.settle_grace)
        self.node_health = NodeHealth(partial(probe, tools, settings))
        self._settings = settings
        self._tools = tools
        self._run_times = run_times
        self._blocking = blocking
        self._spec = RunSpec.task(settings)
        self._wire = WIRES[settings.wire]
        self._task_lines = TaskLines()
        self._hub_additions = HubAdditions(tools.data_directory.data_hub)
        self._tasks_running = 0
        self._cpu_sets = CpuSets(settings.max_concurrent_tasks if settings.pin_tasks else 0, settings.cpus_per_task or 1)

    async def run(self, task: Task, slot: Slot) -> Outcome:
        """Stage an event, run its container, and send its output. The slot is free for another once the output is read.

        Cancelled, the container is killed; but an output that is there is sent, within the grace period.

        Raises:
            BrokerError: the output cannot be sent.
        """
        try:
            headers = await self._stage(task)
            try:
                await self._run_container(task)
            except (ContainerTimeoutError, ContainerOutOfMemoryError):
                raise  # limits that the user has set: not the node's fault
            except ContainerRunError as error:
                await self.node_health.check(error, partial(self._make_room, task), self._have_filled_the_disk)
                raise
            await self._send_output(task, headers, slot)
        except EventError as error:
            return EventFailed(error)
        except NodeError as error:
            if isinstance(error, NoProcessError):
                await trio.sleep(NO_PROCESS_DELAY)
            return NodeFailed(error)
        return Success()

    async def stage_ahead(self, task: Task) -> None:
        """Stage an event that waits for its slot, if that is quick: a slot that comes free does not wait for it.

        What fails here will fail again in its turn.
        """
        if self._blocking.is_quick(self._wire.size(task.delivery.body)):
            try:
                await self._stage(task)
            except (EventError, NodeError):
                await self._blocking.finish(math.inf, task_directory.remove, task.files)

    async def discard(self, task: Task) -> None:
        """Remove the files of a task, or keep its directory for another task; keep its files where the user wants that.

        Without containers, a process of any task that has ended may still have the directory, and its logs, open.
        """
        files, keep = task.files, self._settings.keep_all_task_files
        is_in_use = not self._tools.runtime.has_mounts and bool(Children.strays())
        if keep or is_in_use or not await self._taken_back(files):
            await remove(self._tools, self._blocking, files, self._spec.image, keep=keep)

    async def _taken_back(self, files: TaskFiles) -> bool:
        size = task_directory.outfile_size(files)
        return await self._blocking.finish(size, self.directory_pool.take_back, files) or False

    async def _stage(self, task: Task) -> Mapping[str, Any]:
        if task.headers is None:
            task.headers = await self._blocking.call(self._wire.size(task.delivery.body), self._make, task)
        return task.headers

    async def _run_container(self, task: Task) -> None:
        if not self._hub_additions.are_watched:  # before the first task, and after the init container
            await self._blocking.call(0, self._hub_additions.remember)
        started = self._tools.clock.time()
        with self._running(), self._cpu_sets.lend() as cpus, self._task_lines.around(task.delivery):
            spec = replace(self._spec, cpu_set=cpus) if cpus else self._spec
            await run(self._tools, self._blocking, self.logs, spec, task.files)
        self._run_times.add(self._tools.clock.time() - started)

    async def _send_output(self, task: Task, headers: Mapping[str, Any], slot: Slot) -> None:
        files = task.files
        with self.grace_period.shield() as scope:
            size = task_directory.outfile_size(files)
            output = await self._read_output(size, headers, files)
            await slot.hand_over()
            if output is not None:
                body = await self._blocking.call(size, self._wire.encode, output)
                del output  # a large one is not to be in memory twice while it is sent
                with self.late_sync.sending(files.outfile_path):
                    for sink in self._tools.sinks:
                        await sink.send(body, task.delivery.message_id)
        if scope.cancelled_caught:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def _read_output(self, size: int, headers: Mapping[str, Any], files: TaskFiles) -> Message | None:
        """Read the output file; if it is another user's, by way of the engine."""
        try:
            return await self._blocking.call(size, self._read, headers, files)
        except OutfileError as error:
            engine = self._tools.engine
            if engine is None or not isinstance(error.__cause__, PermissionError):
                raise
        await fetch_outfile(engine, self._spec.image, files, self._settings.max_payload)
        return await self._blocking.call(math.inf, self._read, headers, files)

    def _make(self, task: Task) -> Mapping[str, Any]:
        message = self._wire.decode(task.delivery.body, self._settings.max_payload)
        self.directory_pool.make(task.files)
        task_directory.write_infile(task.files, message.data, any_user=self._tools.any_user)
        return message.headers

    def _read(self, headers: Mapping[str, Any], files: TaskFiles) -> Message | None:
        content = task_directory.read_outfile(files, self._settings.max_payload)
        if content is None or self._settings.wire == "raw":  # as it is
            return None if content is None else Message(content)
        is_json = self._settings.outfile_ext == ".json"
        return Message(task_directory.parse_outfile(content, is_json=is_json), headers)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._tasks_running += 1
        try:
            yield
        finally:
            self._tasks_running -= 1

    async def _make_room(self, task: Task) -> None:
        """Remove the files of a failed task, for they may fill the disk, and then what is in the data hub by tasks.

        What is in the data hub is removed if the disk is full, and no other task or pilot uses it.
        """
        await self._remove_files(task)
        if not await self._have_filled_the_disk() or self._tasks_running or self._tools.data_directory.is_used_by_others():
            return
        LOGGER.warning("the disk is full: what tasks have added to the data hub is removed")
        await self._blocking.call(math.inf, self._hub_additions.remove)

    async def _have_filled_the_disk(self) -> bool:
        return await self._blocking.call(0, self._hub_additions.have_filled_the_disk)

    async def _remove_files(self, task: Task) -> None:
        keep = self._settings.keep_all_task_files
        await remove(self._tools, self._blocking, task.files, self._spec.image, keep=keep)
