"""A cancel scope that trio does not have."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class GracePeriod:
    """Lets work that is almost done go on for a while after everything around it was cancelled: it would be lost."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = math.inf
        self._shielded: set[trio.CancelScope] = set()
        self._watching = trio.CancelScope()

    async def watch(self) -> None:
        """Wait to be cancelled, or closed. Runs beside the tasks, which are cancelled at the same time."""
        with self._watching:
            try:
                await trio.sleep_forever()
            finally:
                self._deadline = trio.current_time() + self._seconds
                for scope in self._shielded:
                    scope.deadline = self._deadline

    def close(self) -> None:
        """End `watch`: no task runs any more."""
        self._watching.cancel()

    @contextmanager
    def linger(self) -> Iterator[trio.CancelScope]:
        """Shield the body from cancellation, until `seconds` after `watch` was cancelled."""
        with trio.CancelScope(shield=True, deadline=self._deadline) as scope:
            self._shielded.add(scope)
            try:
                yield scope
            finally:
                self._shielded.discard(scope)
