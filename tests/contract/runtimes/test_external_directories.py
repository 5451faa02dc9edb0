"""Directories of this machine that containers may read: to the bottom, and with what is mounted there later."""

import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import trio

from tests.support import engines
from tests.support.containers import new_container
from tests.support.engines import IMAGE, Engine
from tests.support.servers import UnavailableError
from tests.support.services import cannot
from tests.support.users import needs_root
from tests.support.waiting import PATIENCE, until
from trio_pilot.runtimes import Container, Exit, Mount, Options, Runtime, apptainer, docker, podman

pytestmark = needs_root

OPTIONS = Options(kill_grace=0.3)
ENGINES: dict[str, Callable[[Path], AbstractContextManager[Engine]]] = {
    "docker": engines.docker,
    "remapped_docker": engines.remapped_docker,
    "podman": engines.podman,
    "rootless_podman": engines.rootless_podman,
}


def unmount(place: Path) -> None:
    """Unmount a file system, and all that is mounted in it, visible or not."""
    subprocess.run(["umount", "--lazy", place], check=True)


def written(directory: Path) -> list[Path]:
    """List what containers have written."""
    return list(directory.rglob("mine"))


def mount(place: Path, *options: str) -> None:
    """Mount a file system that any user may write; it ends with the test's directory."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", place], check=True)
    place.chmod(0o777)


@pytest.fixture(scope="module")
def machine() -> Iterator[Path]:
    """Directories as on a machine whose mounts are shared, and one that is mounted privately."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        top = Path(made)
        top.chmod(0o755)
        mount(top)
        subprocess.run(["mount", "--make-shared", top], check=True)
        mount(top / "private")
        mount(top / "private/below")
        for place in (top / "private", top / "private/below"):
            subprocess.run(["mount", "--make-private", place], check=True)
        try:
            yield top
        finally:
            unmount(top)


class Place:
    """A runtime with external directories."""

    def __init__(self, runtime: Runtime, image: str, machine: Path) -> None:
        self.runtime = runtime
        self.image = image
        self.machine = machine

    def container(self, script: str, *external: Path) -> Container:
        mounts = [Mount(path, str(path)) for path in external]
        container = new_container(self.machine / "tasks", ["sh", "-c", script], image=self.image, mounts=mounts)
        container.scratch.chmod(0o777)
        return container

    async def run(self, script: str, *external: Path) -> str:
        """Run a script; return what it writes to stdout."""
        container = self.container(script, *external)
        with trio.fail_after(PATIENCE):
            ended = await self.runtime.run(container)
        assert ended == Exit(0), container.stderr.read_text()
        return container.stdout.read_text()


@pytest.fixture(scope="module", params=[*ENGINES, "apptainer"])
def opened(request: pytest.FixtureRequest, image: Path) -> Iterator[Engine | Path]:
    request.getfixturevalue("machine")  # its mounts are there when the engine starts
    if request.param not in ENGINES:
        yield request.getfixturevalue("apptainer")
        return
    try:
        with ENGINES[request.param](image) as engine:
            yield engine
    except UnavailableError as error:
        cannot(str(error))


@pytest.fixture
async def place(opened: Engine | Path, image: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    (machine / "tasks").mkdir(exist_ok=True)
    (machine / "tasks").chmod(0o777)
    if isinstance(opened, Path):
        monkeypatch.setenv("PATH", f"{opened}:{os.environ['PATH']}")
        async with apptainer.open_runtime(Options(kill_grace=0.3, data_parent=machine / "tasks")) as runtime:
            yield Place(runtime, str(image), machine)
        return
    engine = opened
    module, variable = (docker, "DOCKER_HOST") if opened.name == "docker" else (podman, "CONTAINER_HOST")
    monkeypatch.setenv(variable, f"unix://{opened.socket}")
    async with module.open_runtime(OPTIONS) as at_engine:
        await at_engine.prepare(IMAGE)
        yield Place(at_engine, IMAGE, machine)
    assert engine.containers() == []


@pytest.fixture
def external(machine: Path) -> Iterator[Path]:
    """A directory with something mounted in it, and in that."""
    with external_in(machine) as directory:
        yield directory


@contextmanager
def external_in(top: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=top) as made:
        directory = Path(made)
        mount(directory)
        for name in ("one", "one/two", "wi th, \\some=thing"):
            mount(directory / name, "-o", "noexec,nodev")
        mount(directory / "hidden/by")
        mount(directory / "hidden")
        mount(directory / "twice")
        mount(directory / "twice")
        (directory / "later").mkdir()
        (directory / "file").write_text("seen")
        (directory / "one/two/file").write_text("seen")
        try:
            yield directory
        finally:
            unmount(directory)


WRITE = """
find {0}/ -type d > /tmp/found
while read -r one; do touch "$one/mine" && echo "$one"; done < /tmp/found
cat {0}/one/two/file
"""


async def test_an_external_directory_is_read_only_to_the_bottom(place: Place, external: Path) -> None:
    assert await place.run(WRITE.format(external), external) == "seen"
    assert written(external) == []


async def test_a_link_to_an_external_directory_is_read_only_to_the_bottom(place: Place, external: Path) -> None:
    link = external.with_name("link")
    link.symlink_to(external)
    try:
        assert await place.run(WRITE.format(link), link) == "seen"
    finally:
        link.unlink()
    assert written(external) == []


async def test_an_external_directory_may_be_below_another(place: Place, external: Path) -> None:
    assert await place.run(WRITE.format(external), external / "one", external, external / "one/two") == "seen"
    assert written(external) == []


async def test_what_is_mounted_later_is_seen(place: Place, external: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [external / name for name in ("later", "one/two/later", "one/two/later/more")]
    script = f"touch /tmp/ready; until test -e {paths[-1]}/file && test -e {paths[0]}/file; do sleep 0.05; done"
    container = place.container(script, external)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.runtime.run, container)
            await until((container.scratch / "ready").exists)
            for path in paths:
                mount(path)
                (path / "file").touch()
    assert "is not seen" not in caplog.text


async def test_a_private_external_directory_is_read_and_named(
    place: Place, machine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private = machine / "private"
    for _ in range(2):
        assert await place.run(f"touch {private}/below/mine || touch {private}/mine || echo no", private) == "no\n"
    assert caplog.text.count(f"what is mounted below '{private}' while a container runs is not seen in it") == 1


async def test_writable_mounts_beside_them_stay_writable(place: Place, external: Path, machine: Path) -> None:
    mount(machine / "writable")
    try:
        mounts = [Mount(external, str(external)), Mount(machine / "writable", "/writable", writable=True)]
        container = new_container(machine / "tasks", ["touch", "/writable/mine"], image=place.image, mounts=mounts)
        container.scratch.chmod(0o777)
        assert await place.runtime.run(container) == Exit(0)
    finally:
        unmount(machine / "writable")
