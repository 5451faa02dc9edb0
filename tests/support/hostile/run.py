"""Run the hostile tries once, in a container of a runtime, as the task of a pilot of some user.

As a program: its arguments are the user's id, the runtime, the image, and the directory of the world around the task.
"""

import json
import os
import socket
import subprocess
import sys
import tomllib  # noqa: F401 -- settings import it later, when it can be out of reach
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import trio

from tests.support.containers import new_container
from tests.support.hostile.python_image import PYTHON
from tests.support.paths import ROOT
from trio_pilot.runtimes import ENVFILE, Limits, Mount, Runtime
from trio_pilot.settings import CONFIG_FILE, load

PROGRAM = Path(__file__).with_name("tries.py")
SECRET = "the-secret-of-the-pilot"
PIDS = 150
TIMEOUT = 120.0

Verdicts = Mapping[str, tuple[str, str]]  # by the name of a try: refused or allowed, and why


def hostile_run(user: int, runtime: str, image: str, world: Path, env: Mapping[str, str]) -> Verdicts:
    """Run all tries in a process of a user's own; return what became of each."""
    words = [sys.executable, "-m", "tests.support.hostile.run", str(user), runtime, image, str(world)]
    env = {**os.environ, **env, "PYTHONPATH": str(ROOT), "SECRET": SECRET}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: (verdict, why) for name, verdict, why in lines}


def make_world(world: Path, user: int) -> None:
    """Make the directory that a pilot was started in, and is an external directory of its tasks."""
    data = world / "ewms-pilot-data"
    for directory in (data / "data-hub", data / "another-task/task-io", data / "own"):
        directory.mkdir(parents=True)
    files = {
        world / CONFIG_FILE: f'broker_token = "{SECRET}"\n',
        world / "token": SECRET,
        world / ENVFILE: f"export EWMS_PILOT_BROKER_TOKEN={SECRET}\n",
        world / "trio-pilot-queues.sqlite": SECRET,
        world / "file": "content",
        data / "data-hub/file": "content",
        data / "another-task/task-io/infile": SECRET,
    }
    for path, content in files.items():
        path.write_text(content)
    for path in (world, *world.rglob("*")):
        os.chown(path, user, user)


async def _run(runtime: str, image: str, world: Path) -> None:
    flags = {"task_network": "none", "data_dir_parent_path_on_host": ".", "broker_token": f"@{world}/token"}
    options = load(flags, {}, world).runtime_options
    async with import_module(f"trio_pilot.runtimes.{runtime}").open_runtime(options) as opened:
        await _run_container(opened, image, world)


async def _run_container(runtime: Runtime, image: str, world: Path) -> None:
    data, hub = world / "ewms-pilot-data", "/ewms-pilot-data/data-hub"
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket() as server:
        abstract.bind(f"\0trio-pilot-{os.getpid()}")
        abstract.listen()
        server.bind(("127.0.0.1", 0))
        server.listen()
        facts = {
            "pilot": os.getpid(),
            "secret": SECRET,
            "secrets": [str(world / name) for name in (CONFIG_FILE, "token", ENVFILE, "trio-pilot-queues.sqlite")],
            "external": str(world),
            "hub": hub,
            "data": str(data),
            "scratch": "/tmp",
            "abstract": f"trio-pilot-{os.getpid()}",
            "port": server.getsockname()[1],
            "sockets": [str(path) for path in _engine_sockets()],
            "most_processes": PIDS,
        }
        args = [PYTHON, "-I", "-S", "-c", PROGRAM.read_text(), json.dumps(facts)]
        mounts = [Mount(data / "data-hub", hub), Mount(world, str(world))]
        container = replace(new_container(data / "own", args, image=image, mounts=mounts), limits=Limits(pids=PIDS))
        ended = await runtime.run(container)
    said = container.stdout.read_text()
    assert ended.code == 0, (ended, said[-500:], container.stderr.read_text()[-2000:])
    print(said, end="")


def _engine_sockets() -> Sequence[Path]:
    names = (os.environ.get(name, "") for name in ("DOCKER_HOST", "CONTAINER_HOST"))
    return [Path(name.removeprefix("unix://")) for name in names if name]


def main(user: str, runtime: str, image: str, world: str) -> None:
    if int(user) != os.geteuid():
        os.setgroups([])
        os.setresgid(int(user), int(user), int(user))
        os.setresuid(int(user), int(user), int(user))
    with chdir(world):
        trio.run(_run, runtime, image, Path(world))


if __name__ == "__main__":
    import_module(f"trio_pilot.runtimes.{sys.argv[2]}")  # with the rights to read it
    main(*sys.argv[1:])
