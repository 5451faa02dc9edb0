"""The limit: start the same commands without a pilot, as fast as this machine can.

To be sure that they are the same, they are recorded: a pilot does one event with the settings of the measurement, and what
its runtime has started, or requested from an engine, is repeated here for other task directories. These are made, with their
input files, before the measurement of time begins.
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
from bench.pilot import instrumented_pilot
from bench.runtimes import Runtime
from trio_pilot.cleanup.engine_containers import UnixConnection
from trio_pilot.files import task_directory
from trio_pilot.files.task_directory import TaskFiles

TASK = "@task@"  # placeholder for the name of a task
API = "Engine API"
DATA = "/ewms-pilot-data"
TIMEOUT = 60.0  # seconds for an answer of an engine

Recording = Mapping[str, Any]  # made by `bench.recording_pilot`


def methods(runtime: Runtime) -> Sequence[str]:
    """Return the names of the ways to start a task of a runtime without a pilot."""
    return {"process": ("xargs",), "bubblewrap": ("bwrap",), "apptainer": ("apptainer",)}.get(
        runtime.name, (f"{runtime.name} run", API)
    )


def record_pilot(settings: Mapping[str, Any], env: Mapping[str, str], server: RabbitServer) -> Recording:
    """Run a pilot with these settings for one event, and return what it recorded."""
    recordings: list[Recording] = []
    Load(1).done_by(instrumented_pilot("bench.recording_pilot", settings, env, recordings.append), server)
    return recordings[0]


def rate(method: str, runtime: Runtime, recording: Recording, slots: int, tasks: int) -> float:
    """Run so many tasks, `slots` at once, by one of the methods; return the tasks per second."""
    with open_task_directories(tasks) as (root, all_files):
        adapted = adapted_to(root, recording)
        started = time.monotonic()
        if method == API:
            _run_by_api(runtime.socket, adapted["requests"], slots, tasks)
        elif method.endswith(" run"):
            _run_by_xargs(_run_command(runtime, root), {**os.environ, **runtime.env}, slots, tasks)
        else:
            _run_by_xargs(_argv_for_all(adapted, root), adapted["env"], slots, tasks, adapted["fds"])
        seconds = time.monotonic() - started
        done = sum(files.outfile_path.exists() for files in all_files)
    assert done == tasks, f"{method}: {done} of {tasks} tasks were done"
    return tasks / seconds


@contextmanager
def open_task_directories(tasks: int) -> Iterator[tuple[Path, Sequence[TaskFiles]]]:
    """Make the directories of tasks, which are named by numbers; remove them at the end."""
    with tempfile.TemporaryDirectory(prefix="trio-pilot-bench-tasks-") as directory:
        root = Path(directory)
        (root / "data-hub").mkdir()
        all_files = [TaskFiles(root / f"{each}", f"infile-{each}.in", f"outfile-{each}.out") for each in range(tasks)]
        for files, event in zip(all_files, Load(tasks).bodies(), strict=True):
            task_directory.make(files)
            task_directory.write_infile(files, event)
        yield root, all_files


def adapted_to(root: Path, recording: Recording) -> Recording:
    """Return a recording with this root directory instead of its own, and TASK instead of the name of its task."""
    text = json.dumps(recording).replace(recording["root"], str(root)).replace(recording["name"], TASK)
    adapted: Recording = json.loads(text)
    return adapted


def _argv_for_all(recording: Recording, root: Path) -> list[str]:
    """Return the command with what it reads from descriptors, which only one task can, as arguments and as files."""
    argv: list[str] = []
    words = iter(recording["argv"])
    for word in words:
        match word:
            case "--args":
                argv += recording["contents"][next(words)].split("\0")[:-1]
            case "--ro-bind-data":
                file = root / f"content-{len(argv)}"
                file.write_bytes(os.fsencode(recording["contents"][next(words)]))
                argv += ["--ro-bind", str(file)]
            case "--seccomp":  # a filter can only be read once; the kernel's time for it counts against the pilot then
                next(words)
            case _:
                argv.append(word)
    return argv


def _run_command(runtime: Runtime, root: Path) -> list[str]:
    """Return the `docker run` command that a user without a pilot would use, or that of podman."""
    options = ["--rm", "--network=none", "-v", f"{root}/{TASK}/task-io:{DATA}/task-io", "-w", "/tmp"]
    copy = ["cp", *(f"{DATA}/task-io/{name}" for name in (f"infile-{TASK}.in", f"outfile-{TASK}.out"))]
    return [runtime.name, *(["--remote"] if runtime.name == "podman" else []), "run", *options, runtime.image, *copy]


def _run_by_xargs(argv: Sequence[str], env: Mapping[str, str], slots: int, tasks: int, fds: Sequence[int] = ()) -> None:
    """Run a command for each task. A descriptor that the command writes to is that of /dev/null."""
    names = "".join(f"{number}\n" for number in range(tasks))
    with Path(os.devnull).open("wb") as null:
        words = [str(null.fileno()) if word in map(str, fds) else word for word in argv]
        command = ["xargs", f"-P{slots}", f"-I{TASK}", *words]
        subprocess.run(
            command, input=names, text=True, stdout=null, env=env, pass_fds=[null.fileno()] if fds else (), check=True
        )


def _run_by_api(socket: Path, requests: Sequence[Sequence[Any]], slots: int, tasks: int) -> None:
    numbers = iter(range(tasks))
    threads = [threading.Thread(target=_run_containers, args=(socket, json.dumps(requests), numbers)) for _ in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run_containers(socket: Path, requests: str, numbers: Iterator[int]) -> None:
    """Run containers one after the other, on one connection; threads share the iterator, whose `next` is atomic."""
    with closing(UnixConnection(socket, TIMEOUT)) as engine:
        for number in numbers:
            run_container(engine, requests, number)


def run_container(engine: UnixConnection, requests: str, number: int) -> None:
    """Run the container of a task. Raises AssertionError if the engine refuses a request."""
    for request in json.loads(requests.replace(TASK, str(number))):
        _request(engine, *request)


def _request(engine: UnixConnection, method: str, path: str, query: Mapping[str, str], body: Any) -> None:
    engine.request(
        method, f"{path}?{urlencode(query)}", json.dumps(body) if body else None, {"Content-Type": "application/json"}
    )
    answer = engine.getresponse()
    content = answer.read()
    assert answer.status < 400, f"{method} {path}: {content!r}"
