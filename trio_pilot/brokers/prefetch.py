"""Consumers of brokers that send messages ahead."""

import math
from collections import deque
from collections.abc import Callable

import trio

from trio_pilot.brokers import Delivery


class PrefetchConsumer:
    """Holds deliveries that were sent ahead until they are taken. A subclass receives them."""

    def __init__(self, has_lost: Callable[[Delivery], bool]) -> None:
        self.listening_since = math.inf
        self._has_lost = has_lost
        self._arrived: deque[Delivery] = deque()
        self._changed = trio.Event()  # since the last `take`, so that no change falls between that and `wait`

    async def take(self) -> Delivery | None:
        """Take the first delivery that has arrived and was not lost since."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._changed.is_set():
            self._changed = trio.Event()
        while self._arrived:
            delivery = self._arrived.popleft()
            if not self._has_lost(delivery):
                return delivery
        return None

    async def wait(self) -> None:
        """Wait for a delivery, or for a connection that is made or lost."""
        if self._arrived:
            await trio.lowlevel.checkpoint()
        else:
            await self._changed.wait()

    def _note_arrival(self, delivery: Delivery) -> None:
        self._arrived.append(delivery)
        self._changed.set()

    def _note_listening(self, *, is_so: bool) -> None:
        self.listening_since = trio.current_time() if is_so else math.inf
        self._changed.set()
