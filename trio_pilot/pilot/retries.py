"""Where events that have failed sit out a delay before they are tried again: unsettled, with no slot, in nobody's way."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from trio_pilot.brokers import Delivery

LONGEST_DELAY = 30.0  # seconds


class DelayedRetries:
    """The events that sit there. To who takes events it is one more consumer: with none, and not idle while they sit."""

    def __init__(self, first_delay: float) -> None:
        self.listening_since = -math.inf
        self._first_delay = first_delay
        self._sitting = 0
        self._changed = trio.Event()
        self._cleared = trio.Event()

    async def take(self) -> None:
        """Have nothing to take."""
        await trio.lowlevel.checkpoint()

    async def wait(self) -> None:
        """Wait until the first has sat down, or the last has left."""
        await self._changed.wait()

    async def is_idle(self) -> bool:
        """Tell whether nobody sits there."""
        await trio.lowlevel.checkpoint()
        return not self._sitting

    @contextmanager
    def seat(self, delivery: Delivery) -> Iterator[None]:
        """Have an event on the bench until it is settled."""
        self._count(1)
        try:
            with delivery.source.held(delivery):
                yield
        finally:
            self._count(-1)

    async def sit_out(self, attempt: int) -> None:
        """Wait for a random part of a delay that doubles with each attempt, or until the bench is cleared."""
        most = min(self._first_delay * 2 ** min(attempt - 1, 30), LONGEST_DELAY)
        with trio.move_on_after(random.uniform(most / 2, most)):  # noqa: S311 -- jitter, not a secret
            await self._cleared.wait()

    def clear(self) -> None:
        """Let all go back at once, those to come as well: there is nobody to try them here again."""
        self._cleared.set()

    def _count(self, change: int) -> None:
        self._sitting += change
        self.listening_since = math.inf if self._sitting else trio.current_time()
        self._changed.set()
        self._changed = trio.Event()
