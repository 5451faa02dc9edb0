"""How long this slot lasts, and whether that is long enough for another task."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import trio

from trio_pilot.allocation import classad
from trio_pilot.allocation.resources import JOB_AD, MACHINE_AD
from trio_pilot.brokers import tokens
from trio_pilot.parsing import LATEST
from trio_pilot.settings import Settings
from trio_pilot.status import RunTimes

# Of the time that a pilot had at first, as much may be left at least for a task of which nothing is known but a time-out:
# that may be far longer than any task is.
UNKNOWN_SHARE = 0.5
LIKELY = 95.0  # percent of the tasks seen that were done in the time that is reckoned for one


@dataclass(frozen=True, slots=True, order=True)
class End:
    """When the slot ends, in Unix time, and who says so."""

    at: float
    who: str

    def is_too_soon(self, settings: Settings) -> bool:
        """Tell whether nothing but the pilot's own last steps could be done until then."""
        return self.at - time.time() <= settings.last_steps

    def __str__(self) -> str:
        return f"{datetime.fromtimestamp(self.at, UTC):%Y-%m-%d %H:%M:%S} UTC, by {self.who}"


def find_end(settings: Settings, environ: Mapping[str, str], now: float) -> End | None:
    """Find the earliest of all ends that are known; None if none is. Blocks, a millisecond or so.

    What is past was wrong: we are still here. But what the user says counts in any case.
    """
    by_others = (End(at, who) for at, who in _by_others(settings, environ, now) if now < at)
    return min((end for end in (*_by_the_user(settings, now), *by_others) if end.at <= LATEST), default=None)


def _by_the_user(settings: Settings, now: float) -> Iterator[End]:
    if settings.until is not None:
        yield End(settings.until, "--until")
    if settings.max_runtime is not None:
        yield End(now + settings.max_runtime, "--max-runtime")


def _by_others(settings: Settings, environ: Mapping[str, str], now: float) -> Iterator[tuple[float, str]]:
    job, machine = (classad.read(environ.get(name)) for name in (JOB_AD, MACHINE_AD))
    yield from _by_the_job(job, now)
    yield from _by_the_glidein(environ, machine)
    yield from _by_features(environ)
    for queue in [*settings.incoming(), *settings.outgoing()]:
        yield tokens.expiry(queue.token) or math.inf, f"the token of {queue.queue}"


def _by_the_job(job: Mapping[str, classad.Literal], now: float) -> Iterator[tuple[float, str]]:
    """EWMS says a job's time in OriginalTime. HTCondor holds a job that lasts longer than AllowedJobDuration."""
    begun = next((start for name in ("JobCurrentStartDate", "ShadowBday") if (start := _number(job, name))), now)
    for name in ("OriginalTime", "AllowedJobDuration", "AllowedExecuteDuration"):
        if seconds := _number(job, name):
            yield begun + seconds, f"{name} of the job"


def _by_the_glidein(environ: Mapping[str, str], machine: Mapping[str, classad.Literal]) -> Iterator[tuple[float, str]]:
    """See when a glidein dies: until then it lets its jobs go on, also while it retires, which is a last resort."""
    for name in ("GLIDEIN_ToDie", "GLIDEIN_ToRetire"):
        at = _as_number(environ.get(name, "")) or _number(machine, name)
        if at:
            yield at, name
            return


def _by_features(environ: Mapping[str, str]) -> Iterator[tuple[float, str]]:
    """Machine/Job Features (HSF-TN-2016-02): directories of files with a value each."""
    for directory, name in (("MACHINEFEATURES", "shutdowntime"), ("JOBFEATURES", "shutdowntime_job")):
        file = Path(environ.get(directory, "/nonexistent"), name)
        with suppress(OSError):
            yield _as_number(file.read_text(errors="replace")), f"{name} in ${directory}"


def _number(ad: Mapping[str, classad.Literal], name: str) -> float:
    value = ad.get(name.lower())
    return value if isinstance(value, int | float) else 0


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0


class TimeLeft:
    """What is left of the slot for tasks."""

    def __init__(self, settings: Settings, run_times: RunTimes) -> None:
        """Take the end of the slot from `until`."""
        now, end = trio.current_time(), math.inf if settings.until is None else settings.until
        self.end = now + (end - time.time()) - settings.last_steps
        """When the last task must have ended, in trio's time."""
        self._timeout = math.inf if settings.task_timeout is None else settings.task_timeout
        self._unknown = min(self._timeout, UNKNOWN_SHARE * (self.end - now)) if self._timeout < math.inf else 0.0
        self._run_times = run_times

    @property
    def last_start(self) -> float:
        """When a task must have begun at the latest to be likely to end in time, in trio's time."""
        return self.end - self._likely() if self.end < math.inf else math.inf

    def _likely(self) -> float:
        return min(self._run_times.percentile(LIKELY), self._timeout) if self._run_times.count else self._unknown
