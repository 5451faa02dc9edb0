"""A connection to a broker that is made again whenever it is lost, for as long as there is patience."""

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import trio
from trio_util import AsyncValue

from trio_pilot.brokers import Patience, QueueAddress
from trio_pilot.brokers.thread_bridge import Reply
from trio_pilot.errors import BrokerError
from trio_pilot.log import LOGGER


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds to wait, for every broker; each broker adds its own."""

    retry: float = 0.5  # before the second attempt to connect, doubled from then on ...
    most_retry: float = 10.0  # ... to this; each time a random part of it, so that pilots do not come back all at once
    steady: float = 5.0  # after which a connection was a good one; a message that breaks each is to break few

    def retry_delay(self, failures: int) -> float:
        """Return a random delay before the next attempt to connect, after so many failures."""
        most = min(self.retry * 2 ** min(failures - 1, 10), self.most_retry)
        return random.uniform(most / 2, most)  # noqa: S311 -- jitter, not a secret


class LostError(Exception):
    """A connection, or a request on it, is lost; another connection may work."""


class ConnectError(LostError):
    """A connection could not be made; another attempt may work."""


class TooLargeError(Exception):
    """The broker takes no message of this size."""


class Session(Protocol):
    """A connection, or a part of one, that a queue uses."""

    @property
    def closed(self) -> Reply:
        """Its end: set to the LostError that gives the reason."""


S = TypeVar("S", bound=Session)
T = TypeVar("T")


class ReconnectingQueue(Generic[S]):
    """A queue, and the session with its broker while there is one."""

    def __init__(self, address: QueueAddress, broker: str, patience: Patience, timeouts: Timeouts) -> None:
        self.name = address.queue
        self.broker = broker  # what messages call the broker
        self._patience = patience
        self._delays = timeouts
        self._session: AsyncValue[S | None] = AsyncValue(None)
        self._away_since = trio.current_time()

    def connect(self, threads: trio.Nursery) -> AbstractAsyncContextManager[S]:
        """Connect to a queue and make sure that it exists; threads run in the nursery `threads`.

        Raises:
            BrokerError: the broker refuses the pilot; another attempt would not help.
            LostError: anything else.
        """
        raise NotImplementedError

    async def ready(self) -> None:
        """Wait until the queue was found. A refusal is raised by `keep_connected`."""
        await self.connected()

    async def connected(self) -> S:
        """Wait for a session. A cancelled caller gets none, so that it does not begin to use it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while (session := self._session.value) is None:
            await self._session.wait_value(lambda value: value is not None)
        return session

    async def gone(self, session: S) -> None:
        """Wait for the end of a session."""
        await self._session.wait_value(lambda value: value is not session)

    async def until_done(self, work: Callable[[S], Awaitable[T]]) -> T:
        """Call `work` with a session, and again with each new one, until it does not lose its connection."""
        while True:
            session = await self.connected()
            try:
                return await work(session)
            except LostError:
                await self.after(session)

    async def after(self, session: S) -> None:
        """Wait for the end of a session, or a moment: a request that was refused once may work later."""
        with trio.move_on_after(self._delays.retry):
            await self.gone(session)

    async def keep_connected(self) -> None:
        """Connect again and again, until cancelled.

        Raises:
            BrokerError: the broker refuses the pilot, or was away for longer than there is patience.
        """
        failures = 0
        async with trio.open_nursery() as threads:
            while True:
                connected_at = math.inf
                try:
                    async with self.connect(threads) as session:
                        connected_at = trio.current_time()
                        await self._use(session)
                except BrokerError as error:
                    raise BrokerError(f"{self.broker} {error}") from error
                except LostError as error:
                    if trio.current_time() - connected_at >= self._delays.steady:
                        failures = 0
                    if not self._patience(trio.current_time() - self._away_since):
                        raise BrokerError(f"{self.broker} cannot be reached: {error}") from error
                    if failures == 0:
                        LOGGER.warning("%s, queue %s: %s; connecting again", self.broker, self.name, error)
                failures += 1
                await trio.sleep(self._delays.retry_delay(failures))

    async def _use(self, session: S) -> None:
        self._session.value = session
        try:
            await session.closed.wait()
        finally:
            self._session.value = None
            self._away_since = trio.current_time()


Q = TypeVar("Q", bound=ReconnectingQueue[Any])


@asynccontextmanager
async def opened(make: Callable[[], Q]) -> AsyncIterator[Q]:
    """Make a queue, and keep it connected in the background."""
    queue = make()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.keep_connected)
        try:
            yield queue
        finally:
            nursery.cancel_scope.cancel()
