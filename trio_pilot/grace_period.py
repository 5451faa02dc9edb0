"""Time for what is almost done after everything around it was cancelled."""

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio


class GracePeriod:
    """Lets bodies that would lose finished work run on for a while when they are cancelled.

    It begins when the scope around `open` is cancelled, for all shielded bodies at once.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = math.inf
        self._shielded: set[trio.CancelScope] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Watch for the cancellation of the scope around, which is to be that of the shielded bodies too."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            yield
            nursery.cancel_scope.cancel()

    @contextmanager
    def shield(self) -> Iterator[trio.CancelScope]:
        """Shield the body from cancellation; once the grace period has begun, for what is left of it."""
        with trio.CancelScope(shield=True, deadline=self._deadline) as scope:
            self._shielded.add(scope)
            try:
                yield scope
            finally:
                self._shielded.discard(scope)

    async def _watch(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._deadline = trio.current_time() + self._seconds
            for scope in self._shielded:
                scope.deadline = self._deadline
