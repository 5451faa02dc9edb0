"""The pilot: the nursery tree, and the way of an event through it.

serve
 ├ signals          drain: take no more events, give the running tasks a deadline; at the second signal, now
 └ guardian         a process of its own: when the pilot is gone, however it went, the guardian removes what is left
   └ reporter       tells HTCondor how things are; the last state once everything below has ended
     └ data directory, runtime, brokers     outlive every task, so that a task being killed can still settle its event
       └ task runner    what tasks share: logs, late syncs, spare directories
         └ tasks          one child per event; its slot is free once its output is read, which is sent and settled then
           ├ init         sweep, brokers, image and init container; no event is taken before all are good
           └ intake       takes an event only when a slot is free for it, or to stage one where there is room for it
"""

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio

from trio_pilot.allocation.walltime import TimeLeft
from trio_pilot.brokers import Consumer, Settlement, Sink, Source
from trio_pilot.cleanup.client import Guardian
from trio_pilot.errors import ContainerLostError, NodeError, NoProcessError, TasksFailedError, names
from trio_pilot.files.data_directory import open_data_directory, root_in
from trio_pilot.log import LOGGER
from trio_pilot.pilot.container_runs import RunSpec, Tools, check_paths, open_hub, probe, run_init, task_files
from trio_pilot.pilot.deduplication import Deduplicator
from trio_pilot.pilot.drain import Drain
from trio_pilot.pilot.intake import Intake
from trio_pilot.pilot.retries import DelayedRetries
from trio_pilot.pilot.settling import Settler
from trio_pilot.pilot.slots import Slot, Slots
from trio_pilot.pilot.task import EventFailed, NodeFailed, Outcome, Success, Task
from trio_pilot.pilot.task_runner import TaskRunner, open_task_runner
from trio_pilot.pilot.tools import guarded
from trio_pilot.runtimes import Runtime
from trio_pilot.settings import Settings
from trio_pilot.status import State, Status


@dataclass(frozen=True)
class Parts:
    """What a pilot works with, still to be opened."""

    guardian: AbstractAsyncContextManager[Guardian]
    reporter: AbstractAsyncContextManager[None]
    runtime: AbstractAsyncContextManager[Runtime]
    sources: AbstractAsyncContextManager[list[Source]]
    sinks: AbstractAsyncContextManager[list[Sink]]


async def serve(settings: Settings, parts: Parts, signals: AsyncIterable[int], status: Status) -> int | None:
    """Take events from the sources until they stay empty, run them, send their outputs.

    Returns the number of the signal that ended it, if one did.

    Cancelled, it kills what runs, returns what is not done, and ends.

    Raises:
        ContainerRunError: the init container failed.
        TasksFailedError: some tasks failed; all else is done.
        NodeError: this machine cannot run tasks.
        BrokerError: the broker cannot be used.
    """
    drain = Drain(settings.grace, TimeLeft(settings, status.run_times))
    parent = settings.data_dir_parent_path_on_host
    data = open_data_directory(parent, settings.external_directories, keep=settings.keep_all_task_files)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain.heed, signals)
        async with parts.guardian as guardian, parts.reporter, _quarantine(settings, status, drain):
            guardian.watch("data", root_in(parent))
            with status.concluding(), data as data_directory:
                async with guarded(parts.runtime, guardian) as runtime, parts.sources as sources, parts.sinks as sinks:
                    status.runtime = runtime.name
                    tools = Tools(guardian, data_directory, runtime, sinks)
                    async with open_hub(tools, settings.task_image):
                        with drain.tasks:
                            async with open_task_runner(settings, tools, status.run_times) as runner:
                                await Pilot(settings, tools, runner, status, drain).work(sources)
        nursery.cancel_scope.cancel()
    if status.failed.value:
        raise TasksFailedError(status.failures())
    return drain.signal


