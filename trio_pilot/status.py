"""What the pilot is doing and has done, for whoever wants to know."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import trio
from trio_util import AsyncValue

from trio_pilot.errors import PilotError, first
from trio_pilot.statistics import RunTimes

MOST_ERRORS = 20  # errors of tasks that are told one by one; memory must not grow with the events


class State(Enum):
    """The pilot's state, in the words that EWMS reads."""

    STARTED = "Started"
    INIT = "RunningInitCommand"
    AWAITING_FIRST = "AwaitingFirstMessage"
    TASKING = "Tasking"
    PENDING = "PendingRemainingTasks"
    FATAL = "FatalError"
    DONE = "Done"


class Status:
    """Counters and state; the values can be waited for."""

    def __init__(self) -> None:
        self.state: AsyncValue[State] = AsyncValue(State.STARTED)
        self.running: AsyncValue[int] = AsyncValue(0)  # tasks that have a slot
        self.at_hand: AsyncValue[int] = AsyncValue(0)  # events that are run, or sent and settled
        self.succeeded: AsyncValue[int] = AsyncValue(0)
        self.failed: AsyncValue[int] = AsyncValue(0)
        self.returned: AsyncValue[int] = AsyncValue(0)
        self.error: AsyncValue[BaseException | None] = AsyncValue(None)  # the last
        self.errors: list[PilotError] = []
        self.run_times = RunTimes()
        self.runtime = ""
        self.taken = 0  # events
        self.started_at = time.time()
        self.last_event_at: float | None = None  # Unix time
        self._busy, self._busy_at = 0.0, 0.0  # seconds of all slots together, up to when (trio time)

    def start_task(self) -> None:
        """Count an event that was taken, and runs now."""
        self._busy, self._busy_at = self.seconds_busy(), trio.current_time()
        self.taken += 1
        self.last_event_at = time.time()
        self.running.value += 1
        self.at_hand.value += 1

    def end_task(self) -> None:
        """Count an event that runs no more."""
        self._busy, self._busy_at = self.seconds_busy(), trio.current_time()
        self.running.value -= 1

    def leave_event(self) -> None:
        """Count an event that is settled, or is to be tried again."""
        self.at_hand.value -= 1

    def seconds_busy(self) -> float:
        """Give for how long slots have run tasks, all slots together, in seconds."""
        return self._busy + self.running.value * (trio.current_time() - self._busy_at)

    def fail(self, error: PilotError) -> None:
        """Count a task that failed."""
        self.failed.value += 1
        self.error.value = error
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)

    @contextmanager
    def concluding(self) -> Iterator[None]:
        """Conclude with the last state, and the error that was the end."""
        try:
            yield
        except Exception as error:
            self.error.value = first(error)
            self.state.value = State.FATAL
            raise
        self.state.value = State.FATAL if self.failed.value else State.DONE

    def summary(self) -> Iterator[str]:
        """Say in the end what was done."""
        yield (
            f"{self.succeeded.value + self.failed.value} task(s): {self.succeeded.value} succeeded, "
            f"{self.failed.value} failed; {self.returned.value} event(s) returned"
        )
        yield from self.run_times.lines()

    def failures(self) -> str:
        """Say which tasks failed, in EWMS's words."""
        told = [repr(error) for error in self.errors]
        if self.failed.value > len(told):
            told.append("...")
        return f"{self.failed.value} TASK(S) FAILED: {', '.join(told)}"
