"""The runtimes that the contract is held against, and what it takes to try each."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import trio

from tests.support.containers import new_container
from tests.support.engines import IMAGE
from tests.support.images import bubblewrap_fault
from trio_pilot.runtimes import (
    NOT_FOUND_REASONS,
    Container,
    Options,
    Runtime,
    apptainer,
    bubblewrap,
    docker,
    podman,
    process,
)
from trio_pilot.runtimes.selection import Family
from trio_pilot.testing import FakeRuntime


@dataclass
class Subject:
    """A runtime under test."""

    name: str
    open: Callable[[Options], AbstractAsyncContextManager[Runtime]]
    directory: Path
    image: str = "/"
    a_plain_file: str = "/etc/passwd"  # in the image
    seen_scratch: str | None = "/tmp"  # where the container sees its scratch directory; None: where it is
    options: Options = field(default_factory=Options)
    seconds: float = 0.007  # that a container takes which does nothing
    adds: str = ""  # names of variables that the runtime cannot but add, as a regular expression
    takes_bytes: bool = True  # arguments and variables may be any bytes; else they must be UTF-8
    refusals: tuple[str, str] = (  # what is said of an image that is not there, and of one that is an empty file
        "must be an unpacked directory, or /: No such file or directory",
        "must be an unpacked directory, or /: Not a directory",
    )

    def container(self, *args: str, **more: Any) -> Container:
        return new_container(self.directory, args, image=self.image, **more)

    def carries(self, word: str) -> bool:
        """Whether a word can be an argument, or the value of a variable."""
        return self.takes_bytes or not any("\ud800" <= letter <= "\udfff" for letter in word)

    def seen(self, container: Container) -> str:
        """Name the scratch directory as the container sees it."""
        return self.seen_scratch or str(container.scratch)

    def moments(self) -> list[float]:
        """List moments from before it starts to after its end, in seconds."""
        count = 40 if self.seconds < 0.05 else 20
        return [number * 3 * self.seconds / count for number in range(count)]

    def repetitions(self) -> int:
        return min(200, round(5 / self.seconds))


async def pretend(container: Container) -> int:
    """Be what the tests that all runtimes pass ask for."""
    match container.args:
        case ("sh", "-c", script) if script.startswith("exit "):
            return int(script.split()[1])
        case ("sleep", seconds):
            await trio.sleep(float(seconds))
            return 0
    raise AssertionError(container.args)


@asynccontextmanager
async def open_fake(options: Options) -> AsyncIterator[FakeRuntime]:
    async with FakeRuntime(pretend, kill_seconds=options.kill_grace / 100).open() as runtime:
        yield runtime
        assert not runtime.running


def of(family: Family) -> Callable[[Options], AbstractAsyncContextManager[Runtime]]:
    return lambda options: family.open_runtime(options)


def make_fake(_request: pytest.FixtureRequest, directory: Path) -> Subject:
    return Subject("fake", open_fake, directory)


def make_process(_request: pytest.FixtureRequest, directory: Path) -> Subject:
    return Subject("process", of(process), directory, seen_scratch=None)


def make_bubblewrap(_request: pytest.FixtureRequest, directory: Path) -> Subject:
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")
    return Subject("bubblewrap", of(bubblewrap), directory)


def make_bubblewrap_image(request: pytest.FixtureRequest, directory: Path) -> Subject:
    subject = make_bubblewrap(request, directory)
    subject.image, subject.a_plain_file = str(request.getfixturevalue("image")), "/etc/this-is-the-image"
    return subject


def make_apptainer(request: pytest.FixtureRequest, directory: Path) -> Subject:
    programs = request.getfixturevalue("apptainer")
    request.getfixturevalue("monkeypatch").setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Subject(
        "apptainer",
        lambda options: apptainer.open_runtime(replace(options, data_parent=directory)),
        directory,
        image=str(request.getfixturevalue("image")),
        a_plain_file="/etc/this-is-the-image",
        seconds=0.1,
        adds="(APPTAINER|SINGULARITY)_.*|LANG|LD_LIBRARY_PATH|PROMPT_COMMAND|PS1|SHLVL",
        refusals=(
            f"must be an unpacked directory: {NOT_FOUND_REASONS[0]} ",
            f"must be an unpacked directory: {NOT_FOUND_REASONS[1]} ",
        ),
    )


def make_apptainer_sif(request: pytest.FixtureRequest, directory: Path) -> Subject:
    subject = make_apptainer(request, directory)
    subject.name, subject.image = "apptainer-sif", str(request.getfixturevalue("sif"))
    subject.refusals = "is neither a directory nor a file", "is none that apptainer knows"
    subject.open = lambda options: apptainer.open_runtime(
        replace(options, only_directories=False, build_directory=directory / "images", data_parent=directory)
    )
    return subject


def make_docker(request: pytest.FixtureRequest, directory: Path) -> Subject:
    return _at_engine(request, directory, docker, "DOCKER_HOST", adds="HOSTNAME|SHLVL")


def make_podman(request: pytest.FixtureRequest, directory: Path) -> Subject:
    return _at_engine(request, directory, podman, "CONTAINER_HOST", adds="HOSTNAME|SHLVL|TERM|container")


def _at_engine(request: pytest.FixtureRequest, directory: Path, family: ModuleType, variable: str, *, adds: str) -> Subject:
    name = family.__name__.rpartition(".")[2]
    engine = request.getfixturevalue(name)
    request.getfixturevalue("monkeypatch").setenv(variable, f"unix://{engine.socket}")
    return Subject(
        name,
        of(cast(Family, family)),
        directory,
        image=IMAGE,
        a_plain_file="/etc/this-is-the-image",
        seconds=0.2,
        adds=adds,
        takes_bytes=False,
        refusals=("must be a name, ", "must be a name, "),
    )


SUBJECTS = {
    "fake": make_fake,
    "process": make_process,
    "bubblewrap-own-root": make_bubblewrap,
    "bubblewrap-image": make_bubblewrap_image,
    "apptainer-directory": make_apptainer,
    "apptainer-sif": make_apptainer_sif,
    "docker": make_docker,
    "podman": make_podman,
}
REAL = [name for name in SUBJECTS if name != "fake"]  # the fake has no processes, files or mounts to show
ISOLATING = [name for name in REAL if name != "process"]
ENGINES = ["docker", "podman"]  # whose root is root, as far as an engine lets it
WITHOUT_ROOT = [name for name in ISOLATING if name not in ENGINES]
BUBBLEWRAPS = [name for name in REAL if name.startswith("bubblewrap")]

all_of_them = pytest.mark.parametrize("subject", SUBJECTS, indirect=True)
real_ones = pytest.mark.parametrize("subject", REAL, indirect=True)
those_without_root = pytest.mark.parametrize("subject", WITHOUT_ROOT, indirect=True)
engines = pytest.mark.parametrize("subject", ENGINES, indirect=True)
isolating_ones = pytest.mark.parametrize("subject", ISOLATING, indirect=True)