class Pilot:
    """One pilot, from the first look at the node to the last settled event."""

    def __init__(self, settings: Settings, tools: Tools, runner: TaskRunner, status: Status, drain: Drain) -> None:
        self._settings = settings
        self._tools = tools
        self._runner = runner
        self._status = status
        self._drain = drain
        self._slots = Slots(settings.max_concurrent_tasks, settings.max_events_at_hand, status.slots)
        self._retries = DelayedRetries(settings.retry_delay)
        self._deduplicator = Deduplicator()
        self._settler = Settler(self._deduplicator, settings.settle_grace, settings.max_attempts)
        self._node_error: NodeError | None = None

    async def work(self, sources: Sequence[Source]) -> None:
        """Initialise, take events until there is an end, and wait for the last task."""
        async with trio.open_nursery() as tasks, self._runner.grace_period.open():
            with self._drain.listening:
                await self._initialise(sources)
                await self._take_events(sources, tasks)
            self._retries.clear()
            if self._drain.time_is_short():
                LOGGER.info("taking no more events: another task is not likely to end before this slot does")
            self._status.state.value = State.PENDING
            await self._slots.wait_until_unused()
        if self._node_error:
            raise self._node_error

    async def _initialise(self, sources: Sequence[Source]) -> None:
        """Run the init container, and look at brokers and node meanwhile: the first that fails ends the others."""
        self._status.state.value = State.INIT
        async with trio.open_nursery() as init:
            for ready in [source.ready for source in sources] + [sink.ready for sink in self._tools.sinks]:
                init.start_soon(ready)
            init.start_soon(self._tools.guardian.sweep)
            init.start_soon(self._try_the_node)
            if self._settings.init_image or self._settings.init_args:
                init.start_soon(run_init, self._tools, self._settings, self._runner.logs)

    async def _try_the_node(self) -> None:
        """Prepare the image of the tasks, and probe the node: one that is broken does not touch an event."""
        check_paths(self._tools, RunSpec.task(self._settings))
        await self._tools.runtime.prepare(self._settings.task_image, has_args=bool(self._settings.task_args))
        await probe(self._tools, self._settings)

    async def _take_events(self, sources: Sequence[Source], tasks: trio.Nursery) -> None:
        """Start a task for each event, until a free slot has waited in vain for as long as it should."""
        settings = self._settings
        self._status.state.value = State.AWAITING_FIRST
        idle_limit = settings.first_event_timeout
        new_files = partial(task_files, self._tools, settings)
        intake = Intake(self._slots, self._runner, self._deduplicator, self._settler, new_files)
        async with AsyncExitStack() as stack:
            consumers = deque[Consumer]([self._retries])
            for source in sources:
                listening = source.consume(settings.max_events_at_hand, settings.lease)
                consumers.append(await stack.enter_async_context(listening))
            slots, runtime = settings.max_concurrent_tasks, self._tools.runtime.name
            LOGGER.info("listening for events: %d slot(s), runtime %s", slots, runtime)
            while True:
                self._drain.watch_the_time()
                slot = await self._slots.room_for_one()
                task = await intake.next_task(slot, consumers, idle_limit)
                if task is None:
                    return
                slot.start_task()
                tasks.start_soon(self._run_task, task, slot)
                idle_limit = settings.timeout_queue_incoming
                self._status.state.value = State.TASKING

    async def _run_task(self, task: Task, slot: Slot) -> None:
        """Follow an event on its way: run it, settle it, and delay its retry where it failed.

        Cancelled, its container is killed and the event returned; but an output that is there is still sent, and then acked.
        """
        with slot, self._deduplicator.track(task):
            try:
                outcome = await self._runner.run(task, slot)
                settlement = await self._settler.settle_unless_tried_again(task, outcome)
            except BaseException:
                self._status.returned.value += not task.is_settled
                await self._settler.release(task)
                raise
            finally:
                await self._runner.discard(task)
            self._count(task, outcome)
            slot.release()
            if settlement is Settlement.REJECT:
                with self._retries.hold(task.delivery):
                    try:
                        await self._retries.delay(task.delivery, outcome)
                    finally:
                        await self._settler.settle(task, settlement)

    def _count(self, task: Task, outcome: Outcome) -> None:
        """Count an event that has ended; after a failure that says so, take no more."""
        if not isinstance(outcome, Success):
            LOGGER.warning("event %s, attempt %d: %s", task.delivery.message_id, task.delivery.attempt, outcome.error)
        match outcome:
            case Success():
                self._status.succeeded.value += 1
            case NodeFailed(error):
                self._status.returned.value += 1
                if not isinstance(error, ContainerLostError | NoProcessError):  # the engine will be back, or the process
                    self._node_error = error
                    self._drain.stop_listening()
            case EventFailed(error):
                self._status.fail(error)
                okay = names(error) & self._settings.okay_errors
                if self._settings.stop_listening_on_task_error and not okay:
                    self._drain.stop_listening()


@asynccontextmanager
async def _quarantine(settings: Settings, status: Status, drain: Drain) -> AsyncIterator[None]:
    """Hold the slot for a while after an error, so that a bad node, or one without a broker, does not eat job after job."""
    try:
        yield
    finally:
        if status.state.value is State.FATAL and settings.quarantine_time:
            LOGGER.warning("holding the slot for %g s after an error", settings.quarantine_time)
            with trio.move_on_after(settings.quarantine_time):
                await drain.begun.wait()
