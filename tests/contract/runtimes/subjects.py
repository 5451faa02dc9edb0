"""The runtimes that the contract suite runs with, and what each test needs to know of them."""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.contract.runtimes import toy
from tests.support.containers import new_container
from tests.support.engines import IMAGE, Engine
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
from trio_pilot.testing import FakeRuntime


@dataclass
class Subject:
    """A runtime under test."""

    name: str
    open: Callable[[Options], AbstractAsyncContextManager[Runtime]]
    directory: Path
    image: str = "/"
    a_plain_file: str = "/etc/passwd"  # in the image
    seen_scratch: str | None = "/tmp"  # where the container sees its scratch directory; None: at its own path
    options: Options = field(default_factory=Options)
    seconds: float = 0.007  # the time that a container takes which does nothing
    adds: str = ""  # names of variables that the runtime has to add, as a regular expression
    takes_bytes: bool = True  # whether arguments and variables may be any bytes; if not, they must be UTF-8
    refusals: tuple[str, str] = (  # the errors for an image that does not exist, and for one that is an empty file
        "must be an unpacked directory, or /: No such file or directory",
        "must be an unpacked directory, or /: Not a directory",
    )

    def container(self, *args: str, **more: Any) -> Container:
        return new_container(self.directory, args, image=self.image, **more)

    def carries(self, word: str) -> bool:
        """Return whether a word can be an argument, or the value of a variable."""
        return self.takes_bytes or not any("\ud800" <= letter <= "\udfff" for letter in word)

    def seen(self, container: Container) -> str:
        """Return the scratch directory as the container sees it."""
        return self.seen_scratch or str(container.scratch)

    def moments(self) -> list[float]:
        """Return moments from before a container's start to after its end, in seconds."""
        count = 40 if self.seconds < 0.05 else 20
        return [number * 3 * self.seconds / count for number in range(count)]

    def repetitions(self) -> int:
        return min(200, round(5 / self.seconds))


async def pretend(container: Container) -> int:
    """Run the commands of the tests that all runtimes pass."""
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


def make_fake(_request: pytest.FixtureRequest, directory: Path) -> Subject:
    return Subject("fake", open_fake, directory)


def make_toy(_request: pytest.FixtureRequest, directory: Path) -> Subject:
    return Subject("toy", toy.open_runtime, directory)


def make_process(_request: pytest.FixtureRequest, directory: Path) -> Subject:
    return Subject("process", process.open_runtime, directory, seen_scratch=None)


def make_bubblewrap(_request: pytest.FixtureRequest, directory: Path) -> Subject:
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")
    return Subject("bubblewrap", bubblewrap.open_runtime, directory)


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
    subject.refusals = "is neither a directory nor a file", "is of no format that apptainer knows"
    subject.open = lambda options: apptainer.open_runtime(
        replace(options, only_directories=False, build_directory=directory / "images", data_parent=directory)
    )
    return subject


def make_docker(request: pytest.FixtureRequest, directory: Path) -> Subject:
    engine: Engine = request.getfixturevalue("docker")
    request.getfixturevalue("monkeypatch").setenv("DOCKER_HOST", f"unix://{engine.socket}")
    return Subject("docker", docker.open_runtime, directory, adds="HOSTNAME|SHLVL", **AT_ENGINE)


def make_podman(request: pytest.FixtureRequest, directory: Path) -> Subject:
    engine: Engine = request.getfixturevalue("podman")
    request.getfixturevalue("monkeypatch").setenv("CONTAINER_HOST", f"unix://{engine.socket}")
    return Subject("podman", podman.open_runtime, directory, adds="HOSTNAME|SHLVL|TERM|container", **AT_ENGINE)


AT_ENGINE: Mapping[str, Any] = {
    "image": IMAGE,
    "a_plain_file": "/etc/this-is-the-image",
    "seconds": 0.2,
    "takes_bytes": False,
    "refusals": ("must be a name, ", "must be a name, "),
}


@dataclass(frozen=True)
class Kind:
    """How a runtime is made a subject, and which parts of the contract it has to keep.

    All runtimes keep the part about exit codes and cancelling.
    """

    make: Callable[[pytest.FixtureRequest, Path], Subject]
    has_processes: bool = True  # and files: it runs real commands; if not, it is in memory
    isolates: bool = True
    root_is_root: bool = False  # as far as the engine lets it; if not, a task has no capabilities


SUBJECTS = {
    "fake": Kind(make_fake, has_processes=False, isolates=False),
    "toy": Kind(make_toy, has_processes=False, isolates=False),
    "process": Kind(make_process, isolates=False),
    "bubblewrap-own-root": Kind(make_bubblewrap),
    "bubblewrap-image": Kind(make_bubblewrap_image),
    "apptainer-directory": Kind(make_apptainer),
    "apptainer-sif": Kind(make_apptainer_sif),
    "docker": Kind(make_docker, root_is_root=True),
    "podman": Kind(make_podman, root_is_root=True),
}
ENGINES = ["docker", "podman"]
BUBBLEWRAPS = ["bubblewrap-own-root", "bubblewrap-image"]


def subjects(keeps: Callable[[Kind], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Run a test with each runtime of some kinds."""
    return pytest.mark.parametrize("subject", [name for name, kind in SUBJECTS.items() if keeps(kind)], indirect=True)


all_of_them = subjects()
real_ones = subjects(lambda kind: kind.has_processes)
isolating_ones = subjects(lambda kind: kind.isolates)
those_without_root = subjects(lambda kind: kind.isolates and not kind.root_is_root)
