import threading

import pytest
import trio

from trio_pilot.errors import NoProcessError
from trio_pilot.processes import threads

pytestmark = pytest.mark.usefixtures("autojump_clock")

refuse: list[bool] = []


@pytest.fixture(autouse=True)
def refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no thread be started while `refuse` has something in it."""
    real = trio.to_thread.run_sync

    async def run_sync(call: object, **options: object) -> object:
        if refuse and refuse.pop():
            raise RuntimeError("can't start new thread")
        return await real(call, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    refuse.clear()


async def test_a_thread_is_waited_for() -> None:
    refuse.extend([True] * 20)
    begun = trio.current_time()
    assert await threads.run_sync(pow, 2, 3) == 8
    assert trio.current_time() - begun >= 20 * threads.INTERVAL - 0.01


async def test_without_a_thread_for_long_the_node_is_at_fault_for_the_moment() -> None:
    refuse.extend([True] * 1000)
    with pytest.raises(NoProcessError, match="no thread can be started"):
        await threads.run_sync(pow, 2, 3)
    assert refuse


async def test_a_function_that_has_begun_is_not_called_again() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(threading.get_ident())
        raise RuntimeError("can't start new thread")

    with pytest.raises(NoProcessError):
        await threads.run_sync(fail)
    assert len(calls) == 1


async def test_other_errors_are_raised_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        await threads.run_sync(divmod, 1, 0)
