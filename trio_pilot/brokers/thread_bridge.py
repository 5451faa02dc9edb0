"""What Trio and the thread of a foreign I/O loop tell each other."""

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import trio


class Reply:
    """What the connection's thread will tell Trio: a value, or an error."""

    def __init__(self) -> None:
        self._told = trio.Event()
        self._value: Any = None
        self._error: Exception | None = None

    def tell(self, value: Any = None, error: Exception | None = None) -> None:
        """Answer, on Trio's side; only the first answer counts."""
        if not self._told.is_set():
            self._value, self._error = value, error
            self._told.set()

    @property
    def is_told(self) -> bool:
        """Whether there is an answer."""
        return self._told.is_set()

    async def wait(self) -> Any:
        """Wait for the answer."""
        await self._told.wait()
        if self._error:
            raise self._error
        return self._value


class Mailbox:
    """Work for another thread, done in order. It is woken for the first piece only: to wake costs as much as the work.

    Where work may wait, the thread looks again of itself a moment after it has done some, and until then only a `batch` of
    pieces wakes it, or a `hurry`. What comes one at a time is done at once; of what comes all the time, much at a time.
    """

    def __init__(
        self,
        wake: Callable[[Callable[[], None]], object],
        batch: int = 1,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._wake = wake
        self._batch = batch
        self._later = later  # to call something in the other thread, from there
        self._looks_again = False
        self._work: deque[Callable[[], object]] = deque()

    def put(self, work: Callable[[], object]) -> None:
        """Have `work` done."""
        self._work.append(work)
        if len(self._work) == (self._batch if self._looks_again else 1):
            self._wake(self.do)

    def hurry(self) -> None:
        """Have what there is done at once."""
        if self._looks_again:
            self._wake(self.do)

    def do(self) -> None:
        """Do what there is: in the other thread."""
        while self._work:  # a piece stays until it is done, so that whoever adds one meanwhile need not wake us
            try:
                self._work[0]()
            finally:
                self._work.popleft()
        if self._later and self._batch > 1 and not self._looks_again:
            self._looks_again = True
            self._later(self._look)

    def _look(self) -> None:
        self._looks_again = False  # first: what is added from now on wakes us
        if self._work:
            self.do()


class DrivenConnection(Protocol):
    """A connection with a thread of its own."""

    opened: Reply  # told once it can be used, or why it cannot: the thread does not try for ever
    ended: trio.Event  # the thread has

    async def drive(self) -> None:
        """Be the thread, from connect to close."""

    def hang_up(self) -> None:
        """Have the thread close the connection, which has a deadline, and end."""


D = TypeVar("D", bound=DrivenConnection)


@asynccontextmanager
async def driven(connection: D, threads: trio.Nursery) -> AsyncIterator[D]:
    """Connect, with a thread in the nursery `threads`; close the connection and end the thread on every way out.

    Raises:
        BrokerError: the server is there and refuses us; another try would do no better.
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
