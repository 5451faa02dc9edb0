"""The pilot: the nursery tree, and what flows through it.

serve
 ├ signals          drain: take no more events, give the running tasks a deadline; at the second one, now
 └ guardian         a process of its own: when the pilot is gone, however it went, it removes what is left
   └ reporter       tells HTCondor how things are; the last state when all below has ended
     └ data_directory, runtime, brokers     outlive every task, so that a task being killed can still settle
       └ tasks          one child per event; its slot is free as soon as its output is read, which is sent and settled then
         ├ init         sweep, broker, image and init container; no event is taken before all are good
         └ consumers    take an event only when a slot is free for it, or to stage one where there is room for it
"""

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager, closing
from functools import partial

import trio

from trio_pilot.allocation.walltime import TimeLeft
from trio_pilot.brokers import Consumer, Delivery, Sink, Source
from trio_pilot.brokers.listening import first_delivery, next_delivery
from trio_pilot.cleanup.client import Guardian
from trio_pilot.errors import BrokerError, ContainerLostError, NodeError, PilotError, TasksFailedError, names
from trio_pilot.files.data_directory import DataDirectory, open_data_directory, root_in
from trio_pilot.grace_period import GracePeriod
from trio_pilot.log import LOGGER
from trio_pilot.pilot.container_runs import Tools, probe, run_init
from trio_pilot.pilot.deduplication import Life
from trio_pilot.pilot.drain import Drain
from trio_pilot.pilot.slots import Slot, Slots
from trio_pilot.pilot.task_runner import Event, TaskRunner
from trio_pilot.runtimes import Runtime
from trio_pilot.settings import Settings
from trio_pilot.status import State, Status


async def serve(
    settings: Settings,
    guard: AbstractAsyncContextManager[Guardian],
    reporter: AbstractAsyncContextManager[None],
    runtime: AbstractAsyncContextManager[Runtime],
    sources: AbstractAsyncContextManager[list[Source]],
    sinks: AbstractAsyncContextManager[list[Sink]],
    signals: AsyncIterable[int],
    status: Status,
) -> int | None:
    """Take events from the sources until they stay empty, run them, send their outputs.

    Gives the number of the signal that ended it, if one did.

    Cancelled, it kills what runs, returns what is not done, and ends.

    Raises:
        ContainerRunError: the init container failed.
        TasksFailedError: some tasks failed; all else is done.
        NodeError: this machine cannot run tasks.
        BrokerError: the broker cannot be used.
    """
    drain = Drain(settings.grace, TimeLeft(settings, status.run_times))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain.heed, signals)
        async with guard as guardian, reporter, _quarantine(settings, status, drain):
            guardian.watch("data", root_in(settings.data_dir_parent_path_on_host))
            with status.concluding(), _open_data_directory(settings) as data_directory:
                async with seen_to(runtime, guardian) as containers, sources as incoming, sinks as outgoing:
                    status.runtime = containers.name
                    tools = Tools(guardian, data_directory, containers, outgoing)
                    await Pilot(settings, tools, incoming, status, drain).work()
        nursery.cancel_scope.cancel()
    if status.failed.value:
        raise TasksFailedError(status.failures())
    return drain.signal


@asynccontextmanager
async def seen_to(opening: AbstractAsyncContextManager[Runtime], guard: Guardian) -> AsyncIterator[Runtime]:
    """Open a runtime, and have the guard see to what it may leave elsewhere than below this pilot."""
    runtime: Runtime | None = None
    try:
        async with opening as runtime:
            if runtime.engine:
                guard.watch("engine", runtime.engine)
            if runtime.images:
                guard.watch("images", runtime.images)
            yield runtime
    finally:
        if runtime and runtime.leaves_some:
            guard.outlive_us()


def _open_data_directory(settings: Settings) -> AbstractContextManager[DataDirectory]:
    parent, external = settings.data_dir_parent_path_on_host, settings.external_directories
    return open_data_directory(parent, external, keep=settings.keep_all_task_files)


