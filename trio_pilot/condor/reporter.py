"""Reports the pilot's status to HTCondor: the state and errors at once, counts now and then, the last state before the end.

Whatever the proxy does, the pilot does not wait for it: it is told in a thread that can be given up.
"""

import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from itertools import takewhile

import trio
from trio_util import wait_any

from trio_pilot import __version__
from trio_pilot.errors import ReportError, reported_name
from trio_pilot.log import LOGGER
from trio_pilot.settings import Settings
from trio_pilot.status import Status

PREFIX = "HTChirpEWMSPilot"
ERROR, TRACEBACK, LAST_UPDATED = (PREFIX + name for name in ("Error", "ErrorTraceback", "LastUpdatedTimestamp"))

LEAST_INTERVAL = 1.0  # seconds between two reports of counts, however often they are wanted
TELL_TIMEOUT = 10.0  # seconds for one report
LAST_TIMEOUT = 3.0  # seconds in the end: half of it for a report that is under way, half for the last one
MOST_ERRORS = 20  # different errors that are told at once, and remembered so as not to be told again

Value = int | str | BaseException  # an exception stands for its traceback
Tell = Callable[[Mapping[str, Value], dict[str, Value]], Awaitable[None]]


@asynccontextmanager
async def open_reporter(settings: Settings, status: Status) -> AsyncIterator[None]:
    """Report to HTCondor while open, if that is wanted, and the last state in the end."""
    if not settings.htchirp:
        yield
        return
    # Room for a thread that was given up, and the one of the last report.
    tell = partial(_tell_in_thread, settings.htchirp_dest, trio.CapacityLimiter(2))
    async with Reporter(status, tell, settings.htchirp_ratelimit_interval).open():
        yield


async def _tell_in_thread(
    destination: str, threads: trio.CapacityLimiter, news: Mapping[str, Value], told: dict[str, Value]
) -> None:
    """Tell it in a thread. Cancelled, the thread is left to itself: it begins no more lines, and ends by its deadline."""
    is_given_up = threading.Event()
    wanted = takewhile(lambda _: not is_given_up.is_set(), news.items())
    try:
        await trio.to_thread.run_sync(_tell, destination, wanted, told, abandon_on_cancel=True, limiter=threads)
    finally:
        is_given_up.set()


def _tell(destination: str, news: Iterable[tuple[str, Value]], told: dict[str, Value]) -> None:
    from trio_pilot.condor.chirp import tell  # which takes its time to load

    tell(destination, news, told, TELL_TIMEOUT)


def attributes(status: Status) -> Iterator[tuple[str, int | str]]:
    """Name what there is to tell, without the prefix; counts are left out until there is something to count."""
    yield "Status", status.state.value.value
    yield "Version", __version__
    yield "StartedTimestamp", int(status.started_at)
    if status.runtime:
        yield "Runtime", status.runtime
    if status.slots.last_event_at:
        yield "LastEventTimestamp", int(status.slots.last_event_at)
        yield "TasksTotal", status.slots.taken
        yield "TasksRunning", status.slots.running.value
        yield "SecondsBusy", int(status.slots.seconds_busy())
    counts = {
        "TasksFailed": status.failed.value,
        "TasksSuccess": status.succeeded.value,
        "EventsReturned": status.returned.value,
    }
    yield from ((name, count) for name, count in counts.items() if count)


class Reporter:
    """Tells what has changed since it was told."""

    def __init__(self, status: Status, tell: Tell, interval: float) -> None:
        """Be told how to tell: `tell(news, told)` notes in `told` what it could tell, and raises ReportError if not all."""
        self._status = status
        self._tell = tell
        self._interval = max(interval, LEAST_INTERVAL)
        self._told: dict[str, Value] = {}
        self._errors: deque[str] = deque(maxlen=MOST_ERRORS)
        self._has_complained = False
        self._ends, self._has_ended = trio.Event(), trio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Report until left, then once more."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            try:
                yield
            finally:
                self._ends.set()
                with trio.move_on_after(LAST_TIMEOUT / 2, shield=True):
                    await self._has_ended.wait()
                nursery.cancel_scope.cancel()
                with trio.move_on_after(LAST_TIMEOUT / 2, shield=True):
                    await self._report()

    async def _run(self) -> None:
        try:
            while not self._ends.is_set():
                state, error = self._status.state.value, self._status.error.value
                await self._report()
                with trio.move_on_after(self._interval):
                    await wait_any(partial(self._other_state, state), partial(self._new_error, error), self._ends.wait)
        finally:
            self._has_ended.set()

    async def _other_state(self, state: object) -> None:
        await self._status.state.wait_value(lambda now: now is not state)

    async def _new_error(self, error: object) -> None:
        """Wait for an error that is worth a report of its own; after so many, none is."""
        await self._status.error.wait_value(
            lambda now: now is not error and len(self._errors) < MOST_ERRORS and worded(now) not in self._errors
        )

    async def _report(self) -> None:
        """Tell the news; what cannot be told now is told with the next."""
        news = self._news()
        if not news.keys() - {LAST_UPDATED}:
            return
        try:
            await self._tell(news, self._told)
        except ReportError as error:
            self._complain(error)
        text = self._told.get(ERROR)
        if isinstance(text, str) and text not in self._errors:
            self._errors.append(text)

    def _news(self) -> dict[str, Value]:
        facts: dict[str, Value] = {PREFIX + name: value for name, value in attributes(self._status)}
        error = self._status.error.value
        if error and worded(error) not in self._errors:
            facts |= {ERROR: worded(error), TRACEBACK: error}
        facts[LAST_UPDATED] = int(time.time())
        return {name: value for name, value in facts.items() if self._told.get(name) != value}

    def _complain(self, error: ReportError) -> None:
        if not self._has_complained:
            LOGGER.warning("%s; tasks do not suffer from it, and this is said once", error)
        self._has_complained = True


def worded(error: BaseException | None) -> str:
    """Word an error as EWMS does; it counts those that are worded alike."""
    return f"{reported_name(error)}: {error}" if error else ""
