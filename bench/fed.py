"""The least that does what a pilot does with an engine: threads that take events, run containers, publish and acknowledge.

What the broker on the same cores costs is in it, and nothing else: nobody sees to a task that fails, an engine that is away,
a signal, or what is left behind.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from bench import bare
from bench.broker import Queues, RabbitServer, open_hand, open_queues
from bench.load import Load
from bench.runtimes import Runtime
from trio_pilot.cleanup.engine_containers import UnixConnection
from trio_pilot.files import task_directory
from trio_pilot.files.task_directory import TaskFiles

WAY = "Engine API and RabbitMQ"

Tasks = Iterator[tuple[int, TaskFiles]]


def rate(runtime: Runtime, noted: bare.Notes, slots: int, tasks: int, server: RabbitServer) -> float:
    """Do that many tasks, so many at once; give the tasks a second, as of a pilot: from the first event that is taken."""
    load = Load(tasks)
    with bare.directories(tasks) as (root, all_files), open_queues(server) as queues:
        queues.fill(load.bodies())
        requests = json.dumps(bare.for_tasks_in(root, noted)["requests"])
        left = enumerate(all_files)  # to take the next of it is atomic
        with ThreadPoolExecutor(slots) as threads:
            working = [threads.submit(_work, runtime.socket, requests, left, server, queues) for _ in range(slots)]
        load.check(queues)
    moments = [moment for each in working for moment in each.result()]
    return tasks / (max(moments) - min(moments))


def _work(socket: Path, requests: str, left: Tasks, server: RabbitServer, queues: Queues) -> list[float]:
    """Do one task after the other; tell when each event was there, and when it was settled."""
    moments = []
    with closing(UnixConnection(socket, bare.TIMEOUT)) as engine, open_hand(server, queues) as hand:
        for number, files in left:
            event = hand.take()
            moments.append(time.monotonic())
            task_directory.write_infile(files, event)
            bare.run_by_api(engine, requests, number)
            hand.give(files.outfile_path.read_text())
            moments.append(time.monotonic())
    return moments
