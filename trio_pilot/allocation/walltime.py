"""The time at which this job ends, and whether there is enough time left for another task."""

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

# As long as no task has ended, nothing but its time-out is known of its length, which may be far longer than any task. So at
# most this share of the time that the pilot had at first is reserved for a task then.
UNKNOWN_SHARE = 0.5
# Seconds that the OSPool lets a job of a category run, which is twice the time that it is meant for.
CATEGORIES = {"medium": 20 * 3600.0, "long": 40 * 3600.0}
LIKELY = 95.0  # percent of the tasks so far that took no longer than the time that is reserved for one


@dataclass(frozen=True, slots=True, order=True)
class End:
    """The time at which this job ends, in Unix time, and where it comes from."""

    at: float
    who: str

    def is_too_soon(self, settings: Settings) -> bool:
        """Return whether there is no more time than the pilot needs for its own last steps."""
        return self.at - time.time() <= settings.shutdown_time

    def __str__(self) -> str:
        return f"{datetime.fromtimestamp(self.at, UTC):%Y-%m-%d %H:%M:%S} UTC, by {self.who}"


def find_end(settings: Settings, environ: Mapping[str, str], now: float) -> End | None:
    """Return the earliest of all ends that are known; None if none is. Blocks for about 1 ms.

    An end in the past is wrong, and ignored: this process still runs. One that the user has set counts in any case.
    """
    others = (End(at, who) for at, who in _set_by_others(settings, environ, now) if now < at)
    return min((end for end in (*_set_by_user(settings, now), *others) if end.at <= LATEST), default=None)


def _set_by_user(settings: Settings, now: float) -> Iterator[End]:
    if settings.until is not None:
        yield End(settings.until, "--until")
    if settings.max_runtime is not None:
        yield End(now + settings.max_runtime, "--max-runtime")


def _set_by_others(settings: Settings, environ: Mapping[str, str], now: float) -> Iterator[tuple[float, str]]:
    job, machine = (classad.read(environ.get(name)) for name in (JOB_AD, MACHINE_AD))
    yield from _set_by_job(job, now)
    yield from _set_by_glidein(environ, machine)
    yield from _set_by_features(environ)
    for queue in [*settings.incoming(), *settings.outgoing()]:
        yield tokens.expiry(queue.token) or math.inf, f"the token of {queue.queue}"


def _set_by_job(job: Mapping[str, classad.Literal], now: float) -> Iterator[tuple[float, str]]:
    """EWMS sets a job's time in OriginalTime. HTCondor holds a job that lasts longer than AllowedJobDuration.

    The OSPool holds a job that lasts longer than its category allows.
    """
    begun = next((start for name in ("JobCurrentStartDate", "ShadowBday") if (start := _number(job, name))), now)
    for name in ("OriginalTime", "AllowedJobDuration", "AllowedExecuteDuration"):
        if seconds := _number(job, name):
            yield begun + seconds, f"{name} of the job"
    category = str(job.get("jobdurationcategory", ""))
    yield begun + CATEGORIES.get(category.lower(), math.inf), f"JobDurationCategory = {category} of the job"


def _set_by_glidein(environ: Mapping[str, str], machine: Mapping[str, classad.Literal]) -> Iterator[tuple[float, str]]:
    """Until a glidein dies, its jobs go on, even while it retires; the time when it retires is a last resort."""
    for name in ("GLIDEIN_ToDie", "GLIDEIN_ToRetire"):
        at = _as_number(environ.get(name, "")) or _number(machine, name)
        if at:
            yield at, name
            return


def _set_by_features(environ: Mapping[str, str]) -> Iterator[tuple[float, str]]:
    """Machine/Job Features (HSF-TN-2016-02) are directories of files with one value each."""
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
    """The time that is left for tasks."""

    def __init__(self, settings: Settings, run_times: RunTimes) -> None:
        """Take the end of the job from the setting `until`."""
        now, end = trio.current_time(), math.inf if settings.until is None else settings.until
        self.end = now + (end - time.time()) - settings.shutdown_time
        """The time at which the last task must have ended, on trio's clock."""
        self._timeout = math.inf if settings.task_timeout is None else settings.task_timeout
        self._unknown = min(self._timeout, UNKNOWN_SHARE * (self.end - now)) if self._timeout < math.inf else 0.0
        self._run_times = run_times

    @property
    def last_start(self) -> float:
        """The latest time, on trio's clock, at which a task must begin to be likely to end in time."""
        return self.end - self._likely() if self.end < math.inf else math.inf

    def _likely(self) -> float:
        return min(self._run_times.percentile(LIKELY), self._timeout) if self._run_times.count else self._unknown
