"""Containers that are other users than the pilot: whole pilots, in this process, at each kind of engine."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from tests.support import engines
from tests.support.containers import NO_OUTPUTS
from tests.support.engines import IMAGE, SOMEBODY, Engine
from tests.support.images import make_docker_archive
from tests.support.lab import WIRE, Lab
from tests.support.servers import UnavailableError
from tests.support.services import cannot
from tests.support.users import NOBODY, as_user, needs_root
from tests.support.waiting import until
from trio_pilot.errors import ContainerRunError, TasksFailedError
from trio_pilot.runtimes import Options, Runtime, docker, podman

pytestmark = needs_root

SMALL = "without-rm:local"  # an image with three programs only


@dataclass
class Place:
    """An engine, and the user that the pilot is."""

    engine: Engine
    module: ModuleType
    user: int


PLACES = {
    "docker, root": ("docker", 0),
    "docker, nobody": ("docker", NOBODY),
    "remapped_docker, root": ("remapped_docker", 0),
    "remapped_docker, nobody": ("remapped_docker", NOBODY),
    "podman, root": ("podman", 0),
    "podman, nobody": ("podman", NOBODY),
    "rootless_podman, root": ("rootless_podman", 0),
    "rootless_podman, its user": ("rootless_podman", SOMEBODY),
}


def running(opening: AbstractContextManager[Engine]) -> Iterator[Engine]:
    try:
        with opening as engine:
            yield engine
    except UnavailableError as error:
        cannot(str(error))


@pytest.fixture(scope="module")
def remapped_docker(image: Path) -> Iterator[Engine]:
    yield from running(engines.remapped_docker(image))


@pytest.fixture(scope="module")
def rootless_podman(image: Path) -> Iterator[Engine]:
    yield from running(engines.rootless_podman(image))


@pytest.fixture(scope="module")
def small_image(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    for name in ("bin", "tmp", "etc", "proc", "dev", "sys"):
        (directory / "root" / name).mkdir(parents=True)
    for program in ("sh", "cat", "mkdir"):
        shutil.copy(image / "bin/busybox", directory / "root/bin" / program)
    make_docker_archive(directory / "root", directory / "archive.tar", SMALL, {"User": "1234:1234", "Env": ["PATH=/bin"]})
    return directory / "archive.tar"


ALWAYS = ("docker, root", "remapped_docker, nobody", "rootless_podman, its user")


@pytest.fixture(params=[name if name in ALWAYS else pytest.param(name, marks=pytest.mark.soak) for name in PLACES])
def place(request: pytest.FixtureRequest, small_image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    name, user = PLACES[request.param]
    engine: Engine = request.getfixturevalue(name)
    mode = engine.socket.stat().st_mode
    engine.socket.chmod(0o666)
    engine.directory.chmod(0o711)
    engine.load_archive(small_image)
    monkeypatch.setenv("DOCKER_HOST" if engine.name == "docker" else "CONTAINER_HOST", f"unix://{engine.socket}")
    yield Place(engine, docker if engine.name == "docker" else podman, user)
    engine.socket.chmod(mode)
    assert engine.containers() == []


@pytest.fixture
def umask() -> int:
    return 0o077


@pytest.fixture
def directory(place: Place, umask: int) -> Iterator[Path]:
    """The pilot's own directory; others may reach it."""
    before = os.umask(umask)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        os.chown(made, place.user, place.user)
        Path(made).chmod(0o755)
        yield Path(made)
    os.umask(before)


@dataclass
class At:
    """The runtime of a pilot."""

    place: Place
    options: Options

    def open(self) -> AbstractAsyncContextManager[Runtime]:
        runtime: AbstractAsyncContextManager[Runtime] = self.place.module.open_runtime(self.options)
        return runtime


