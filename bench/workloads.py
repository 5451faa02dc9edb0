"""Measure two real workloads, with times divided so that each takes minutes.

`sky scan`: 3,072 events of 1 kB (the pixels of a map), an init container that fetches a file of 500 kB, run times with a
heavy tail, and a task timeout after which events of slow nodes are run on others. One of its pilots is on a slow node.

`condor benchmark`: EWMS's own test of pools: tasks of 60 s on average, by a Poisson distribution, of which 1 % fail.
"""

import math
import random
import shlex
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench.broker import Queues, RabbitServer, open_queues
from bench.figures import Figure, Label
from bench.measured_process import Measured
from bench.measurement import print_progress, report
from bench.pilot import pilot
from bench.report import Report

SIZE = 1000  # bytes of an event
FILE = bytes(500_000)  # what the init container fetches

SLOWNESS = 10  # of the slow node
TIMEOUT = 4.0  # time limit of a task of the sky scan, in medians of its run times

# The first word of an event is its run time in seconds. An event that fails does so once on each pilot.
SLEEP = 'read -r seconds rest < "$EWMS_TASK_INFILE"; sleep "$seconds"; '
SLOW_SLEEP = f'read -r seconds rest < "$EWMS_TASK_INFILE"; for _ in $(seq {SLOWNESS}); do sleep "$seconds"; done; '
FAIL = 'read -r _ number fails _ < "$EWMS_TASK_INFILE"; '
FAIL += (
    '[ "$fails" = 0 ] || [ -e "$EWMS_TASK_DATA_HUB_DIR/$number" ] || { : > "$EWMS_TASK_DATA_HUB_DIR/$number"; exit 1; }; '
)
COPY = 'cp "$EWMS_TASK_INFILE" "$EWMS_TASK_OUTFILE"'


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of the workloads."""

    pilots: int = 4
    slots: int = 4  # of each pilot
    pixels: int = 3072
    pixel: float = 0.25  # median seconds of the sky scan's tasks
    tasks: int = 1000
    task: float = 0.6  # mean seconds of the condor benchmark's tasks
    rounds: int = 1


FULL = Plan()
QUICK = Plan(pilots=2, pixels=64, tasks=40, task=0.3)


@dataclass(frozen=True, slots=True)
class Workload:
    """Events, each as (number, seconds, whether it fails at first), and the settings of each pilot."""

    name: str
    events: Sequence[tuple[int, float, bool]]
    pilots: Sequence[Mapping[str, Any]]
    ideal: float  # seconds that the good slots would need if pilots cost nothing


def measure(plan: Plan, server: RabbitServer) -> Report:
    """Measure both workloads."""
    figures = []
    with _file_server() as address:
        for make in (partial(sky_scan, plan, address), partial(condor_benchmark, plan)):
            took = [_makespan(make(), server) for _ in range(plan.rounds)]
            figures += list(_figures(make(), took))
    return report("workloads", figures, plan, server)


def _figures(workload: Workload, took: Sequence[float]) -> Iterator[Figure]:
    labels: dict[str, Label] = {"workload": workload.name, "pilots": len(workload.pilots)}
    yield Figure({**labels, "what": "from start to last result"}, "s", took)
    yield Figure({**labels, "what": "if pilots cost nothing"}, "s", [workload.ideal])
    yield Figure(
        {**labels, "what": "utilisation of the good slots"}, "%", [100 * workload.ideal / seconds for seconds in took]
    )
    print_progress(f"{workload.name}: {took[-1]:.1f} s, ideal {workload.ideal:.1f} s")


def sky_scan(plan: Plan, address: str) -> Workload:
    """Return the sky scan; the first of its pilots is on a slow node."""
    chance = random.Random(2)
    times = [min(plan.pixel * chance.lognormvariate(0, 0.5), 0.8 * TIMEOUT * plan.pixel) for _ in range(plan.pixels)]
    fetch = (
        f'import os, urllib.request; urllib.request.urlretrieve("{address}", os.environ["EWMS_TASK_DATA_HUB_DIR"] + "/file")'
    )
    settings = {
        "task_timeout": TIMEOUT * plan.pixel,
        "init_args": shlex.join(["python3", "-c", fetch]),
        "max_concurrent_tasks": plan.slots,
        "kill_grace": 0.1,
    }
    slow = {**settings, "task_args": shlex.join(["sh", "-c", SLOW_SLEEP + COPY])}
    good = {**settings, "task_args": shlex.join(["sh", "-c", SLEEP + COPY]), "okay_errors": "TimeoutError"}
    events = [(number, seconds, False) for number, seconds in enumerate(times)]
    return Workload("sky scan", events, [slow, *[good] * (plan.pilots - 1)], _ideal(events, plan.slots * (plan.pilots - 1)))


def condor_benchmark(plan: Plan) -> Workload:
    """Return the condor benchmark."""
    chance = random.Random(3)
    events = [(number, _poisson(chance, 60) * plan.task / 60, chance.random() < 0.01) for number in range(plan.tasks)]
    settings = {
        "task_args": shlex.join(["sh", "-c", SLEEP + FAIL + COPY]),
        "max_concurrent_tasks": plan.slots,
        "stop_listening_on_task_error": "false",
    }
    return Workload("condor benchmark", events, [settings] * plan.pilots, _ideal(events, plan.slots * plan.pilots))


def _ideal(events: Sequence[tuple[int, float, bool]], slots: int) -> float:
    return sum(seconds * (2 if fails else 1) for _, seconds, fails in events) / slots


def _poisson(chance: random.Random, mean: float) -> int:
    """Return a random number (Knuth, The Art of Computer Programming 2, 3.4.1)."""
    limit, number, product = math.exp(-mean), 0, chance.random()
    while product > limit:
        number, product = number + 1, product * chance.random()
    return number


def _text(number: int, seconds: float, fails: bool) -> str:
    return f"{seconds:.3f} {number} {int(fails)} ".ljust(SIZE - 1, "x") + "\n"


def _makespan(workload: Workload, server: RabbitServer) -> float:
    """Start all pilots at once on a full queue; return the seconds until the last result. Each result may come only once."""
    texts = [_text(*event) for event in workload.events]
    with open_queues(server) as queues, tempfile.TemporaryDirectory(prefix="trio-pilot-bench-") as directory:
        queues.fill(texts)
        with ExitStack() as stack:
            pilots = [
                stack.enter_context(_started(queues, Path(directory), each, given))
                for each, given in enumerate(workload.pilots)
            ]
            started = time.monotonic()
            while queues.ready(queues.outgoing) < len(texts):
                pilots[-1].assert_alive()
                time.sleep(0.05)
            seconds = time.monotonic() - started
        wrong = Counter(queues.results()) - Counter(texts)
        assert not wrong, f"{workload.name}: {sum(wrong.values())} results too many"
    return seconds


@contextmanager
def _started(queues: Queues, directory: Path, number: int, settings: Mapping[str, Any]) -> Iterator[Measured]:
    place = directory / f"pilot-{number}"
    place.mkdir()
    with pilot({"runtime": "process", **settings})(queues, place) as process:
        yield process


class _File(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(FILE)))
        self.end_headers()
        self.wfile.write(FILE)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def _file_server() -> Iterator[str]:
    """Serve the file; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _File) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/file"
        finally:
            http.shutdown()
