"""How near to the limit: the pilot, with its broker on the same cores, against the same commands with no pilot at all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bench import bare, fed
from bench.broker import RabbitServer
from bench.figures import Figure, alternate, compared
from bench.load import Load
from bench.measure import of_runtimes, report, say
from bench.pilot import AHEAD, OURS, pilot, task
from bench.report import Report
from bench.runtimes import Runtime
from bench.throughput import COST


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared."""

    runtimes: tuple[str, ...] = ("process", "bubblewrap", "docker")
    slots: tuple[int, ...] = (1, 4)
    rounds: int = 7
    length: float = 8  # seconds that a run is to take, roughly
    pause: float = 1  # seconds before each


FULL = Plan()
QUICK = Plan(runtimes=("process", "bubblewrap"), slots=(4,), rounds=2, length=1, pause=0)


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""

    def of(runtime: Runtime) -> Iterator[Figure]:
        for slots in plan.slots:
            yield from _figures(plan, runtime, server, slots)

    figures, programs = of_runtimes(plan.runtimes, of)
    return report("limit", figures, plan, server, **programs)


def _figures(plan: Plan, runtime: Runtime, server: RabbitServer, slots: int) -> Iterator[Figure]:
    tasks = max(8 * slots, round(plan.length / COST[runtime.name]))
    settings = {"max_concurrent_tasks": slots, "prefetch": slots + AHEAD, "task_args": task(0), **runtime.settings}
    notes, start = bare.notes(settings, runtime.env, server), pilot(settings, runtime.env)
    sides: dict[str, Callable[[], float]] = {
        way: partial(bare.rate, way, runtime, notes, slots, tasks) for way in bare.ways(runtime)
    }
    if bare.API in sides:
        sides[fed.WAY] = partial(fed.rate, runtime, notes, slots, tasks, server)
    sides[OURS] = lambda: Load(tasks).done_by(start, server).rate
    samples = alternate(plan.rounds, sides, plan.pause)
    for figure in compared({"runtime": runtime.name, "slots": slots}, "1/s", samples, OURS):
        say(f"{dict(figure.labels)}: {figure.median:.3g} {figure.unit}")
        yield figure
