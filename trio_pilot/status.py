"""What the pilot is doing and has done, for whoever wants to know."""

from collections.abc import Iterator
from enum import Enum

from trio_util import AsyncValue

from trio_pilot.errors import PilotError
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
        self.running: AsyncValue[int] = AsyncValue(0)
        self.succeeded: AsyncValue[int] = AsyncValue(0)
        self.failed: AsyncValue[int] = AsyncValue(0)
        self.returned: AsyncValue[int] = AsyncValue(0)
        self.errors: list[PilotError] = []
        self.run_times = RunTimes()

    def fail(self, error: PilotError) -> None:
        """Count a task that failed."""
        self.failed.value += 1
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)

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
