"""Communication between Trio and the thread of a foreign I/O loop."""

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import trio


class Reply:
    """An answer that Trio waits for: a value, or an error."""

    def __init__(self) -> None:
        self._answered = trio.Event()
        self._value: Any = None
        self._error: Exception | None = None

    def set(self, value: Any = None, error: Exception | None = None) -> None:
        """Set the answer, on Trio's side; only the first one counts."""
        if not self._answered.is_set():
            self._value, self._error = value, error
            self._answered.set()

    @property
    def is_set(self) -> bool:
        """Whether there is an answer."""
        return self._answered.is_set()

    async def wait(self) -> Any:
        """Wait for the answer, and return or raise it."""
        await self._answered.wait()
        if self._error:
            raise self._error
        return self._value


class Mailbox:
    """Work for another thread, done in order. Only the first piece wakes the thread: that costs as much as the work.

    Where work may wait, the thread looks again by itself a moment after it has worked; until then only a `batch` of pieces
    wakes it, or `hurry`. So a piece that comes alone is done at once, and those that come all the time are done together.
    """

    def __init__(
        self,
        wake: Callable[[Callable[[], None]], object],
        batch: int = 1,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._wake = wake
        self._batch = batch
        self._later = later  # schedules a call in the other thread, from there
        self._looks_again = False
        self._work: deque[Callable[[], object]] = deque()

    def put(self, work: Callable[[], object]) -> None:
        """Add a piece of work."""
        self._work.append(work)
        if len(self._work) == (self._batch if self._looks_again else 1):
            self._wake(self.do)

    def hurry(self) -> None:
        """Wake the thread for work that is waiting."""
        if self._looks_again:
            self._wake(self.do)

    def do(self) -> None:
        """Do all work that is waiting: in the other thread."""
        while self._work:  # a piece stays until it is done, so that one added meanwhile need not wake this thread
            try:
                self._work[0]()
            finally:
                self._work.popleft()
        if self._later and self._batch > 1 and not self._looks_again:
            self._looks_again = True
            self._later(self._look)

    def _look(self) -> None:
        self._looks_again = False  # first: work that is added from now on wakes this thread
        if self._work:
            self.do()


class DrivenConnection(Protocol):
    """A connection with a thread of its own."""

    opened: Reply  # set once it can be used, or cannot: the thread does not try without end
    ended: trio.Event  # set when the thread has ended

    async def drive(self) -> None:
        """Run the thread, from connect to close."""

    def hang_up(self) -> None:
        """Make the thread close the connection, which has a deadline, and end."""


D = TypeVar("D", bound=DrivenConnection)


@asynccontextmanager
async def driven(connection: D, threads: trio.Nursery) -> AsyncIterator[D]:
    """Connect, with a thread in the nursery `threads`; at the end close the connection, and wait for the thread's end.

    Raises:
        BrokerError: the server can be reached and refuses the pilot; another attempt would not help.
        ConnectError: anything else.
    """
    threads.start_soon(connection.drive)
    try:
        await connection.opened.wait()
        yield connection
    finally:
        connection.hang_up()
        with trio.CancelScope(shield=True):  # for as long as the thread takes to close it
            await connection.ended.wait()
