from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import trio_pilot.task


@pytest.fixture(autouse=True)
def blocking_calls_stay_on_the_trio_thread(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[Any]]:
    # An autojump_clock jumps while a thread is at work.
    async def inline(function: Callable[..., Any], *arguments: object) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio_pilot.task, "in_thread", inline)
    return inline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # pytest-trio heeds a clock only as an argument of the test itself; this gives one to whole modules.
    for item in items:
        if item.get_closest_marker("mock_clock"):
            item.add_marker(pytest.mark.trio(run=run_on_a_mock_clock), append=False)


def run_on_a_mock_clock(main: Any, *, clock: Any = None, instruments: Any = ()) -> Any:
    del clock
    return trio.run(main, clock=MockClock(autojump_threshold=0), instruments=instruments)
