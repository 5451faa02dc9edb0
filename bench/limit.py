"""Compare the pilot, with its broker on the same cores, to the same commands started without any pilot: the limit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bench import minimal_pilot, without_pilot
from bench.broker import RabbitServer
from bench.figures import Figure, alternate, compared
from bench.load import Load
from bench.measurement import measure_runtimes, print_progress, report
from bench.pilot import EXTRA_PREFETCH, TRIO_PILOT, pilot, task_args
from bench.report import Report
from bench.runtimes import Runtime
from bench.throughput import COST


@dataclass(frozen=True, slots=True)
class Plan:
    """The conditions to measure."""

    runtimes: tuple[str, ...] = ("process", "bubblewrap", "docker")
    slots: tuple[int, ...] = (1, 4)
    rounds: int = 7
    length: float = 8  # seconds that a run should take, roughly
    pause: float = 1  # seconds before each run


FULL = Plan()
QUICK = Plan(runtimes=("process", "bubblewrap"), slots=(4,), rounds=2, length=1, pause=0)


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""

    def of(runtime: Runtime) -> Iterator[Figure]:
        for slots in plan.slots:
            yield from _figures(plan, runtime, server, slots)

    figures, programs = measure_runtimes(plan.runtimes, of)
    return report("limit", figures, plan, server, **programs)


def _figures(plan: Plan, runtime: Runtime, server: RabbitServer, slots: int) -> Iterator[Figure]:
    tasks = max(8 * slots, round(plan.length / COST[runtime.name]))
    settings = {
        "max_concurrent_tasks": slots,
        "prefetch": slots + EXTRA_PREFETCH,
        "task_args": task_args(0),
        **runtime.settings,
    }
    recording, start = without_pilot.record_pilot(settings, runtime.env, server), pilot(settings, runtime.env)
    sides: dict[str, Callable[[], float]] = {
        method: partial(without_pilot.rate, method, runtime, recording, slots, tasks)
        for method in without_pilot.methods(runtime)
    }
    if without_pilot.API in sides:
        sides[minimal_pilot.METHOD] = partial(minimal_pilot.rate, runtime, recording, slots, tasks, server)
    sides[TRIO_PILOT] = lambda: Load(tasks).done_by(start, server).rate
    samples = alternate(plan.rounds, sides, plan.pause)
    for figure in compared({"runtime": runtime.name, "slots": slots}, "1/s", samples, TRIO_PILOT):
        print_progress(f"{dict(figure.labels)}: {figure.median:.3g} {figure.unit}")
        yield figure
