"""Telling a node that breaks every task from an event that fails on every node.

A failed task may be the fault of either. A probe decides: next to nothing, run in a container like a task's. It is run once
before any event is taken, and again after each failure: a node that was bad from the start touches no event, and one that
breaks while it works touches those that run by then. No event is charged with it.
"""

from collections.abc import Awaitable, Callable

import trio
from trio_util import AsyncValue

from trio_pilot.errors import ContainerLostError, NodeError, NoProcessError, PilotError


async def _never() -> bool:
    return False


class NodeHealth:
    """Doubts the node when tasks fail, and probes it."""

    def __init__(self, probe: Callable[[PilotError], Awaitable[None]]) -> None:
        """Use `probe`, which raises NodeError if the node is broken; it is given the error that raised the doubt."""
        self._probe = probe
        self._lock = trio.Lock()
        self._doubts: AsyncValue[int] = AsyncValue(0)
        self._probes = 0  # that were begun
        self._fault: NodeError | None = None  # what the last of them found

    async def wait_until_trusted(self) -> None:
        """Wait while the node is in doubt: meanwhile no event is taken for it."""
        if self._doubts.value:
            await self._doubts.wait_value(0)

    async def check(
        self,
        error: PilotError,
        tidy_up: Callable[[], Awaitable[object]],
        tasks_are_at_fault: Callable[[], Awaitable[bool]] = _never,
    ) -> None:
        """Probe the node after a failure, once `tidy_up` has removed what the task has left.

        One probe does for all that wait for it. A failure that comes while a probe runs waits for the next one: by then what
        makes tasks fail may have begun, or what has filled the disk be gone. A fault that tasks have caused, such as a disk
        that is full of their files, is not the node's.

        Raises:
            NodeError: the node is broken, and doubted for ever. The event is not at fault.
            ContainerLostError: that cannot be found out, for the engine is away.
            NoProcessError: that cannot be found out, for there is no process to be had.
        """
        self._doubts.value += 1
        await tidy_up()
        probes = self._probes
        async with self._lock:
            if probes == self._probes:
                await self._probe_once(error)
            fault = self._fault
        may_pass = isinstance(fault, ContainerLostError | NoProcessError)
        if fault and not may_pass and not await tasks_are_at_fault():
            raise NodeError(f"this node breaks tasks: {fault}; so the event may not be at fault: {error}") from fault
        self._doubts.value -= 1
        if fault and may_pass:
            raise type(fault)(f"{fault}; so it is not known what is at fault: {error}") from fault

    async def _probe_once(self, error: PilotError) -> None:
        self._probes += 1
        self._fault = None
        try:
            await self._probe(error)
        except NodeError as fault:
            self._fault = fault
