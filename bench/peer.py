"""Compare the pilot to ewms-pilot, with the same broker, engine and events; the results of both are checked.

Both sides run with two settings of the prefetch, and the better of the two counts in each round.

`stand-in` is the cheapest runtime that ewms-pilot can have: a shell script instead of apptainer that starts a plain process.
trio-pilot runs the same script by its runtime `process`.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.broker import RabbitServer
from bench.ewms_pilot import STAND_IN_ARGS, VERSION, ewms_pilot, platform, stand_in
from bench.figures import Figure, alternate, compared
from bench.load import Load, Start
from bench.measurement import print_progress, report, runtime_or_none
from bench.pilot import EXTRA_PREFETCH, TRIO_PILOT, pilot, task_args
from bench.report import Report
from bench.runtimes import Runtime


@dataclass(frozen=True, slots=True)
class Plan:
    """The conditions to measure: engines, the number of events of a run with each, and the numbers of slots."""

    engines: tuple[tuple[str, int, tuple[int, ...]], ...] = (
        ("stand-in", 200, (1,)),
        ("stand-in", 40, (2, 4, 8, 16)),  # ewms-pilot does about ten of these a second
        ("apptainer", 16, (1, 4)),
        ("docker", 12, (1, 4)),
    )
    rounds: int = 3


FULL = Plan()
QUICK = Plan((("stand-in", 30, (1, 4)),), rounds=1)

EWMS_PILOT = "ewms-pilot"


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure all of the plan."""
    figures, programs = [], {"ewms-pilot": VERSION}
    for name, events, all_slots in plan.engines:
        with _engine(name) as engine:
            if engine:
                programs[name] = engine.version
                figures += [figure for slots in all_slots for figure in _figures(plan, engine, server, slots, events)]
    return report("peer", figures, plan, server, **programs)


@contextmanager
def _engine(name: str) -> Iterator[Runtime | None]:
    if name != "stand-in":
        with runtime_or_none(name) as runtime:
            yield runtime
        return
    with tempfile.TemporaryDirectory(prefix="trio-pilot-bench-stand-in-") as directory:
        stand_in(Path(directory))
        yield Runtime(name, {"runtime": "process"}, "", {"PATH": f"{directory}:{os.environ['PATH']}"})


def _figures(plan: Plan, engine: Runtime, server: RabbitServer, slots: int, events: int) -> Iterator[Figure]:
    prefetches = (slots, slots + EXTRA_PREFETCH)  # with fewer than slots ewms-pilot waits a second for each event
    sides = {(side, prefetch): start(engine, slots, prefetch) for side, start in SIDES.items() for prefetch in prefetches}
    found = alternate(plan.rounds, {side: partial(_rate, events, start, server) for side, start in sides.items()})
    samples = {
        side: [max(rates) for rates in zip(*(found[side, prefetch] for prefetch in prefetches), strict=True)]
        for side in SIDES
    }
    for figure in compared({"engine": engine.name, "slots": slots}, "1/s", samples, TRIO_PILOT):
        print_progress(f"{dict(figure.labels)}: {figure.median:.3g} {figure.unit}")
        yield figure


def _rate(events: int, start: Start, server: RabbitServer) -> float:
    return Load(events).done_by(start, server).rate


def _trio_pilot(engine: Runtime, slots: int, prefetch: int) -> Start:
    args = f"apptainer {STAND_IN_ARGS} {task_args(0)}" if engine.name == "stand-in" else task_args(0)
    network = {"task_network": ""} if "task_network" in engine.settings else {}  # ewms-pilot has no setting for it
    settings = {"max_concurrent_tasks": slots, "prefetch": prefetch, "task_args": args, **engine.settings, **network}
    return pilot(settings, engine.env)


def _ewms_pilot(engine: Runtime, slots: int, prefetch: int) -> Start:
    name = "docker" if engine.name == "docker" else "apptainer"
    settings = {"max_concurrent_tasks": slots, "prefetch": prefetch, "task_args": task_args(0), "task_image": engine.image}
    return ewms_pilot(settings, {**engine.env, **platform(name)})


SIDES: Mapping[str, Callable[[Runtime, int, int], Start]] = {TRIO_PILOT: _trio_pilot, EWMS_PILOT: _ewms_pilot}