class Pilot:
    """One pilot with all that it works with."""

    def __init__(
        self,
        settings: Settings,
        tools: Tools,
        sources: Sequence[Source],
        status: Status,
        drain: Drain,
    ) -> None:
        self._settings = settings
        self._tools = tools
        self._sources = sources
        self._status = status
        self._drain = drain
        self._slots = Slots(settings.max_concurrent_tasks, settings.most_at_hand, status)
        self._shelter = GracePeriod(settings.settle_grace)
        self._worker = TaskRunner(settings, tools, status, self._shelter)
        self._node_error: NodeError | None = None

    async def work(self) -> None:
        """Initialise, take events until there is an end, and wait for the last task."""
        with closing(self._worker), self._drain.tasks:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(self._shelter.watch)
                tasks.start_soon(self._worker.outputs.watch)
                tasks.start_soon(self._worker.unsent.watch)
                with self._drain.listening:
                    await self._initialise()
                    await self._take_events(tasks)
                self._worker.bench.clear()
                if self._drain.time_is_short():
                    LOGGER.info("taking no more events: another task is not likely to end before this slot does")
                self._status.state.value = State.PENDING
                await self._status.at_hand.wait_value(0)
                self._shelter.close()
                self._worker.outputs.close()
                self._worker.unsent.close()
        if self._node_error:
            raise self._node_error

    async def _initialise(self) -> None:
        """Run the init container, and look at brokers and node meanwhile: the first that fails ends the others."""
        self._status.state.value = State.INIT
        async with trio.open_nursery() as init:
            for ready in [queue.ready for queue in self._sources] + [queue.ready for queue in self._tools.sinks]:
                init.start_soon(ready)
            init.start_soon(self._tools.guardian.sweep)
            init.start_soon(self._try_the_node)
            if self._settings.init_image or self._settings.init_args:
                init.start_soon(run_init, self._tools, self._settings, self._worker.outputs)

    async def _try_the_node(self) -> None:
        """Get the image of the tasks ready, and run next to nothing in it: a node that cannot is not to touch an event."""
        await self._tools.runtime.prepare(self._settings.task_image)
        await probe(self._tools, self._settings)

    async def _take_events(self, tasks: trio.Nursery) -> None:
        """Start a task for each event, until a free slot has waited in vain for as long as it should."""
        self._status.state.value = State.AWAITING_FIRST
        idle_limit = self._settings.first_event_timeout
        async with AsyncExitStack() as stack:
            consumers = deque[Consumer]([self._worker.bench])
            for source in self._sources:
                listening = source.consume(self._settings.most_at_hand, self._settings.lease)
                consumers.append(await stack.enter_async_context(listening))
            slots, runtime = self._settings.max_concurrent_tasks, self._tools.runtime.name
            LOGGER.info("listening for events: %d slot(s), runtime %s", slots, runtime)
            while True:
                self._drain.watch_the_time()
                slot = await self._slots.room_for_one()
                event = await self._event_for(slot, consumers, idle_limit)
                if event is None:
                    return
                slot.start_task()
                tasks.start_soon(self._run_task, event, slot)
                idle_limit = self._settings.timeout_queue_incoming
                self._status.state.value = State.TASKING

    async def _event_for(self, slot: Slot, consumers: deque[Consumer], idle_limit: float) -> Event | None:
        """Take the slot, and an event for it; None after `idle_limit` seconds in which none has come."""
        ahead = None
        if self._slots.are_taken:
            await trio.lowlevel.checkpoint()  # the task that was just started goes first
            ahead = await self._next_event(partial(first_delivery, consumers))
        async with self._worker.staged_ahead(ahead):
            await slot.take()
            await self._worker.canary.calm()
        if ahead:
            if not ahead.is_lost:
                return ahead
            await self._worker.discard(ahead)
        return await self._next_event(partial(next_delivery, consumers, idle_limit))

    async def _next_event(self, take: Callable[[], Awaitable[Delivery | None]]) -> Event | None:
        """Take the next event that is neither run nor done here already."""
        while delivery := await take():
            if not await self._worker.knows(delivery):
                return self._worker.event(delivery)
        return None

    async def _run_task(self, event: Event, slot: Slot) -> None:
        with self._worker.life(event.delivery) as life:
            error = await self._use(slot, life, event)
            if error and not life.is_settled:
                await self._worker.give_back(life, error)

    async def _use(self, slot: Slot, life: Life, event: Event) -> PilotError | None:
        try:
            error = await self._worker.live(life, event, slot)
            self._count(life.delivery, error)
            return error
        except trio.Cancelled:
            self._status.returned.value += 1
            raise
        finally:
            slot.leave()

    def _count(self, delivery: Delivery, error: PilotError | None) -> None:
        if error is None:
            self._status.succeeded.value += 1
            return
        LOGGER.warning("event %s, attempt %d: %s", delivery.message_id, delivery.attempt, error)
        if isinstance(error, NodeError):
            self._status.returned.value += 1
            if not isinstance(error, ContainerLostError):  # the engine is back, or will be
                self._node_error = error
                self._drain.stop_listening()
            return
        self._status.fail(error)
        okay = names(error) & self._settings.okay_errors
        if self._settings.stop_listening_on_task_error and not okay:
            self._drain.stop_listening()


@asynccontextmanager
async def _quarantine(settings: Settings, status: Status, drain: Drain) -> AsyncIterator[None]:
    """Hold the slot for a while after an error, so that a bad node does not eat job after job."""
    try:
        yield
    finally:
        is_brokers = isinstance(status.error.value, BrokerError)
        if status.state.value is State.FATAL and not is_brokers and settings.quarantine_time:
            LOGGER.warning("holding the slot for %g s after an error", settings.quarantine_time)
            with trio.move_on_after(settings.quarantine_time):
                await drain.begun.wait()
