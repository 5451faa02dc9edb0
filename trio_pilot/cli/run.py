"""`trio-pilot run`: run the pilot."""

import gc
import os
import signal
import sys
import time
from dataclasses import replace

import trio

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.allocation.walltime import find_end
from trio_pilot.brokers import Patience, open_sinks, open_sources
from trio_pilot.cleanup.client import open_guardian
from trio_pilot.cli.exit_codes import SIGNALLED
from trio_pilot.cli.root_warning import root_warning
from trio_pilot.cli.site_lines import site_lines
from trio_pilot.condor.reporter import open_reporter
from trio_pilot.log import LOGGER, NonBlockingWriter, in_one_line
from trio_pilot.pilot.serve import Parts, serve
from trio_pilot.processes.children import end_all_children
from trio_pilot.runtimes.selection import open_runtime
from trio_pilot.settings import Settings
from trio_pilot.status import Status


def run(settings: Settings) -> int:
    """Run the pilot to its end, and return the exit code. Raises what `trio_pilot.pilot.serve.serve` raises."""
    settings.check_complete()
    _print_site()
    gc.freeze()  # modules imported by now stay until the end: the collector need not visit them again and again
    try:
        ended_by = trio.run(run_pilot, settings)
    finally:
        end_all_children()
    return SIGNALLED + ended_by if ended_by else 0


def _print_site() -> None:
    if sys.stdout:
        stdout = NonBlockingWriter(sys.stdout)
        for line in site_lines(os.environ):
            stdout.write(in_one_line(line))


async def run_pilot(settings: Settings) -> int | None:
    """Run a pilot with the brokers and the runtime of the settings; return the signal that ended it, or None."""
    if warning := root_warning():
        LOGGER.warning(warning)
    settings, status = _fit_to_allocation(settings), Status()
    patience = patience_of(settings, status)
    parts = Parts(
        open_guardian(),
        open_reporter(settings, status),
        open_runtime(settings.runtime, settings.task_image, settings.runtime_options),
        open_sources(settings.incoming(), patience),
        open_sinks(settings.outgoing(), patience),
    )
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        try:
            return await serve(settings, parts, signals, status)
        finally:
            for line in status.summary():
                LOGGER.info(line)


def _fit_to_allocation(settings: Settings) -> Settings:
    """Return settings in which tasks have their shares of the job's resources and time."""
    end = find_end(settings, os.environ, time.time())
    if end:
        LOGGER.info("this slot ends at %s", end)
        if end.is_too_soon(settings):
            LOGGER.warning(
                "no task can run: the slot ends within %g s, which the pilot needs for its own end", settings.shutdown_time
            )
    return replace(fitted(settings, find_allocation(os.environ)), until=end.at if end else None)


def patience_of(settings: Settings, status: Status) -> Patience:
    """Return a Patience without limit while tasks run or outputs are sent: they are worth more than the slot."""
    return lambda seconds: seconds < settings.broker_patience or status.slots.at_hand.value > 0