class Pilot(Lab):
    """A pilot with a fake broker and a real engine."""

    async def run_at(self, place: Place, script: str, *, user: str = "1234:1234", **more: Any) -> None:
        self.runtime = At(place, Options(kill_grace=0.3, user=user, data_parent=self.directory))  # type: ignore[assignment]
        args = ("sh", "-c", f"umask 077; {script}", "{{INFILE}}", "{{OUTFILE}}", "{{DATA_HUB}}")
        with as_user(place.user):
            await self.run(**{"task_image": IMAGE, "task_args": args, **more})


@pytest.fixture
def pilot(directory: Path) -> Pilot:
    return Pilot(directory)


COPY = 'cat "$0" > "$1"'
LEAVE = 'for one in /tmp "${1%/*}" "$2"; do mkdir -p $one/a/b; echo > $one/a/b/c; echo > $one/d; done'


@pytest.mark.parametrize("umask", [0o022, 0o077])
async def test_a_task_may_be_another_user_whatever_the_umask(place: Place, pilot: Pilot) -> None:
    pilot.put("one", "two")
    await pilot.run_at(place, f"{COPY} && {LEAVE}")
    assert pilot.outputs() == ["one", "two"]
    assert list(pilot.directory.iterdir()) == []


async def test_a_user_of_an_image_without_rm_leaves_nothing(place: Place, pilot: Pilot) -> None:
    pilot.put("one")
    await pilot.run_at(place, f"{COPY} && {LEAVE}", task_image=SMALL, user="")
    assert pilot.outputs() == ["one"]
    assert list(pilot.directory.iterdir()) == []


async def test_directories_may_be_given_to_another_user(place: Place, pilot: Pilot) -> None:
    pilot.put("one")
    # As far as the engine lets root of a container do it: not where it is another user of this machine.
    give = 'for one in /tmp "${1%/*}" "$2"; do chown -R 1234 $one; done; chmod 700 "${1%/*}" /tmp; true'
    await pilot.run_at(place, f"{COPY} && {LEAVE} && {give}", user="0:0")
    assert pilot.outputs() == ["one"]
    assert list(pilot.directory.iterdir()) == []


async def test_what_an_init_container_leaves_is_removed_although_it_fails(place: Place, pilot: Pilot) -> None:
    init: dict[str, Any] = {"init_args": ("sh", "-c", "umask 077; mkdir -p $0/a/b; exit 3", "{{DATA_HUB}}")}
    with pytest.raises(ExceptionGroup) as failure:
        await pilot.run_at(place, COPY, init_image=IMAGE, **init)
    assert failure.group_contains(ContainerRunError)
    assert list(pilot.directory.iterdir()) == []


async def test_what_is_no_output_is_refused_for_any_user(place: Place, pilot: Pilot) -> None:
    pilot.put("link", "fifo", "directory", "sparse")
    with pytest.raises(TasksFailedError, match=r"^4 .*the output file"):
        await pilot.run_at(place, NO_OUTPUTS, max_attempts=1, max_concurrent_tasks=4, stop_listening_on_task_error=False)
    assert pilot.outputs() == []
    assert list(pilot.directory.iterdir()) == []


async def test_an_output_of_another_user_may_be_large(place: Place, pilot: Pilot) -> None:
    pilot.put("one")
    await pilot.run_at(place, "tr '\\0' x < /dev/zero | head -c 20000000 > $1")
    assert [WIRE.decode(body, 10**8).data for body in pilot.broker.bodies("out")] == ["x" * 20_000_000]


async def test_the_data_directory_is_closed_to_other_users(place: Place, pilot: Pilot) -> None:
    pilot.put("one")
    modes = []

    async def look() -> None:
        await until(lambda: list(pilot.directory.glob("ewms-pilot-data/*/scratch/ready")))
        facts = (pilot.directory / "ewms-pilot-data").stat()
        modes.append(stat.S_IMODE(facts.st_mode) & (0o077 if facts.st_gid == place.user else 0o007))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await pilot.run_at(place, "echo > /tmp/ready; sleep 1")
    assert modes == [0]
