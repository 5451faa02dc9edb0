import math
import threading
import time

import pytest
import trio

from trio_pilot.files import blocking_calls as module
from trio_pilot.files.blocking_calls import BlockingCalls


@pytest.fixture(autouse=True)
def no_call_goes_to_a_thread() -> None:
    """Let them: threads are what is tested here."""


async def test_small_things_are_done_on_the_trio_thread_and_large_ones_in_another() -> None:
    disk, ours = BlockingCalls(), threading.get_ident()
    assert await disk.call(module.SMALL, threading.get_ident) == ours == await disk.finish(0, threading.get_ident)
    assert await disk.call(module.SMALL + 1, threading.get_ident) != ours
    assert await disk.finish(math.inf, threading.get_ident) != ours


async def test_a_disk_that_was_slow_is_not_waited_for_on_the_trio_thread() -> None:
    disk = BlockingCalls()
    await disk.call(0, time.sleep, 2 * module.AT_ONCE)
    assert await disk.call(0, threading.get_ident) != threading.get_ident() != await disk.finish(0, threading.get_ident)


@pytest.mark.parametrize("size", [0, math.inf])
async def test_what_tidies_up_is_done_though_cancelled(size: float) -> None:
    done: list[str] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await BlockingCalls().finish(size, done.append, "it")
    assert done == ["it"]


async def test_a_disk_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "FINISH_TIMEOUT", 0.02)
    never = threading.Event()
    assert await BlockingCalls().finish(math.inf, never.wait) is None
    never.set()
    assert "the disk hangs" in caplog.text
