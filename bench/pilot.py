"""trio-pilot as a side of a measurement."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.broker import Queues
from bench.load import Start
from bench.process import Measured, running
from bench.report import ROOT

COMMAND = Path(sys.executable).with_name("trio-pilot")
OURS = "trio-pilot"  # the name of the side
AHEAD = 24  # events at hand beyond the slots, as the README has it for short tasks
LONG = 120  # seconds that it waits for events: it is ended as soon as the last result is there

COPY = 'cp "$EWMS_TASK_INFILE" "$EWMS_TASK_OUTFILE"'


def task(seconds: float) -> str:
    """Give the arguments of a task that takes so long, and then copies its input to its output."""
    return shlex.join(["sh", "-c", f"sleep {seconds:g}; {COPY}"]) if seconds else "cp {{INFILE}} {{OUTFILE}}"


def variables() -> dict[str, str]:
    """Give an environment in which nothing is set for a pilot that the measurement has not set."""
    return {name: value for name, value in os.environ.items() if "EWMS" not in name}


def _known(queues: Queues, settings: Mapping[str, Any]) -> dict[str, str]:
    given = {
        "broker": queues.address,
        "queue_incoming": queues.incoming,
        "queue_outgoing": queues.outgoing,
        "timeout_queue_incoming": LONG,
        **settings,
    }
    return {name: str(value) for name, value in given.items()}


def given(queues: Queues, directory: Path, settings: Mapping[str, Any]) -> str:
    """Write settings, with these queues, to a file for a pilot of `bench.inside`; give its path."""
    path = directory / "settings.json"
    path.write_text(json.dumps(_known(queues, settings)))
    return str(path)


def pilot(settings: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Start:
    """Give what starts a pilot with these settings."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in _known(queues, settings).items()]
        with running([str(COMMAND), "run", *flags], directory, {**variables(), **(env or {})}) as process:
            yield process
            process.end()

    return start


def telling(module: str, settings: Mapping[str, Any], env: Mapping[str, str], tell: Callable[[Any], object]) -> Start:
    """Give what starts the pilot of a module of ours, and in the end tells what that has written, as JSON."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        found = directory / "found.json"
        command = [sys.executable, "-m", module, given(queues, directory, settings), str(found)]
        with running(command, directory, {**variables(), **(env or {}), "PYTHONPATH": str(ROOT)}) as process:
            yield process
            process.end()
        tell(json.loads(found.read_text()))

    return start


def stubbed(settings: Mapping[str, Any], prefix: Sequence[str] = (), tell: Callable[[str], object] = len) -> Start:
    """Give what starts a pilot whose tasks are stubs, and in the end tells what it has said."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        command = [*prefix, sys.executable, "-m", "bench.stubbed", given(queues, directory, settings)]
        with running(command, directory, {**variables(), "PYTHONPATH": str(ROOT)}) as process:
            yield process
            process.end()
            tell(process.said())

    return start
