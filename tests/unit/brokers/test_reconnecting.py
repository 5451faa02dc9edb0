from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from trio_pilot.brokers import QueueAddress
from trio_pilot.brokers.reconnecting import LostError, ReconnectingQueue, Timeouts
from trio_pilot.brokers.thread_bridge import Reply

pytestmark = pytest.mark.mock_clock


class Brief:
    """A session that ends after some seconds."""

    def __init__(self) -> None:
        self.closed = Reply()


class BriefQueue(ReconnectingQueue[Brief]):
    """A queue whose sessions last for `lifetime` seconds."""

    def __init__(self, lifetime: float) -> None:
        super().__init__(QueueAddress("q", "local", "file"), "a broker", lambda _seconds: True, Timeouts())
        self.lifetime = lifetime
        self.pauses: list[float] = []
        self._ended = trio.current_time()

    @asynccontextmanager
    async def connect(self, threads: trio.Nursery) -> AsyncIterator[Brief]:
        self.pauses.append(trio.current_time() - self._ended)
        session = Brief()
        threads.start_soon(self._end, session)
        yield session

    async def _end(self, session: Brief) -> None:
        await trio.sleep(self.lifetime)
        self._ended = trio.current_time()
        session.closed.set(error=LostError("it is over"))


async def pauses(lifetime: float, count: int) -> list[float]:
    queue = BriefQueue(lifetime)
    with trio.move_on_after(count * (lifetime + 10)):
        await queue.keep_connected()
    return queue.pauses[1:count]


async def test_connections_that_end_at_once_are_made_again_more_and_more_slowly() -> None:
    found = await pauses(0.1, 20)
    assert found[0] <= 0.5
    assert all(pause >= 5 for pause in found[5:])


async def test_a_connection_that_was_good_for_a_while_is_made_again_at_once() -> None:
    assert all(pause <= 0.5 for pause in await pauses(6, 20))
