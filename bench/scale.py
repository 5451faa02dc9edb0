"""Measure scale: one pilot after many events, several pilots on one queue, and many idle pilots on one broker.

The cost of one more idle pilot for the broker is multiplied by 10,000, as a projection on paper. Nearly all of that memory
is buffers: RabbitMQ makes that of each connection as large as the kernel's (tcp_listen_options.recbuf and .sndbuf set it).
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from bench.broker import Queues, RabbitServer, open_queues
from bench.figures import Figure
from bench.load import Load, Start
from bench.measured_process import Measured
from bench.measurement import print_progress, report
from bench.pilot import pilot, task_args
from bench.report import Report

SETTINGS = {"runtime": "process", "task_args": task_args(0), "max_concurrent_tasks": 8}
PROJECTED = 10_000  # pilots
LISTENING_TIMEOUT = 300.0  # seconds for all pilots to start, or to reconnect
UNLIMITED = 3600  # seconds
STEP = 4  # pilots that are started at once
POLL_INTERVAL = 0.2  # seconds between two counts of the connections

# Queries to the broker: its memory in bytes, and the number of its connections.
MEMORY = "[erlang:garbage_collect(Process) || Process <- processes()], erlang:memory(total)."
CONNECTIONS = "length(rabbit_networking:connections())."
UNITS = {"memory of the machine": "MB", "memory of the broker": "MB", "connections": ""}


@dataclass(frozen=True, slots=True)
class Plan:
    """The conditions to measure."""

    events: tuple[int, ...] = (1000, 10_000, 100_000)  # done by one pilot before each reading
    pilots: tuple[int, ...] = (1, 2, 4, 8)  # on one queue
    shared: int = 4000  # events in that queue
    idle: int = 200  # pilots; if 0, the broker is not restarted either
    rounds: int = 3


FULL = Plan()
QUICK = Plan(events=(500, 2000), pilots=(1, 2), shared=600, idle=4, rounds=1)


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""
    figures = []
    for figure in chain(_growth(plan, server), _together(plan, server), _idle(plan, server) if plan.idle else ()):
        print_progress(f"{dict(figure.labels)}: {figure.median:.4g} {figure.unit}")
        figures.append(figure)
    return report("scale", figures, plan, server)


def _growth(plan: Plan, server: RabbitServer) -> Iterator[Figure]:
    """Measure one pilot each time that it has done so many events."""
    settings = {**SETTINGS, "timeout_queue_incoming": UNLIMITED}
    with open_queues(server) as queues, _directory() as directory, pilot(settings)(queues, Path(directory)) as process:
        process.wait_for("listening")
        done, cpu = 0, process.cpu()
        for events in plan.events:
            load = Load(events - done)
            for body in load.bodies():
                queues.put(body)
            load.wait(queues, process, time.monotonic())
            labels = {"pilots": 1, "events": events}
            yield Figure({**labels, "what": "memory of the pilot"}, "MB", [process.memory()])
            yield Figure({**labels, "what": "CPU an event"}, "ms", [1000 * (process.cpu() - cpu) / (events - done)])
            load.check(queues)
            done, cpu = events, process.cpu()


def _together(plan: Plan, server: RabbitServer) -> Iterator[Figure]:
    """Measure several pilots on one queue. On one machine they share its cores, so the total should not change."""
    for number in plan.pilots:
        rates = [Load(plan.shared).done_by(_several(number), server).rate for _ in range(plan.rounds)]
        yield Figure({"pilots": number, "events": plan.shared, "what": "events"}, "1/s", rates)


def _several(number: int) -> Start:
    """Return a function that starts so many pilots, and yields the first."""

    @contextmanager
    def start(queues: Queues, directory: Path) -> Iterator[Measured]:
        with ExitStack() as stack:
            first, *_ = _pilots(stack, queues, directory, number)
            yield first

    return start


def _pilots(stack: ExitStack, queues: Queues, directory: Path, number: int, **settings: Any) -> Iterator[Measured]:
    start = pilot({**SETTINGS, **settings})
    for each in range(number):
        place = directory / f"pilot-{each}"
        place.mkdir()
        yield stack.enter_context(start(queues, place))


def _idle(plan: Plan, server: RabbitServer) -> Iterator[Figure]:
    """Measure many idle pilots on one broker, which is then killed and started again."""
    with open_queues(server) as queues, _directory() as directory, ExitStack() as stack:
        least = _state(server)
        pilots = _pilots(
            stack, queues, Path(directory), plan.idle, timeout_queue_incoming=UNLIMITED, broker_patience=UNLIMITED
        )
        started = []
        for process in pilots:
            started.append(process)
            if len(started) % STEP == 0 or len(started) == plan.idle:
                process.wait_for("listening", LISTENING_TIMEOUT)
        _wait_for_connections(server, 2 * plan.idle + 1)
        costs = {what: (amount - least[what]) / plan.idle for what, amount in _state(server).items()}
        for what, cost in costs.items():
            yield Figure({"pilots": plan.idle, "what": f"{what} of an idle pilot"}, UNITS[what], [cost])
            if what != "memory of the machine":
                yield Figure({"pilots": PROJECTED, "what": f"{what}, on paper"}, UNITS[what], [PROJECTED * cost])
        yield from _restart(plan, server)
        for process in started:
            process.process.terminate()


def _state(server: RabbitServer) -> dict[str, float]:
    available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
    return {
        "memory of the machine": -int(available) * 1024 / 1e6,
        "memory of the broker": int(server.evaluate(MEMORY)) / 1e6,
        "connections": int(server.evaluate(CONNECTIONS)),
    }


def _restart(plan: Plan, server: RabbitServer) -> Iterator[Figure]:
    """Restart the broker; measure how long its pilots take to reconnect, and how many connect in the worst second."""
    server.kill()
    server.start()
    seen = _wait_for_connections(server, 2 * plan.idle)
    worst = max(later[1] - earlier[1] for earlier in seen for later in seen if 0 <= later[0] - earlier[0] <= 1)
    labels = {"pilots": plan.idle}
    yield Figure({**labels, "what": "restarted broker: until all are back"}, "s", [seen[-1][0] - seen[0][0]])
    yield Figure({**labels, "what": "restarted broker: connections in its worst second"}, "1/s", [worst])


def _wait_for_connections(server: RabbitServer, wanted: int) -> list[tuple[float, int]]:
    """Wait until there are so many connections; return their number at each time of counting."""
    deadline = time.monotonic() + LISTENING_TIMEOUT
    seen = [(time.monotonic(), 0)]
    while seen[-1][1] < wanted:
        assert time.monotonic() < deadline, f"{seen[-1][1]} of {wanted} connections after {LISTENING_TIMEOUT:g} s"
        time.sleep(POLL_INTERVAL)
        seen.append((time.monotonic(), int(server.evaluate(CONNECTIONS))))
    return seen


def _directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="trio-pilot-bench-")
