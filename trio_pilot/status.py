"""The state of the pilot and its counters, and run times summed up in constant memory."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import trio
from trio_util import AsyncValue

from trio_pilot.errors import PilotError, first, reported_name

BUCKETS_PER_DOUBLING = 16  # a percentile is right within 2.2 %
BAR = 40  # characters of the longest bar of a histogram
MOST_ERRORS = 20  # errors of tasks that are listed one by one; memory must not grow with the events


class State(Enum):
    """The state of the pilot, in the words that EWMS reads."""

    STARTED = "Started"
    INIT = "RunningInitCommand"
    AWAITING_FIRST = "AwaitingFirstMessage"
    TASKING = "Tasking"
    PENDING = "PendingRemainingTasks"
    FATAL = "FatalError"
    DONE = "Done"


class SlotCounts:
    """Counts of slots and of events at hand. The pilot's slots write them; everything else only reads."""

    def __init__(self) -> None:
        self.running: AsyncValue[int] = AsyncValue(0)  # tasks that have a slot
        self.at_hand: AsyncValue[int] = AsyncValue(0)  # events that are run, or sent and settled
        self.taken = 0  # events
        self.last_event_at: float | None = None  # Unix time
        self._busy, self._busy_at = 0.0, 0.0  # seconds of all slots together, up to when (trio time)

    def start_task(self) -> None:
        """Count an event that was taken, and whose task runs now."""
        self._busy, self._busy_at = self.seconds_busy(), trio.current_time()
        self.taken += 1
        self.last_event_at = time.time()
        self.running.value += 1
        self.at_hand.value += 1

    def end_task(self) -> None:
        """Count a task that no longer runs."""
        self._busy, self._busy_at = self.seconds_busy(), trio.current_time()
        self.running.value -= 1

    def leave_event(self) -> None:
        """Count an event that is settled, or waits for its retry."""
        self.at_hand.value -= 1

    def seconds_busy(self) -> float:
        """Return for how long slots have run tasks, all slots together, in seconds."""
        return self._busy + self.running.value * (trio.current_time() - self._busy_at)


class Status:
    """What the pilot is doing and has done; it is read, and decides nothing."""

    def __init__(self) -> None:
        self.state: AsyncValue[State] = AsyncValue(State.STARTED)
        self.slots = SlotCounts()
        self.succeeded: AsyncValue[int] = AsyncValue(0)
        self.failed: AsyncValue[int] = AsyncValue(0)
        self.returned: AsyncValue[int] = AsyncValue(0)
        self.error: AsyncValue[BaseException | None] = AsyncValue(None)  # the last
        self.errors: list[PilotError] = []
        self.run_times = RunTimes()
        self.runtime = ""
        self.started_at = time.time()

    def fail(self, error: PilotError) -> None:
        """Count a task that failed."""
        self.failed.value += 1
        self.error.value = error
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)

    @contextmanager
    def concluding(self) -> Iterator[None]:
        """Set the last state when the body ends, and the error that ended it."""
        try:
            yield
        except Exception as error:
            self.error.value = first(error)
            self.state.value = State.FATAL
            raise
        self.state.value = State.FATAL if self.failed.value else State.DONE

    def summary(self) -> Iterator[str]:
        """Yield lines that sum up what was done."""
        yield (
            f"{self.succeeded.value + self.failed.value} task(s): {self.succeeded.value} succeeded, "
            f"{self.failed.value} failed; {self.returned.value} event(s) returned"
        )
        yield from self.run_times.lines()

    def failures(self) -> str:
        """Return which tasks failed, in the words of EWMS."""
        told = [f"{reported_name(error)}({str(error)!r})" for error in self.errors]
        if self.failed.value > len(told):
            told.append("...")
        return f"{self.failed.value} TASK(S) FAILED: {', '.join(told)}"


class RunTimes:
    """Counts run times in buckets that grow with the time, as HdrHistogram does."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._least, self._most = math.inf, 0.0
        self._buckets: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        """Count one run."""
        self.count += 1
        self._sum += seconds
        self._least, self._most = min(self._least, seconds), max(self._most, seconds)
        bucket = round(BUCKETS_PER_DOUBLING * math.log2(max(seconds, 1e-6)))
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def percentile(self, percent: float) -> float:
        """Return the time that `percent` of the runs did not exceed, in seconds."""
        wanted = max(1, math.ceil(self.count * percent / 100))
        for bucket in sorted(self._buckets):
            wanted -= self._buckets[bucket]
            if wanted <= 0:
                return float(min(max(2.0 ** (bucket / BUCKETS_PER_DOUBLING), self._least), self._most))
        return math.nan

    def lines(self) -> Iterator[str]:
        """Yield lines for people: mean, percentiles and a histogram."""
        if not self.count:
            return
        yield f"run times: mean {_time(self._sum / self.count)}, median {_time(self.percentile(50))}"
        marks = ", ".join(f"{percent} % {_time(self.percentile(percent))}" for percent in (90, 95, 99))
        yield f"percentiles: least {_time(self._least)}, {marks}, most {_time(self._most)}"
        yield from self._histogram()

    def _histogram(self) -> Iterator[str]:
        doublings: dict[int, int] = {}
        for bucket, count in self._buckets.items():
            doubling = bucket // BUCKETS_PER_DOUBLING
            doublings[doubling] = doublings.get(doubling, 0) + count
        largest = max(doublings.values())
        for doubling in range(min(doublings), max(doublings) + 1):
            count = doublings.get(doubling, 0)
            bar = "#" * math.ceil(BAR * count / largest)
            yield f"{_time(2.0**doubling):>8} to {_time(2.0 ** (doubling + 1)):<8} {count:>8} {bar}".rstrip()


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
