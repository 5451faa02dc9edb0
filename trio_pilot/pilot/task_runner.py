"""One event's life: stage, run, publish, settle."""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from trio_pilot.allocation.cpu_sets import CpuSets
from trio_pilot.brokers import Delivery, Settlement
from trio_pilot.errors import (
    BrokerError,
    ContainerOutOfMemoryError,
    ContainerRunError,
    ContainerTimeoutError,
    DeliveryLostError,
    DeliveryReplacedError,
    EventError,
    NodeError,
    PilotError,
)
from trio_pilot.files import task_directory
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.directory_pool import DirectoryPool
from trio_pilot.files.late_sync import LateSync
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.files.task_logs import TaskLogs
from trio_pilot.grace_period import GracePeriod
from trio_pilot.log import LOGGER
from trio_pilot.pilot.container_runs import RunSpec, Tools, probe, remove, run, task_files
from trio_pilot.pilot.deduplication import Deduplicator, Life
from trio_pilot.pilot.node_health import NodeHealth
from trio_pilot.pilot.retries import DelayedRetries
from trio_pilot.pilot.slots import Slot
from trio_pilot.settings import Settings
from trio_pilot.status import Status
from trio_pilot.wire import WIRES, Message


@dataclass(slots=True)
class Event:
    """An event that was taken, and its files; once they are made, what goes over to its output."""

    delivery: Delivery
    files: TaskFiles
    headers: Mapping[str, Any] | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the broker has it again, as far as is known."""
        return self.delivery.source.has_lost(self.delivery)


class TaskRunner:
    """What all tasks of a pilot have in common."""

    def __init__(self, settings: Settings, tools: Tools, status: Status, shelter: GracePeriod) -> None:
        self._settings = settings
        self._tools = tools
        self._status = status
        self._shelter = shelter
        self._order = RunSpec.task(settings)
        self._wire = WIRES[settings.wire]
        self._disk = BlockingCalls()
        self.outputs = TaskLogs(settings.max_output, self._disk)
        self.unsent = LateSync()
        self._pins = CpuSets(settings.max_concurrent_tasks if settings.pin_tasks else 0, settings.cpus_per_task or 1)
        self._spares = DirectoryPool(any_user=tools.any_user)
        self._ledger = Deduplicator()
        self.canary = NodeHealth(partial(probe, tools, settings))
        self.bench = DelayedRetries(settings.retry_delay)

    def life(self, delivery: Delivery) -> AbstractContextManager[Life]:
        """Be known to be at an event, until it is settled."""
        return self._ledger.life(delivery)

    def event(self, delivery: Delivery) -> Event:
        """Give an event its files, which are still to be made."""
        return Event(delivery, task_files(self._tools, self._settings))

    @asynccontextmanager
    async def staged_ahead(self, event: Event | None) -> AsyncIterator[None]:
        """Have an event staged, if there is one, while it waits for its slot; if that is not to come, it is returned."""
        if event is None:
            yield
            return
        try:
            if self._disk.is_quick(self._wire.size(event.delivery.body)):  # a slot that comes free is not to wait for it
                await self._stage_if_it_can_be(event)
            yield
        except BaseException:
            await self.discard(event)
            await self._release(Life(event.delivery))
            raise

    async def live(self, life: Life, event: Event, slot: Slot) -> PilotError | None:
        """Live one event's life; give the error that it, or the node, ended with.

        It is settled in the end, unless it is to be tried again: then `give_back` is for the caller to call.

        The slot is free for another as soon as the output is read; if there is none, it is for the caller to free.

        Cancelled, the container is killed and the event returned; but an output that is there is still sent.
        """
        try:
            return await self._settled(life, event, slot)
        finally:
            await self.discard(event)

    async def give_back(self, life: Life, error: PilotError) -> None:
        """Return an event that failed, after a delay; one that took too long at once, since another node may be faster."""
        with self.bench.seat(life.delivery):
            try:
                if not isinstance(error, ContainerTimeoutError):
                    await self.bench.sit_out(life.delivery.attempt)
            finally:
                await self._settle(life, Settlement.REJECT)

    async def knows(self, delivery: Delivery) -> bool:
        """Tell whether an event that comes again is run, or was done, here already: it is, or will be, settled by that."""
        if self._ledger.adopt(delivery):
            return True
        if self._ledger.was_done(delivery):
            await self._settle(Life(delivery), Settlement.ACK)
            return True
        return False

    async def discard(self, event: Event) -> None:
        """Remove its files, or keep them for another event."""
        files = event.files
        if self._settings.keep_all_task_files:
            return
        if not await self._disk.finish(task_directory.outfile_size(files), self._spares.take_back, files):
            await remove(self._tools, self._disk, files, self._order.image)

    def close(self) -> None:
        """Remove the directories that no task will need any more."""
        self._spares.close()

    async def _settled(self, life: Life, event: Event, slot: Slot) -> PilotError | None:
        try:
            await self._judged(event, slot)
        except (EventError, NodeError) as error:
            settlement = self._by_cause(error, life.delivery)
            if settlement is not Settlement.REJECT:
                await self._settle(life, settlement, error)
            return error
        except BaseException:
            await self._release(life)
            raise
        await self._settle(life, Settlement.ACK)
        return None

    async def _judged(self, event: Event, slot: Slot) -> None:
        """Work, and tell a failure of the node from one of the event's."""
        try:
            await self._work(event, slot)
        except (ContainerTimeoutError, ContainerOutOfMemoryError):
            raise  # limits that the user has set
        except ContainerRunError as error:
            await self.canary.judge(error, partial(self._remove, event.files))  # for it may have filled the disk
            raise

    async def _work(self, event: Event, slot: Slot) -> None:
        files, headers = event.files, await self._stage(event)
        started = trio.current_time()
        with self._pins.lent() as cpus:
            order = replace(self._order, pinned=cpus) if cpus else self._order
            await run(self._tools, self._disk, self.outputs, order, files)
        self._status.run_times.add(trio.current_time() - started)
        with self._shelter.linger() as scope:
            size = task_directory.outfile_size(files)
            output = await self._disk.call(size, self._read, headers, files)
            await slot.hand_over()
            if output is not None:
                body = await self._disk.call(size, self._wire.encode, output)
                del output  # a large one is not to be in memory twice while it is sent
                with self.unsent.sending(files.outfile_path):
                    for sink in self._tools.sinks:
                        await sink.send(body, event.delivery.message_id)
        if scope.cancelled_caught:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def _stage_if_it_can_be(self, event: Event) -> None:
        try:
            await self._stage(event)
        except (EventError, NodeError):  # as it will once more, when its turn has come
            await self._disk.finish(math.inf, task_directory.remove, event.files)

    async def _stage(self, event: Event) -> Mapping[str, Any]:
        if event.headers is None:
            event.headers = await self._disk.call(self._wire.size(event.delivery.body), self._make, event)
        return event.headers

    def _make(self, event: Event) -> Mapping[str, Any]:
        message = self._wire.decode(event.delivery.body, self._settings.max_payload)
        self._spares.make(event.files)
        task_directory.write_infile(event.files, message.data)
        return message.headers

    def _read(self, headers: Mapping[str, Any], files: TaskFiles) -> Message | None:
        content = task_directory.read_outfile(files, self._settings.max_payload)
        if content is None or self._settings.wire == "raw":  # as it is
            return None if content is None else Message(content)
        is_json = self._settings.outfile_ext == ".json"
        return Message(task_directory.parse_outfile(content, is_json=is_json), headers)

    def _by_cause(self, error: PilotError, delivery: Delivery) -> Settlement:
        if isinstance(error, NodeError):
            return Settlement.RELEASE
        return Settlement.DEAD_LETTER if delivery.attempt >= self._settings.max_attempts else Settlement.REJECT

    async def _remove(self, files: TaskFiles) -> None:
        if not self._settings.keep_all_task_files:
            await remove(self._tools, self._disk, files, self._order.image)

    async def _settle(self, life: Life, settlement: Settlement, cause: PilotError | None = None) -> None:
        with trio.move_on_after(self._settings.settle_grace, shield=True) as patience:
            while not await self._try_to_settle(life, life.delivery, settlement, cause):
                pass  # it has come again meanwhile
        life.is_settled = True
        if patience.cancelled_caught:
            LOGGER.warning("event %s not settled (%s) in time", life.delivery.message_id, settlement.value)

    async def _try_to_settle(self, life: Life, delivery: Delivery, settlement: Settlement, cause: PilotError | None) -> bool:
        said = (str(cause), type(cause).__name__) if cause else ()
        try:
            await delivery.source.settle(delivery, settlement, *said)
        except DeliveryLostError as error:
            if life.delivery is not delivery:
                return False
            LOGGER.warning("not settled (%s): %s", settlement.value, error)
            if settlement is Settlement.ACK or isinstance(error, DeliveryReplacedError):
                self._ledger.done(delivery)
        else:
            if settlement is Settlement.ACK:
                self._ledger.acked(delivery)
        return True

    async def _release(self, life: Life) -> None:
        """Return an event on the way out. The way out has its own error; a second would hide it."""
        try:
            await self._settle(life, Settlement.RELEASE)
        except BrokerError as error:
            LOGGER.warning("event %s not returned: %s", life.delivery.message_id, error)
