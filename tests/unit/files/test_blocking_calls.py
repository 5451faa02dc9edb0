import math
import threading
import time

import pytest
import trio

from trio_pilot.files import blocking_calls as module
from trio_pilot.files.blocking_calls import BlockingCalls


@pytest.fixture(autouse=True)
def no_call_goes_to_a_thread() -> None:
    """Replace the fixture that keeps calls off threads: threads are what is tested here."""


async def test_small_calls_are_made_on_the_trio_thread_and_large_ones_are_not() -> None:
    disk, trio_thread = BlockingCalls(), threading.get_ident()
    assert await disk.call(module.SMALL, threading.get_ident) == trio_thread == await disk.finish(0, threading.get_ident)
    assert await disk.call(module.SMALL + 1, threading.get_ident) != trio_thread
    assert await disk.finish(math.inf, threading.get_ident) != trio_thread


async def test_after_a_slow_call_calls_are_made_in_threads() -> None:
    disk = BlockingCalls()
    await disk.call(0, time.sleep, 2 * module.SLOW_CALL)
    assert await disk.call(0, threading.get_ident) != threading.get_ident() != await disk.finish(0, threading.get_ident)


@pytest.mark.parametrize("size", [0, math.inf])
async def test_cleaning_up_is_finished_though_cancelled(size: float) -> None:
    done: list[str] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await BlockingCalls().finish(size, done.append, "it")
    assert done == ["it"]


async def test_a_disk_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    never = threading.Event()
    assert await BlockingCalls(finish_timeout=0.02).finish(math.inf, never.wait) is None
    never.set()
    assert "the disk hangs" in caplog.text
