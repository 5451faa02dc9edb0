"""What Trio and the thread of a foreign I/O loop tell each other."""

from collections import deque
from collections.abc import Callable
from typing import Any

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
    """Work for another thread, done in order. It is woken for the first piece only: to wake costs as much as the work."""

    def __init__(self, wake: Callable[[Callable[[], None]], object]) -> None:
        self._wake = wake
        self._work: deque[Callable[[], object]] = deque()

    def put(self, work: Callable[[], object]) -> None:
        """Have `work` done."""
        self._work.append(work)
        if len(self._work) == 1:
            self._wake(self.do)

    def do(self) -> None:
        """Do what there is: in the other thread."""
        while self._work:  # a piece stays until it is done, so that whoever adds one meanwhile need not wake us
            try:
                self._work[0]()
            finally:
                self._work.popleft()
