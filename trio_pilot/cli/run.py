"""`trio-pilot run`: the pilot."""

import gc
import os
import signal
import time
from dataclasses import replace

import trio

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.allocation.walltime import find_end
from trio_pilot.brokers import Patience, open_sinks, open_sources
from trio_pilot.cleanup.client import open_guardian
from trio_pilot.cli.exit_codes import SIGNALLED
from trio_pilot.condor.reporter import open_reporter
from trio_pilot.log import LOGGER
from trio_pilot.pilot.serve import Parts, serve
from trio_pilot.processes.children import end_strays
from trio_pilot.runtimes.selection import open_runtime
from trio_pilot.settings import Settings
from trio_pilot.status import Status


def run(settings: Settings) -> int:
    """Run the pilot to its end, and give the exit code; see `trio_pilot.pilot.serve.serve` for what it raises."""
    settings.check_complete()
    gc.freeze()  # what is imported by now is here to stay: not to be looked at again and again
    try:
        ended_by = trio.run(serve_here, settings)
    finally:
        end_strays()
    return SIGNALLED + ended_by if ended_by else 0


async def serve_here(settings: Settings) -> int | None:
    """Serve with the brokers, the runtime and the signals of this process; give the signal that ended it, if one did."""
    settings, status = _in_this_slot(settings), Status()
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


def _in_this_slot(settings: Settings) -> Settings:
    """Give tasks their shares of the slot, and of its time."""
    end = find_end(settings, os.environ, time.time())
    if end:
        LOGGER.info("this slot ends at %s", end)
        if end.is_too_soon(settings):
            LOGGER.warning("that is too soon for any task: the last %g s are for the pilot's own end", settings.last_steps)
    return replace(fitted(settings, find_allocation(os.environ)), until=end.at if end else None)


def patience_of(settings: Settings, status: Status) -> Patience:
    """Wait for a broker without end while tasks run, or are sent: their outputs are worth more than the slot."""
    return lambda seconds: seconds < settings.broker_patience or status.slots.at_hand.value > 0
