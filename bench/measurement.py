"""What all measurements share: making a report, opening the runtimes to measure, and printing progress."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from bench.broker import RabbitServer
from bench.figures import Figure
from bench.report import Report, versions
from bench.runtimes import Runtime, UnavailableError, open_runtime
from tests.support.servers import ERLANG_FLAGS


def report(name: str, figures: list[Figure], plan: Any, server: RabbitServer, **programs: str) -> Report:
    """Return the report of a measurement, with its plan, the versions of programs, and how the server was run."""
    broker = {"erlang": ERLANG_FLAGS, "queues": "quorum, one node", "cores": "those of the pilot and its tasks"}
    settings = {"plan": asdict(plan), "rabbitmq": broker}
    known = {name: version for name, version in programs.items() if version}
    return Report(name, figures, settings, versions(rabbitmq=server.version, **known))


def measure_runtimes(
    names: Iterable[str], measure: Callable[[Runtime], Iterable[Figure]]
) -> tuple[list[Figure], dict[str, str]]:
    """Measure with each of these runtimes that is available; return the figures, and the versions of the runtimes."""
    figures: list[Figure] = []
    versions = {}
    for name in names:
        with runtime_or_none(name) as runtime:
            if runtime:
                versions[name] = runtime.version
                figures += measure(runtime)
    return figures, versions


@contextmanager
def runtime_or_none(name: str) -> Iterator[Runtime | None]:
    """Open a runtime; if it is not available, yield None and print the reason."""
    try:
        opened = open_runtime(name)
        runtime = opened.__enter__()
    except UnavailableError as error:
        print_progress(f"left out: {name}: {error}")
        yield None
        return
    try:
        yield runtime
    finally:
        opened.__exit__(None, None, None)


def print_progress(line: str) -> None:
    """Print a line about the progress of a measurement to stderr."""
    print(line, file=sys.stderr, flush=True)
