"""Measure events per second by runtime, number of slots, length of a task, and size of an event.

The time is that from the first event taken to the last result that the broker has confirmed; the queue is full before. For
tasks that take time, the utilisation is the part of the slots' time in which a task did what it was asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.broker import RabbitServer
from bench.figures import Figure, Label
from bench.load import Load
from bench.measurement import measure_runtimes, print_progress, report
from bench.pilot import pilot, task_args
from bench.report import Report
from bench.runtimes import Runtime

COST = {"process": 0.004, "bubblewrap": 0.012, "apptainer": 0.1, "docker": 0.13, "podman": 0.3}  # CPU seconds of a task
BYTE = 20e-9  # CPU seconds for each byte of an event, including those of the broker


@dataclass(frozen=True, slots=True)
class Plan:
    """The points to measure: each length of task with 1 kB events, each size of event with tasks that take no time."""

    runtimes: tuple[str, ...] = ("process", "bubblewrap")
    slots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seconds: tuple[float, ...] = (0, 0.01, 0.1, 1, 10)
    sizes: tuple[int, ...] = (20, 1000, 1_000_000)
    rounds: int = 3
    length: float = 2  # seconds that a run should take
    waves: int = 2  # least number of tasks for each slot


FULL = Plan()
QUICK = Plan(slots=(4,), seconds=(0, 1), sizes=(1000, 1_000_000), rounds=1, length=1)


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""

    def of(runtime: Runtime) -> Iterator[Figure]:
        for point in points(plan):
            yield from _figures(plan, runtime, server, point)

    figures, programs = measure_runtimes(plan.runtimes, of)
    return report("throughput", figures, plan, server, **programs)


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of the conditions of a plan."""

    slots: int
    seconds: float  # of a task
    size: int  # bytes of an event


def points(plan: Plan) -> Iterator[Point]:
    """Yield the points of a plan."""
    for slots in plan.slots:
        yield from (Point(slots, seconds, 1000) for seconds in plan.seconds)
        yield from (Point(slots, 0, size) for size in plan.sizes if size != 1000)


def _figures(plan: Plan, runtime: Runtime, server: RabbitServer, point: Point) -> Iterator[Figure]:
    slots, seconds, size = point.slots, point.seconds, point.size
    load = Load(events(plan, COST[runtime.name] + size * BYTE, slots, seconds), size, sleeps=seconds > COST[runtime.name])
    settings: dict[str, Any] = {"max_concurrent_tasks": slots, "task_args": task_args(seconds), **runtime.settings}
    runs = [load.done_by(pilot(settings, runtime.env), server) for _ in range(plan.rounds)]
    labels: dict[str, Label] = {"runtime": runtime.name, "slots": slots, "task s": seconds, "bytes": size}
    rate = Figure({**labels, "what": "events"}, "1/s", [run.rate for run in runs])
    print_progress(f"{labels}: {rate.median:.1f}/s")
    yield rate
    if seconds:
        yield Figure({**labels, "what": "utilisation"}, "%", [100 * seconds * run.rate / slots for run in runs])


def events(plan: Plan, cost: float, slots: int, seconds: float) -> int:
    """Return how many events keep the slots, and two cores, busy for about as long as a run should take."""
    each = max(cost / min(slots, 2), (seconds + cost) / slots)
    return max(slots * plan.waves, round(plan.length / each))
