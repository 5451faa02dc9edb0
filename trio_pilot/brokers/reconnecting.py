"""A connection to a broker, made anew whenever it is lost, for as long as there is patience."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

import trio
from trio_util import AsyncValue

from trio_pilot.brokers import Patience, QueueAddress
from trio_pilot.brokers.thread_bridge import Reply
from trio_pilot.errors import BrokerError
from trio_pilot.log import LOGGER

RETRY_DELAY = 0.5  # seconds before the second try to connect, doubled from then on ...
RETRY_DELAY_MOST = 10.0  # ... to this; each time a random part of it, so that pilots do not come back as one


class LostError(Exception):
    """A connection, or what was asked by it, is lost; another may do better."""


class ConnectError(LostError):
    """A connection could not be made; another try may do better."""


class Connected(Protocol):
    """What a connection was made for."""

    @property
    def closed(self) -> Reply:
        """Its end: told with the LostError that says why."""


S = TypeVar("S", bound=Connected)


class ReconnectingQueue(Generic[S]):
    """A queue, and the session with its broker while there is one."""

    def __init__(self, name: str, broker: str, patience: Patience) -> None:
        self.name = name
        self.broker = broker  # what to call it in messages to people
        self._patience = patience
        self._session: AsyncValue[S | None] = AsyncValue(None)
        self._away_since = trio.current_time()

    def connect(self, threads: trio.Nursery) -> AbstractAsyncContextManager[S]:
        """Connect, with a thread in the nursery `threads`, to a queue that is there.

        Raises:
            BrokerError: the broker refuses us; another try would do no better.
            LostError: anything else.
        """
        raise NotImplementedError

    async def ready(self) -> None:
        """Wait until the queue was found. A refusal is raised by `keep_connected`."""
        await self.connected()

    async def connected(self) -> S:
        """Wait for a session; cancelled, there is none: what is over must not begin to use it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while (session := self._session.value) is None:
            await self._session.wait_value(lambda value: value is not None)
        return session

    async def gone(self, session: S) -> None:
        """Wait for the end of a session."""
        await self._session.wait_value(lambda value: value is not session)

    async def _after(self, session: S) -> None:
        """Wait for the end of a session, or a moment: what was refused once may not be again."""
        with trio.move_on_after(RETRY_DELAY):
            await self.gone(session)

    async def keep_connected(self) -> None:
        """Connect again and again, until cancelled.

        Raises:
            BrokerError: the broker refuses us, or was away for longer than there is patience.
        """
        failures = 0
        async with trio.open_nursery() as threads:
            while True:
                try:
                    async with self.connect(threads) as session:
                        failures = 0
                        await self._use(session)
                except BrokerError as error:
                    raise BrokerError(f"{self.broker} {error}") from error
                except LostError as error:
                    if not self._patience(trio.current_time() - self._away_since):
                        raise BrokerError(f"{self.broker} cannot be reached: {error}") from error
                    if failures == 0:
                        LOGGER.warning("%s, queue %s: %s; connecting again", self.broker, self.name, error)
                failures += 1
                await trio.sleep(_retry_delay(failures))

    async def _use(self, session: S) -> None:
        self._session.value = session
        try:
            await session.closed.wait()
        finally:
            self._session.value = None
            self._away_since = trio.current_time()


L = TypeVar("L", bound=ReconnectingQueue[Any])


@asynccontextmanager
async def opened(kind: Callable[[QueueAddress, Patience], L], address: QueueAddress, patience: Patience) -> AsyncIterator[L]:
    """Open a link to a queue; it is kept connected in the background."""
    link = kind(address, patience)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.keep_connected)
        try:
            yield link
        finally:
            nursery.cancel_scope.cancel()


def _retry_delay(failures: int) -> float:
    most = min(RETRY_DELAY * 2 ** min(failures - 1, 10), RETRY_DELAY_MOST)
    return random.uniform(most / 2, most)  # noqa: S311 -- jitter, not a secret
