"""Reports the pilot's status to HTCondor: state and errors at once, counts at intervals, the last state before the end.

The pilot never waits for the chirp proxy: reports are sent in a thread that can be given up.
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
from trio_pilot.processes.threads import run_sync
from trio_pilot.settings import Settings
from trio_pilot.status import Status

PREFIX = "HTChirpEWMSPilot"
STATUS, ERROR, TRACEBACK, STARTED, LAST_UPDATED = (
    PREFIX + name for name in ("Status", "Error", "ErrorTraceback", "StartedTimestamp", "LastUpdatedTimestamp")
)

LEAST_INTERVAL = 1.0  # seconds between two reports of counts, even if less is set
REPORT_TIMEOUT = 10.0  # seconds for one report
LAST_TIMEOUT = 3.0  # seconds at the end: half for a report that is being sent, half for the last one
MOST_ERRORS = 20  # different errors that are reported at once, and remembered so as not to be reported again

Value = int | str | BaseException  # an exception stands for its traceback
Send = Callable[[Mapping[str, Value], dict[str, Value]], Awaitable[None]]


@asynccontextmanager
async def open_reporter(settings: Settings, status: Status) -> AsyncIterator[None]:
    """Report to HTCondor during the body, and the last state at its end, if the settings ask for it."""
    if not settings.htchirp:
        yield
        return
    # One thread may have been given up when the last report is sent.
    send = partial(_send_in_thread, settings.htchirp_dest, trio.CapacityLimiter(2))
    async with Reporter(status, send, settings.htchirp_ratelimit_interval).open():
        yield


async def _send_in_thread(
    destination: str, threads: trio.CapacityLimiter, changes: Mapping[str, Value], reported: dict[str, Value]
) -> None:
    """Report in a thread. If cancelled, leave the thread alone: it sends no more lines, and ends at its deadline."""
    is_given_up = threading.Event()
    wanted = takewhile(lambda _: not is_given_up.is_set(), changes.items())
    try:
        await run_sync(_send, destination, wanted, reported, abandon_on_cancel=True, limiter=threads)
    finally:
        is_given_up.set()


def _send(destination: str, changes: Iterable[tuple[str, Value]], reported: dict[str, Value]) -> None:
    from trio_pilot.condor.chirp import report  # imported late: it takes long to load

    report(destination, changes, reported, REPORT_TIMEOUT)


def attributes(status: Status) -> Iterator[tuple[str, int | str]]:
    """Yield the attributes to report, without the prefix; counts are left out until they are above 0."""
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
    """Reports what has changed since the last report."""

    def __init__(self, status: Status, send: Send, interval: float) -> None:
        """Report through `send(changes, reported)`, which updates `reported`, and raises ReportError if not all was sent."""
        self._status = status
        self._send = send
        self._interval = max(interval, LEAST_INTERVAL)
        self._reported: dict[str, Value] = {}
        self._errors: deque[str] = deque(maxlen=MOST_ERRORS)
        self._has_logged_fault = False
        self._ends, self._has_ended = trio.Event(), trio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Report during the body, and once more at its end."""
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
        """Wait for an error that is reported at once; after MOST_ERRORS there is none."""
        await self._status.error.wait_value(
            lambda now: now is not error and len(self._errors) < MOST_ERRORS and error_text(now) not in self._errors
        )

    async def _report(self) -> None:
        """Report what has changed; what cannot be reported now goes with the next report."""
        changes = self._changes()
        if not changes.keys() - {LAST_UPDATED}:
            return
        try:
            await self._send(changes, self._reported)
        except ReportError as error:
            self._log_fault(error)
        text = self._reported.get(ERROR)
        if isinstance(text, str) and text not in self._errors:
            self._errors.append(text)

    def _changes(self) -> dict[str, Value]:
        report: dict[str, Value] = {PREFIX + name: value for name, value in attributes(self._status)}
        error = self._status.error.value
        if error and error_text(error) not in self._errors:
            report |= {ERROR: error_text(error), TRACEBACK: error}
        report[LAST_UPDATED] = int(time.time())
        return {name: value for name, value in report.items() if self._reported.get(name) != value}

    def _log_fault(self, error: ReportError) -> None:
        if not self._has_logged_fault:
            LOGGER.warning("%s; tasks go on, and further failures to report are not logged", error)
        self._has_logged_fault = True


def error_text(error: BaseException | None) -> str:
    """Return the text of an error as EWMS writes it: it counts errors with equal texts."""
    return f"{reported_name(error)}: {error}" if error else ""
