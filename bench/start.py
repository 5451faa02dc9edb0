"""Measure start and end: the time to import the pilot, to its first result and to its end, and its CPU use when idle."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.broker import Queues, RabbitServer, open_queues
from bench.figures import Figure, alternate
from bench.measurement import print_progress, report
from bench.pilot import pilot, task_args
from bench.report import Report

# All modules that a run with RabbitMQ and a container has imported before its first event: with its settings in the
# environment, and with flags.
RUN = "trio_pilot.cli.run, trio_pilot.cli.load_settings, trio_pilot.brokers.rabbitmq, trio_pilot.runtimes.bubblewrap"
IMPORTS = {
    "import of all that a run needs": f"import trio_pilot.cli.main, {RUN}",
    "import of all that a run with flags needs": f"import trio_pilot.cli.main, trio_pilot.cli.app, {RUN}",
}

IDLE = 1.0  # seconds after which an idle pilot ends
SLOTS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """The conditions to measure."""

    rounds: int = 11
    idle: float = 20  # seconds for which the CPU use of an idle pilot is measured


FULL = Plan()
QUICK = Plan(rounds=3, idle=2)


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""
    figures = [*_imports(plan), *_durations(plan, server), _idle(plan, server)]
    for figure in figures:
        print_progress(f"{figure.labels['what']}: {figure.median:.3g} {figure.unit}")
    return report("start", figures, plan, server)


def _imports(plan: Plan) -> Iterator[Figure]:
    for what, samples in alternate(
        plan.rounds, {what: partial(_import_time, code) for what, code in IMPORTS.items()}
    ).items():
        yield Figure({"what": what}, "ms", samples)


def _import_time(code: str) -> float:
    """Return the milliseconds of an import, measured in the interpreter: to unload all modules takes another tenth."""
    program = f"import time; started = time.monotonic(); {code}; print(time.monotonic() - started)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return 1000 * float(done.stdout)


def _durations(plan: Plan, server: RabbitServer) -> Iterator[Figure]:
    sides: dict[str, Callable[[], float]] = {
        "start to listening": partial(_with_queues, server, _listening),
        "start to first result": partial(_with_queues, server, _first_result),
        "end after the idle timeout": partial(_with_queues, server, _end_when_idle),
        f"end by SIGTERM of {SLOTS} running tasks, without grace": partial(_with_queues, server, _end_by_signal),
    }
    for what, samples in alternate(plan.rounds, sides).items():
        yield Figure({"what": what}, "ms", [1000 * seconds for seconds in samples])


def _with_queues(server: RabbitServer, measurement: Callable[[Queues, Path], float]) -> float:
    with open_queues(server) as queues, tempfile.TemporaryDirectory(prefix="trio-pilot-bench-") as directory:
        return measurement(queues, Path(directory))


def _listening(queues: Queues, directory: Path) -> float:
    with pilot(_settings())(queues, directory) as process:
        return process.wait_for("listening") - process.started


def _first_result(queues: Queues, directory: Path) -> float:
    queues.fill(["event"])
    with pilot(_settings())(queues, directory) as process:
        queues.wait_for(queues.outgoing, 1, 0.002)
        return time.monotonic() - process.started


def _end_when_idle(queues: Queues, directory: Path) -> float:
    with pilot(_settings(timeout_queue_incoming=IDLE))(queues, directory) as process:
        listening = process.wait_for("listening")
        process.process.wait()
        return time.monotonic() - listening - IDLE


def _end_by_signal(queues: Queues, directory: Path) -> float:
    queues.fill(str(number) for number in range(SLOTS))
    settings = _settings(task_args=task_args(60), max_concurrent_tasks=SLOTS, grace=0)
    with pilot(settings)(queues, directory) as process:
        while len(list(directory.glob("ewms-pilot-data/*/outputs/stdoutfile"))) < SLOTS:
            process.assert_alive()
            time.sleep(0.005)
        process.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        process.process.wait()
        seconds = time.monotonic() - signalled
    queues.wait_for(queues.incoming, SLOTS)  # all events are given back
    return seconds


def _idle(plan: Plan, server: RabbitServer) -> Figure:
    return Figure({"what": "CPU of an idle pilot"}, "%", [_with_queues(server, partial(_idle_cpu, plan.idle))])


def _idle_cpu(seconds: float, queues: Queues, directory: Path) -> float:
    with pilot(_settings())(queues, directory) as process:
        process.wait_for("listening")
        time.sleep(1)
        before = process.cpu()
        time.sleep(seconds)
        return 100 * (process.cpu() - before) / seconds


def _settings(**more: Any) -> dict[str, Any]:
    return {"runtime": "process", "task_args": task_args(0), **more}
