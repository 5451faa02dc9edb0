"""Events that have failed and wait for their retry: unsettled, without a slot, delaying no other event."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from trio_pilot.brokers import Delivery
from trio_pilot.errors import ContainerTimeoutError
from trio_pilot.pilot.task import EventFailed, Outcome

LONGEST_DELAY = 30.0  # seconds


class DelayedRetries:
    """The events that wait for their retry.

    For the intake this is one more consumer: it never has a delivery, and it is not idle while events wait.
    """

    def __init__(self, first_delay: float) -> None:
        self.listening_since = -math.inf
        self._first_delay = first_delay
        self._held = 0
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
        self._count(1)
        try:
            with delivery.source.held(delivery):
                yield
        finally:
            self._count(-1)

    async def delay(self, attempt: int, outcome: Outcome) -> None:
        """Wait a random part of a delay that doubles with each attempt; not at all after `clear`.

        An event that took too long goes back at once: another node may be faster.
        """
        if isinstance(outcome, EventFailed) and isinstance(outcome.error, ContainerTimeoutError):
            return
        most = min(self._first_delay * 2 ** min(attempt - 1, 30), LONGEST_DELAY)
        with trio.move_on_after(random.uniform(most / 2, most)):  # noqa: S311 -- jitter, not a secret
            await self._cleared.wait()

    def clear(self) -> None:
        """Cut all delays short, also those to come: this pilot will not take these events again."""
        self._cleared.set()

    def _count(self, change: int) -> None:
        self._held += change
        self.listening_since = math.inf if self._held else trio.current_time()
        self._changed.set()
        self._changed = trio.Event()
