"""Events that have failed and wait for their retry: unsettled, without a slot, delaying no other event."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from trio_util import wait_any

from trio_pilot.brokers import Delivery
from trio_pilot.errors import ContainerTimeoutError
from trio_pilot.pilot.task import EventFailed, Outcome

LONGEST_DELAY = 30.0  # seconds
MOST_BYTES = 64 * 2**20  # of bodies in memory; beyond that the events that have waited longest go back before their time


class DelayedRetries:
    """The events that wait for their retry.

    For the intake this is one more consumer: it never has a delivery, and it is not idle while events wait.
    """

    def __init__(self, first_delay: float) -> None:
        self.listening_since = -math.inf
        self._first_delay = first_delay
        self._held: dict[Delivery, trio.Event] = {}  # in order; the event cuts the delay short
        self._changed = trio.Event()
        self._cleared = trio.Event()

    async def take(self) -> None:
        """Return None: there is nothing to take."""
        await trio.lowlevel.checkpoint()

    async def wait(self) -> None:
        """Wait until the number of waiting events changes."""
        await self._changed.wait()

    async def is_idle(self) -> bool:
        """Return whether no event waits."""
        await trio.lowlevel.checkpoint()
        return not self._held

    @contextmanager
    def hold(self, delivery: Delivery) -> Iterator[None]:
        """Hold an event back until it is settled; meanwhile it does not count towards the prefetch of its queue."""
        self._held[delivery] = trio.Event()
        self._note_change()
        self._make_room()
        try:
            with delivery.source.held(delivery):
                yield
        finally:
            del self._held[delivery]
            self._note_change()

    async def delay(self, delivery: Delivery, outcome: Outcome) -> None:
        """Wait a random part of a delay that doubles with each attempt; not at all after `clear`, or to make room.

        An event that took too long goes back at once: another node may be faster.
        """
        if isinstance(outcome, EventFailed) and isinstance(outcome.error, ContainerTimeoutError):
            return
        most = min(self._first_delay * 2 ** min(delivery.attempt - 1, 30), LONGEST_DELAY)
        with trio.move_on_after(random.uniform(most / 2, most)):  # noqa: S311 -- jitter, not a secret
            await wait_any(self._cleared.wait, self._held[delivery].wait)

    def clear(self) -> None:
        """Cut all delays short, also those to come: this pilot will not take these events again."""
        self._cleared.set()

    def _make_room(self) -> None:
        size = sum(len(delivery.body) for delivery in self._held)
        for delivery, cut in self._held.items():
            if size <= MOST_BYTES:
                break
            cut.set()
            size -= len(delivery.body)

    def _note_change(self) -> None:
        self.listening_since = math.inf if self._held else trio.current_time()
        self._changed.set()
        self._changed = trio.Event()
