"""The limit: the same commands started with no pilot at all, as fast as this machine can."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.runtimes import Runtime
from trio_pilot.engine_leftovers import UnixConnection

BWRAP = [
    *("bwrap", "--unshare-all", "--share-net", "--die-with-parent"),
    *("--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
]
API = "/v1.40/containers"
TIMEOUT = 60.0  # seconds for an answer


def ways(runtime: Runtime) -> Sequence[str]:
    """Name the ways to start a task of that runtime without a pilot."""
    return {"process": ("xargs",), "bubblewrap": ("bwrap",), "apptainer": ("apptainer",)}.get(
        runtime.name, (f"{runtime.name} run", "Engine API")
    )


def rate(way: str, runtime: Runtime, slots: int, tasks: int, directory: Path) -> float:
    """Copy a file that often, so many at once, in that way; give the tasks a second."""
    (directory / "event").write_bytes(os.urandom(500).hex().encode())
    started = time.monotonic()
    if way == "Engine API":
        _by_api(Path(runtime.env["DOCKER_HOST"].removeprefix("unix://")), runtime.image, slots, tasks, directory)
    else:
        _by_xargs(_prefix(way, runtime, directory), runtime.env, slots, tasks, directory)
    seconds = time.monotonic() - started
    copies = list(directory.glob("copy-*"))
    assert len(copies) == tasks, f"{way}: {len(copies)} of {tasks} tasks were done"
    for copy in copies:
        copy.unlink()
    return tasks / seconds


def _prefix(way: str, runtime: Runtime, directory: Path) -> list[str]:
    """Give the command up to the task's own; in a container, the directory is at /tmp."""
    match way:
        case "xargs":
            return []
        case "bwrap":
            return [*BWRAP, "--bind", str(directory), "/tmp", "--chdir", "/tmp"]
        case "apptainer":
            options = [
                "--containall",
                "--no-eval",
                "--no-privs",
                "--no-home",
                "--bind",
                f"{directory}:/tmp",
                "--pwd",
                "/tmp",
            ]
            return ["apptainer", "--silent", "exec", *options, runtime.image]
    options = ["--rm", "--network=none", "-v", f"{directory}:/tmp", "-w", "/tmp"]
    return [runtime.name, *(["--remote"] if runtime.name == "podman" else []), "run", *options, runtime.image]


def _by_xargs(prefix: Sequence[str], env: Mapping[str, str], slots: int, tasks: int, directory: Path) -> None:
    names = "".join(f"{number}\n" for number in range(tasks))
    command = ["xargs", f"-P{slots}", "-I{}", *prefix, "cp", "event", "copy-{}"]
    subprocess.run(command, input=names, text=True, cwd=directory, env={**os.environ, **env}, check=True)


def _by_api(socket: Path, image: str, slots: int, tasks: int, directory: Path) -> None:
    numbers = iter(range(tasks))
    threads = [threading.Thread(target=_worker, args=(socket, image, numbers, directory)) for _ in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _worker(socket: Path, image: str, numbers: Iterator[int], directory: Path) -> None:
    """Run containers one after the other, on one connection; `next` is atomic."""
    with closing(UnixConnection(socket, TIMEOUT)) as engine:
        for number in numbers:
            order = {
                "Image": image,
                "Cmd": ["cp", "event", f"copy-{number}"],
                "WorkingDir": "/tmp",
                "NetworkDisabled": True,
                "HostConfig": {"Binds": [f"{directory}:/tmp"], "NetworkMode": "none"},
            }
            name = _asked(engine, "POST", f"{API}/create", order)["Id"]
            _asked(engine, "POST", f"{API}/{name}/start")
            _asked(engine, "POST", f"{API}/{name}/wait")
            _asked(engine, "DELETE", f"{API}/{name}")


def _asked(engine: UnixConnection, method: str, path: str, order: Any = None) -> Any:
    engine.request(method, path, json.dumps(order) if order else None, {"Content-Type": "application/json"})
    answer = engine.getresponse()
    content = answer.read()
    assert answer.status < 300, f"{method} {path}: {content!r}"
    return json.loads(content or "null")
