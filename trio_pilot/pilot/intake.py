"""Taking events from their queues: one for each slot that comes free, and one ahead where there is room for it."""

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from trio_pilot.brokers import Consumer, Delivery, Settlement
from trio_pilot.brokers.listening import first_delivery, next_delivery
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.pilot.deduplication import Deduplicator
from trio_pilot.pilot.settling import Settler
from trio_pilot.pilot.slots import Slot, Slots
from trio_pilot.pilot.task import Task
from trio_pilot.pilot.task_runner import TaskRunner


@dataclass(frozen=True)
class Intake:
    """Takes events, each for a slot of its own."""

    slots: Slots
    runner: TaskRunner
    deduplicator: Deduplicator
    settler: Settler
    new_files: Callable[[], TaskFiles]  # makes up the names of the files of another task

    async def next_task(self, slot: Slot, consumers: deque[Consumer], idle_limit: float) -> Task | None:
        """Take the slot, and an event for it. Return None after `idle_limit` seconds in which no event has come."""
        ahead = None
        if self.slots.are_taken:
            await trio.lowlevel.checkpoint()  # the task that was just started goes first
            ahead = await self._new_task(partial(first_delivery, consumers))
        await self._take_slot(slot, ahead)
        if ahead:
            if not ahead.is_lost:
                return ahead
            await self.runner.discard(ahead)
        return await self._new_task(partial(next_delivery, consumers, idle_limit))

    async def _take_slot(self, slot: Slot, ahead: Task | None) -> None:
        """Stage the event ahead while it waits for its slot. If that does not come, return the event."""
        try:
            if ahead:
                await self.runner.stage_ahead(ahead)
            await slot.take()
            await self.runner.node_health.wait_until_trusted()
        except BaseException:
            if ahead:
                await self.runner.discard(ahead)
                await self.settler.release(ahead)
            raise

    async def _new_task(self, take: Callable[[], Awaitable[Delivery | None]]) -> Task | None:
        """Take the next event that is neither run nor done by this pilot already."""
        while delivery := await take():
            if self.deduplicator.adopt(delivery):
                continue  # the running task settles it by this delivery
            task = Task(delivery, self.new_files())
            if not self.deduplicator.was_done(delivery):
                return task
            await self.settler.settle(task, Settlement.ACK)
        return None
