"""A clock that stands still while this process is stopped, and time limits by it.

HTCondor suspends a job with SIGSTOP, or by freezing its control group, and all its processes stop; the system's clock goes
on. No signal tells a process of it: SIGSTOP cannot be caught, and a frozen group gets none at all. So while there are
limits, the time is looked at in short beats: between two looks that are too far apart, nothing here has run. (While the
machine sleeps, Trio's clock stands still as well.)
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from trio_pilot.log import LOGGER

BEAT = 1.0  # seconds between two looks
MOST_LATE = 2.0  # seconds that a look may be late on a busy machine


class RunningClock:
    """The time for which this process has run, as far as there are limits. `keep` must run meanwhile."""

    def __init__(self) -> None:
        self._seen = trio.current_time()
        self._stopped = 0.0  # seconds
        self._limits: dict[trio.CancelScope, float] = {}
        self._has_new_limit = trio.Event()

    def time(self) -> float:
        """Return the current time, in seconds."""
        now = trio.current_time()
        if self._limits and (gap := now - self._seen) > BEAT + MOST_LATE:
            LOGGER.warning("this process was stopped for %.0f s, which do not count towards the time limits of tasks", gap)
            self._stopped += gap
        self._seen = now
        return now - self._stopped

    async def keep(self) -> None:
        """Look at the time in each beat, and when a limit is over; without limits, never."""
        while True:
            now = self.time()
            for scope in [scope for scope, end in self._limits.items() if end <= now]:
                scope.cancel()
                del self._limits[scope]
            self._has_new_limit = trio.Event()
            with trio.move_on_after(min(BEAT, min(self._limits.values()) - now) if self._limits else math.inf):
                await self._has_new_limit.wait()

    @contextmanager
    def move_on_after(self, seconds: float) -> Iterator[trio.CancelScope]:
        """Cancel the body after a time, as `trio.move_on_after` does."""
        with trio.CancelScope() as scope:
            self._limits[scope] = self.time() + seconds
            self._has_new_limit.set()
            try:
                yield scope
            finally:
                self.time()
                self._limits.pop(scope, None)
