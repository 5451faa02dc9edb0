"""Cancel scopes that trio does not have."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class GracePeriod:
    """Lets what is almost done, and would be lost, go on for a while after all around it was cancelled."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = math.inf
        self._sheltered: set[trio.CancelScope] = set()
        self._watching = trio.CancelScope()

    async def watch(self) -> None:
        """Watch for the cancelling: run this beside the tasks that are to be sheltered from it."""
        with self._watching:
            try:
                await trio.sleep_forever()
            finally:
                self._deadline = trio.current_time() + self._seconds
                for scope in self._sheltered:
                    scope.deadline = self._deadline

    def close(self) -> None:
        """End the watch: there is nothing left to shelter."""
        self._watching.cancel()

    @contextmanager
    def linger(self) -> Iterator[trio.CancelScope]:
        """Shield the body; from the moment the watch is cancelled, for so many seconds more."""
        with trio.CancelScope(shield=True, deadline=self._deadline) as scope:
            self._sheltered.add(scope)
            try:
                yield scope
            finally:
                self._sheltered.discard(scope)
