"""Slots, in which tasks run, and room for the events at hand.

A slot is a task's until its output is read: what is left to do then, to send it and to settle its event, needs no slot, and
the next task may run meanwhile. A task that has failed keeps it until that is counted: it may be a reason to take no more.

An event is at hand until it is settled. There is room for as many as the broker was asked to have unsettled at once. When
that is used up, by outputs that a broker does not confirm, a slot waits for room and not for an event: else it would take
the queue for empty.
"""

import trio

from trio_pilot.status import Status


class Slots:
    """All slots of a pilot, and the room for the events at hand."""

    def __init__(self, slots: int, most_at_hand: int, status: Status) -> None:
        self.free = trio.CapacityLimiter(slots)
        self.room = trio.CapacityLimiter(most_at_hand)
        self.status = status

    async def one(self) -> "Slot":
        """Wait for room for another event, and for a slot that is free; take both."""
        slot = Slot(self)
        await self.room.acquire_on_behalf_of(slot)
        await self.free.acquire_on_behalf_of(slot)
        return slot


class Slot:
    """A slot, and the room for one event."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._is_taken = True

    def start_task(self) -> None:
        """Begin with an event."""
        self._slots.status.start_task()

    def end_task(self) -> None:
        """Let the next task have the slot, if that was not done before."""
        if self._is_taken:
            self._is_taken = False
            self._slots.status.end_task()
            self._slots.free.release_on_behalf_of(self)

    def leave(self) -> None:
        """Be done with the event: there is room for another."""
        self.end_task()
        self._slots.status.leave_event()
        self._slots.room.release_on_behalf_of(self)
