"""trio-pilot as a side of a measurement: functions that start it, as it is or with some of its parts replaced."""

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
from bench.measured_process import Measured, running
from bench.report import ROOT

COMMAND = Path(sys.executable).with_name("trio-pilot")
TRIO_PILOT = "trio-pilot"  # the name of the side
EXTRA_PREFETCH = 24  # events at hand beyond the slots, as the README advises for short tasks
IDLE_TIMEOUT = 120  # seconds without an event; the pilot is ended as soon as the last result is there

COPY = 'cp "$EWMS_TASK_INFILE" "$EWMS_TASK_OUTFILE"'


def task_args(seconds: float) -> str:
    """Return the arguments of a task that takes so many seconds, and then copies its input to its output."""
    return shlex.join(["sh", "-c", f"sleep {seconds:g}; {COPY}"]) if seconds else "cp {{INFILE}} {{OUTFILE}}"


def environment() -> dict[str, str]:
    """Return the environment without any settings of a pilot."""
    return {name: value for name, value in os.environ.items() if "EWMS" not in name}


def _with_queues(queues: Queues, settings: Mapping[str, Any]) -> dict[str, str]:
    merged = {
        "broker": queues.address,
        "queue_incoming": queues.incoming,
        "queue_outgoing": queues.outgoing,
        "timeout_queue_incoming": IDLE_TIMEOUT,
        **settings,
    }
    return {name: str(value) for name, value in merged.items()}


def write_settings(queues: Queues, directory: Path, settings: Mapping[str, Any]) -> str:
    """Write settings, with these queues, to a file for a pilot of `bench.custom_pilot`; return its path."""
    path = directory / "settings.json"
    path.write_text(json.dumps(_with_queues(queues, settings)))
    return str(path)


def pilot(settings: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Start:
    """Return a function that starts a pilot with these settings."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in _with_queues(queues, settings).items()]
        with running([str(COMMAND), "run", *flags], directory, {**environment(), **(env or {})}) as process:
            yield process
            process.end()

    return start


def instrumented_pilot(
    module: str, settings: Mapping[str, Any], env: Mapping[str, str], take_result: Callable[[Any], object]
) -> Start:
    """Return a function that starts the pilot of a module, and at the end calls `take_result` with the JSON it wrote."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        result = directory / "result.json"
        command = [sys.executable, "-m", module, write_settings(queues, directory, settings), str(result)]
        with running(command, directory, {**environment(), **(env or {}), "PYTHONPATH": str(ROOT)}) as process:
            yield process
            process.end()
        take_result(json.loads(result.read_text()))

    return start


def stub_pilot(settings: Mapping[str, Any], prefix: Sequence[str] = (), take_output: Callable[[str], object] = len) -> Start:
    """Return a function that starts a pilot whose tasks are stubs, and at the end calls `take_output` with its output."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        command = [*prefix, sys.executable, "-m", "bench.stub_pilot", write_settings(queues, directory, settings)]
        with running(command, directory, {**environment(), "PYTHONPATH": str(ROOT)}) as process:
            yield process
            process.end()
            take_output(process.output())

    return start
