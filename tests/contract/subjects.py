"""The runtimes that the contract is held against, and what it takes to try each."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.runtimes_support import bubblewrap_fault, new_container
from trio_pilot.runtimes import Container, Options, Runtime, bubblewrap, process
from trio_pilot.runtimes.choice import Family
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

    def container(self, *args: str, **more: Any) -> Container:
        return new_container(self.directory, args, image=self.image, **more)

    def seen(self, container: Container) -> str:
        """Name the scratch directory as the container sees it."""
        return self.seen_scratch or str(container.scratch)


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


SUBJECTS = {
    "fake": make_fake,
    "process": make_process,
    "bubblewrap-own-root": make_bubblewrap,
    "bubblewrap-image": make_bubblewrap_image,
}
REAL = [name for name in SUBJECTS if name != "fake"]  # the fake has no processes, files or mounts to show
ISOLATING = [name for name in REAL if name != "process"]
BUBBLEWRAPS = [name for name in REAL if name.startswith("bubblewrap")]

all_of_them = pytest.mark.parametrize("subject", SUBJECTS, indirect=True)
real_ones = pytest.mark.parametrize("subject", REAL, indirect=True)
isolating_ones = pytest.mark.parametrize("subject", ISOLATING, indirect=True)
