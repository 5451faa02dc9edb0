"""The least that does the work of a pilot with an engine: threads that take events, run containers, publish and acknowledge.

The cost of the broker on the same cores is included. Nothing handles a task that fails, an engine that does not answer, a
signal, or leftovers.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from bench import without_pilot
from bench.broker import Queues, RabbitServer, open_queues, open_serial_worker
from bench.load import Load
from bench.runtimes import Runtime
from trio_pilot.cleanup.engine_containers import UnixConnection
from trio_pilot.files import task_directory
from trio_pilot.files.task_directory import TaskFiles

METHOD = "Engine API and RabbitMQ"

Tasks = Iterator[tuple[int, TaskFiles]]


def rate(runtime: Runtime, recording: without_pilot.Recording, slots: int, tasks: int, server: RabbitServer) -> float:
    """Run so many tasks, `slots` at once; return the tasks per second, from the first event taken as with a pilot."""
    load = Load(tasks)
    with without_pilot.open_task_directories(tasks) as (root, all_files), open_queues(server) as queues:
        queues.fill(load.bodies())
        requests = json.dumps(without_pilot.adapted_to(root, recording)["requests"])
        remaining = enumerate(all_files)  # shared by the threads: `next` is atomic
        with ThreadPoolExecutor(slots) as threads:
            work = [threads.submit(_run_tasks, runtime.socket, requests, remaining, server, queues) for _ in range(slots)]
        load.check(queues)
    moments = [moment for thread in work for moment in thread.result()]
    return tasks / (max(moments) - min(moments))


def _run_tasks(socket: Path, requests: str, remaining: Tasks, server: RabbitServer, queues: Queues) -> list[float]:
    """Run one task after the other; return the times at which each event was received and settled."""
    moments = []
    with closing(UnixConnection(socket, without_pilot.TIMEOUT)) as engine, open_serial_worker(server, queues) as worker:
        for number, files in remaining:
            event = worker.receive()
            moments.append(time.monotonic())
            task_directory.write_infile(files, event)
            without_pilot.run_container(engine, requests, number)
            worker.send_result(files.outfile_path.read_text())
            moments.append(time.monotonic())
    return moments
