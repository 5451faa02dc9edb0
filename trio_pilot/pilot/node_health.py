"""Tells a node that breaks every task from an event that fails on every node.

A failed task may be either's fault. What decides is a canary: next to nothing, in a container like a task's. It is sent once
before any event is taken, and again after each failure: a node that was bad from the start touches no event, and one that
breaks while it works touches those that run by then. None of them is charged with it.
"""

from collections.abc import Awaitable, Callable

import trio
from trio_util import AsyncValue

from trio_pilot.errors import ContainerLostError, NodeError, PilotError


class NodeHealth:
    """Doubts the node when tasks fail."""

    def __init__(self, look: Callable[[PilotError], Awaitable[None]]) -> None:
        """Be told how to look at the node because of an error: NodeError, if it is broken."""
        self._look = look
        self._lock = trio.Lock()
        self._doubts: AsyncValue[int] = AsyncValue(0)
        self._looks = 0  # that were begun
        self._fault: NodeError | None = None  # what the last of them found

    async def calm(self) -> None:
        """Wait until nobody doubts the node: meanwhile no more events are for it."""
        if self._doubts.value:
            await self._doubts.wait_value(0)

    async def judge(self, error: PilotError, tidy_up: Callable[[], Awaitable[object]]) -> None:
        """Look at the node after a failure, without what the task has left.

        One look does for all who wait for it. Who comes while one is under way waits for the next: by then what makes tasks
        fail may have come, or what has filled the disk be gone.

        Raises:
            NodeError: it is broken, and doubted for ever. The failure is none of the event's.
            ContainerLostError: that cannot be told, for the engine is away.
        """
        self._doubts.value += 1
        await tidy_up()
        looks = self._looks
        async with self._lock:
            if looks == self._looks:
                await self._look_once(error)
            fault = self._fault
        if fault and not isinstance(fault, ContainerLostError):
            raise NodeError(f"this node breaks tasks: {fault}; so this may be none of the event's: {error}") from fault
        self._doubts.value -= 1
        if fault:
            raise ContainerLostError(f"{fault}; so nobody knows whose fault this is: {error}") from fault

    async def _look_once(self, error: PilotError) -> None:
        self._looks += 1
        self._fault = None
        try:
            await self._look(error)
        except NodeError as fault:
            self._fault = fault
