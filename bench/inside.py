"""A pilot with some of its parts exchanged, in a process of its own; the rest is as `trio-pilot run` puts it together."""

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
from trio_pilot.processes.children import end_strays
from trio_pilot.runtimes import Runtime
from trio_pilot.settings import Settings, load
from trio_pilot.status import Status

T = TypeVar("T")
Sources = AbstractAsyncContextManager[list[Source]]
Sinks = AbstractAsyncContextManager[list[Sink]]


def settings(file: str) -> Settings:
    """Read the settings that are given in a file; each task has its share of this machine."""
    return fitted(load(json.loads(Path(file).read_text()), {}, Path.cwd()), find_allocation(os.environ))


def as_it_is(part: T) -> T:
    """Exchange nothing."""
    return part


def run(
    settings: Settings,
    guard: AbstractAsyncContextManager[Guardian],
    runtime: AbstractAsyncContextManager[Runtime],
    sources: Callable[[Sources], Sources] = as_it_is,
    sinks: Callable[[Sinks], Sinks] = as_it_is,
) -> None:
    """Serve until SIGTERM with this guard and runtime, and what is made of the sources and sinks that the settings name."""

    async def serve_here() -> None:
        incoming = sources(open_sources(settings.incoming(), lambda _: False))
        outgoing = sinks(open_sinks(settings.outgoing(), lambda _: False))
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            await serve(settings, Parts(guard, nullcontext(), runtime, incoming, outgoing), signals, Status())

    try:
        trio.run(serve_here)
    finally:
        end_strays()
