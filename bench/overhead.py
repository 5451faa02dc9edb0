"""Measure where an event's time goes, and what an event costs the pilot's own process in CPU and instructions.

The stages of an event: `queued` (a slot between two events), `staged` (until its directory and input file are there),
`started` (until its process is), `ran`, `read` (its output), `published` (until that is confirmed) and `acked`. What an
engine needs to start a container is in `ran`. The last two need no slot; but with no more events at hand than
slots, as here, the next event comes only after them.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from bench.broker import RabbitServer
from bench.figures import Figure, Label
from bench.load import Load
from bench.measured_process import MAX_SHOWN
from bench.measurement import measure_runtimes, print_progress, report
from bench.pilot import instrumented_pilot, pilot, stub_pilot, task_args
from bench.report import Report
from bench.runtimes import Runtime
from bench.throughput import COST
from bench.timing_pilot import STAGES

CALLGRIND = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")


@dataclass(frozen=True, slots=True)
class Plan:
    """The conditions to measure."""

    runtimes: tuple[str, ...] = ("process", "bubblewrap", "docker")
    slots: tuple[int, ...] = (1, 4, 8)
    rounds: int = 3
    length: float = 5  # seconds that a run should take, roughly
    counted: tuple[int, int] = (20, 120)  # events of the two runs whose instructions are counted; (0, 0): none


FULL = Plan()
QUICK = Plan(runtimes=("process", "bubblewrap"), slots=(4,), rounds=1, length=1, counted=(0, 0))


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""

    def of(runtime: Runtime) -> Iterator[Figure]:
        for slots in plan.slots:
            yield from _figures(plan, runtime, server, slots)

    figures, programs = measure_runtimes(plan.runtimes, of)
    figures += _instructions(plan, server)
    return report("overhead", figures, plan, server, **programs)


def _figures(plan: Plan, runtime: Runtime, server: RabbitServer, slots: int) -> Iterator[Figure]:
    load = Load(max(3 * slots, round(plan.length / COST[runtime.name])))
    settings = {"max_concurrent_tasks": slots, "task_args": task_args(0), **runtime.settings}
    labels: dict[str, Label] = {"runtime": runtime.name, "slots": slots}
    runs = [load.done_by(pilot(settings, runtime.env), server) for _ in range(plan.rounds)]
    yield Figure({**labels, "what": "CPU of the pilot"}, "ms", [1000 * run.cpu / load.events for run in runs])
    times: list[dict[str, float]] = []
    for _ in range(plan.rounds):
        load.done_by(instrumented_pilot("bench.timing_pilot", settings, runtime.env, times.append), server)
    for stage in STAGES:
        yield Figure({**labels, "what": stage}, "ms", [1000 * time[stage] for time in times])
    print_progress(f"{labels}: {', '.join(f'{stage} {1000 * times[-1][stage]:.2f} ms' for stage in STAGES)}")


def _instructions(plan: Plan, server: RabbitServer) -> Iterator[Figure]:
    """Count the instructions of two runs; their difference is the cost of the additional events.

    valgrind does not support pidfd_open(2), which the pilot needs for child processes, so the tasks are stubs.
    """
    few, many = plan.counted
    if not many:
        return
    if not shutil.which("valgrind"):
        print_progress("left out: instructions: valgrind is not installed")
        return
    less, more = (_counted(number, server) for number in (few, many))
    yield Figure({"runtime": "stub", "slots": 1, "what": "instructions of the pilot"}, "M", [(more - less) / (many - few)])


def _counted(events: int, server: RabbitServer) -> float:
    """Return the instructions, in millions, of a pilot that does so many events."""
    outputs: list[str] = []
    Load(events).done_by(stub_pilot({}, CALLGRIND, outputs.append), server)
    found = re.search(r"Collected : (\d+)", outputs[0])
    assert found, f"no count of callgrind in the output: {outputs[0][-MAX_SHOWN:]}"
    return int(found[1]) / 1e6
