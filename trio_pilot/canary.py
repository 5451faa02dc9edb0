"""Tells a node that breaks every task from an event that fails on every node.

A failed task may be either's fault. What decides is a canary: next to nothing, in a container like a task's. It costs a
container, so it is run only where a failure follows another, or nothing has worked yet: a node that breaks gets at most two
events into its hands, and one more for each other slot, and a bad event costs a good node little.
"""

from collections.abc import Awaitable, Callable

import trio
from trio_util import AsyncValue

from trio_pilot.errors import NodeError, PilotError

PATIENCE = 2  # failures in a row, on a node that has worked before


class Canary:
    """Doubts the node when tasks fail."""

    def __init__(self, look: Callable[[PilotError], Awaitable[None]]) -> None:
        """Be told how to look at the node because of an error: NodeError, if it is broken."""
        self._look = look
        self._lock = trio.Lock()
        self._looking: AsyncValue[int] = AsyncValue(0)
        self._failures = 0  # since the node was last known to work
        self._patience = 1  # nothing is known yet
        self._proofs = 0
        self._fault: NodeError | None = None

    def sings(self) -> None:
        """Take note that a container has done its work."""
        self._failures, self._patience = 0, PATIENCE
        self._proofs += 1

    async def calm(self) -> None:
        """Wait until nobody looks at the node: meanwhile no more events are for it."""
        if self._looking.value:
            await self._looking.wait_value(0)

    async def judge(self, error: PilotError, tidy_up: Callable[[], Awaitable[object]]) -> None:
        """Look at the node, if a failure is suspicious, without what the task has left. Of several, the others wait.

        Raises:
            NodeError: it is broken. The failure is none of the event's.
        """
        self._failures += 1
        if self._failures < self._patience:
            return
        proofs = self._proofs
        self._looking.value += 1
        try:
            await tidy_up()
            async with self._lock:
                if proofs == self._proofs:
                    await self._look_once(error)
        finally:
            self._looking.value -= 1

    async def _look_once(self, error: PilotError) -> None:
        try:
            if self._fault:
                raise self._fault
            await self._look(error)
        except NodeError as fault:
            self._fault = fault
            raise NodeError(f"this node breaks tasks: {fault}; so this may be none of the event's: {error}") from fault
        self.sings()
