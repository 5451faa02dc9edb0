"""A pilot with some of its parts replaced, in a process of its own; the rest is put together as by `trio-pilot run`."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import trio

from trio_pilot.allocation.resources import find_allocation, fitted
from trio_pilot.brokers import Sink, Source, open_sinks, open_sources
from trio_pilot.cleanup.client import Guardian
from trio_pilot.pilot.serve import Parts, serve
from trio_pilot.processes.children import end_all_children
from trio_pilot.runtimes import Runtime
from trio_pilot.settings import Settings, load
from trio_pilot.status import Status

T = TypeVar("T")
Sources = AbstractAsyncContextManager[list[Source]]
Sinks = AbstractAsyncContextManager[list[Sink]]


def read_settings(file: str) -> Settings:
    """Return the settings in a file; each task has its share of this machine."""
    return fitted(load(json.loads(Path(file).read_text()), {}, Path.cwd()), find_allocation(os.environ))


def unchanged(part: T) -> T:
    """Return a part of the pilot as it is."""
    return part


def run_pilot(
    settings: Settings,
    guardian: AbstractAsyncContextManager[Guardian],
    runtime: AbstractAsyncContextManager[Runtime],
    replace_sources: Callable[[Sources], Sources] = unchanged,
    replace_sinks: Callable[[Sinks], Sinks] = unchanged,
) -> None:
    """Run a pilot until SIGTERM, with this guardian and runtime, and with the sources and sinks replaced."""

    async def run() -> None:
        sources = replace_sources(open_sources(settings.incoming(), lambda _: False))
        sinks = replace_sinks(open_sinks(settings.outgoing(), lambda _: False))
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            await serve(settings, Parts(guardian, nullcontext(), runtime, sources, sinks), signals, Status())

    try:
        trio.run(run)
    finally:
        end_all_children()
