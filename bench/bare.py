"""The limit: the same commands started with no pilot at all, as fast as this machine can.

What is the same is not guessed but noted: a pilot does one event with these settings, and what its runtime has started, or
asked of an engine, is done here for other task directories. Those are made, with their input files, before the clock runs.
"""

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from bench.broker import RabbitServer
from bench.load import Load
from bench.pilot import telling
from bench.runtimes import Runtime
from trio_pilot.cleanup.engine_containers import UnixConnection
from trio_pilot.files import task_directory
from trio_pilot.files.task_directory import TaskFiles

TASK = "@task@"  # in the place of a task's name
API = "Engine API"
DATA = "/ewms-pilot-data"
TIMEOUT = 60.0  # seconds for an answer

Notes = Mapping[str, Any]  # of `bench.noted`


def ways(runtime: Runtime) -> Sequence[str]:
    """Name the ways to start a task of that runtime without a pilot."""
    return {"process": ("xargs",), "bubblewrap": ("bwrap",), "apptainer": ("apptainer",)}.get(
        runtime.name, (f"{runtime.name} run", API)
    )


def notes(settings: Mapping[str, Any], env: Mapping[str, str], server: RabbitServer) -> Notes:
    """Have a pilot with these settings do one event, and note how."""
    told: list[Notes] = []
    Load(1).done_by(telling("bench.noted", settings, env, told.append), server)
    return told[0]


def rate(way: str, runtime: Runtime, noted: Notes, slots: int, tasks: int) -> float:
    """Do that many tasks, so many at once, in that way; give the tasks a second."""
    with directories(tasks) as (root, all_files):
        same = for_tasks_in(root, noted)
        started = time.monotonic()
        if way == API:
            _by_api(runtime.socket, same["requests"], slots, tasks)
        elif way.endswith(" run"):
            _by_xargs(_run(runtime, root), {**os.environ, **runtime.env}, slots, tasks)
        else:
            _by_xargs(same["argv"], same["env"], slots, tasks, same["fds"])
        seconds = time.monotonic() - started
        done = sum(files.outfile_path.exists() for files in all_files)
    assert done == tasks, f"{way}: {done} of {tasks} tasks were done"
    return tasks / seconds


@contextmanager
def directories(tasks: int) -> Iterator[tuple[Path, Sequence[TaskFiles]]]:
    """Make the directories of tasks, which are named by numbers."""
    with tempfile.TemporaryDirectory(prefix="trio-pilot-bench-bare-") as directory:
        root = Path(directory)
        (root / "data-hub").mkdir()
        all_files = [TaskFiles(root / f"{each}", f"infile-{each}.in", f"outfile-{each}.out") for each in range(tasks)]
        for files, event in zip(all_files, Load(tasks).bodies(), strict=True):
            task_directory.make(files)
            task_directory.write_infile(files, event)
        yield root, all_files


def for_tasks_in(root: Path, noted: Notes) -> Notes:
    """Put these directories in the place of those that were noted, and TASK in that of the task's name."""
    same: Notes = json.loads(json.dumps(noted).replace(noted["root"], str(root)).replace(noted["name"], TASK))
    return same


def _run(runtime: Runtime, root: Path) -> list[str]:
    """Give the command that somebody would use who has no pilot."""
    options = ["--rm", "--network=none", "-v", f"{root}/{TASK}/task-io:{DATA}/task-io", "-w", "/tmp"]
    copy = ["cp", *(f"{DATA}/task-io/{name}" for name in (f"infile-{TASK}.in", f"outfile-{TASK}.out"))]
    return [runtime.name, *(["--remote"] if runtime.name == "podman" else []), "run", *options, runtime.image, *copy]


def _by_xargs(argv: Sequence[str], env: Mapping[str, str], slots: int, tasks: int, fds: Sequence[int] = ()) -> None:
    """Start commands; where one has a descriptor to write to, nobody reads."""
    names = "".join(f"{number}\n" for number in range(tasks))
    with Path(os.devnull).open("wb") as nobody:
        words = [str(nobody.fileno()) if word in map(str, fds) else word for word in argv]
        command = ["xargs", f"-P{slots}", f"-I{TASK}", *words]
        subprocess.run(
            command, input=names, text=True, stdout=nobody, env=env, pass_fds=[nobody.fileno()] if fds else (), check=True
        )


def _by_api(socket: Path, requests: Sequence[Sequence[Any]], slots: int, tasks: int) -> None:
    numbers = iter(range(tasks))
    threads = [threading.Thread(target=_worker, args=(socket, json.dumps(requests), numbers)) for _ in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _worker(socket: Path, requests: str, numbers: Iterator[int]) -> None:
    """Run containers one after the other, on one connection; `next` is atomic."""
    with closing(UnixConnection(socket, TIMEOUT)) as engine:
        for number in numbers:
            run_by_api(engine, requests, number)


def run_by_api(engine: UnixConnection, requests: str, number: int) -> None:
    """Run the container of a task. Raises AssertionError if the engine says no."""
    for request in json.loads(requests.replace(TASK, str(number))):
        _ask(engine, *request)


def _ask(engine: UnixConnection, method: str, path: str, query: Mapping[str, str], body: Any) -> None:
    engine.request(
        method, f"{path}?{urlencode(query)}", json.dumps(body) if body else None, {"Content-Type": "application/json"}
    )
    answer = engine.getresponse()
    said = answer.read()
    assert answer.status < 400, f"{method} {path}: {said!r}"
