"""How a pilot stops taking events, and how long its running tasks may go on."""

from collections.abc import AsyncIterable

import trio

from trio_pilot.allocation.walltime import TimeLeft
from trio_pilot.log import LOGGER


class Drain:
    """The cancel scopes by which a pilot ends: one around taking events, one around running tasks."""

    def __init__(self, grace: float, time_left: TimeLeft) -> None:
        self.listening = trio.CancelScope()  # around initialising and taking events
        self.tasks = trio.CancelScope(deadline=time_left.end)
        self.begun = trio.Event()
        self.signal: int | None = None
        self._grace = grace
        self._time_left = time_left

    async def heed(self, signals: AsyncIterable[int]) -> None:
        """Drain at the first signal; at any further signal, cancel all tasks."""
        async for number in signals:
            if self.begun.is_set():
                LOGGER.warning("signal %d again: ending all tasks now", number)
                self.tasks.cancel()
            else:
                LOGGER.warning("signal %d: taking no more events; %g s for running tasks", number, self._grace)
                self.signal = number
                self.begun.set()
                self.tasks.deadline = min(self.tasks.deadline, trio.current_time() + self._grace)
                self.stop_listening()

    def stop_listening(self) -> None:
        """Take no more events; running tasks go on."""
        self.listening.cancel()

    def watch_the_time(self) -> None:
        """Set the moment after which no event is taken: from then on another task is not likely to end in time."""
        self.listening.deadline = self._time_left.last_start

    def time_is_short(self) -> bool:
        """Return whether that moment has passed."""
        return trio.current_time() >= self._time_left.last_start
