import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.lab import Lab
from trio_pilot.files import log_copies
from trio_pilot.files.blocking_calls import BlockingCalls


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    # pytest's own directories are closed to others.
    directory = Path("/tmp") / f"trio-pilot-test-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir()
    directory.chmod(0o777)
    yield directory
    subprocess.run(["chmod", "-R", "u+rwx", directory], check=False)
    shutil.rmtree(directory)


@pytest.fixture
def locked(open_to_all: Path) -> Path:
    """A directory that only root may enter."""
    (open_to_all / "locked").mkdir(mode=0)
    return open_to_all / "locked"


@pytest.fixture(autouse=True)
def no_call_goes_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # A MockClock jumps while a thread is at work.
    async def call(disk: BlockingCalls, size: float, function: Callable[..., Any], *arguments: object) -> Any:
        del disk, size
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    async def finish(disk: BlockingCalls, size: float, function: Callable[..., Any], *arguments: object) -> Any:
        del disk, size
        await trio.lowlevel.cancel_shielded_checkpoint()
        return function(*arguments)

    monkeypatch.setattr(BlockingCalls, "call", call)
    monkeypatch.setattr(BlockingCalls, "finish", finish)
    monkeypatch.setattr(log_copies, "are_files", lambda: True)  # with `pytest -s` they are not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # pytest-trio heeds a clock only as an argument of the test itself; this gives one to whole modules.
    for item in items:
        if item.get_closest_marker("mock_clock"):
            item.add_marker(pytest.mark.trio(run=run_on_a_mock_clock), append=False)


def run_on_a_mock_clock(main: Any, *, clock: Any = None, instruments: Any = ()) -> Any:
    del clock
    return trio.run(main, clock=MockClock(autojump_threshold=0), instruments=instruments)
