"""Calls that block for a moment, each where it hurts least.

A task needs some twenty small file operations. On a healthy disk they take 0.2 ms together; done in threads, each of them
hands the interpreter's lock to and fro, and the event costs 1.7 ms of CPU more (measured: concurrency 8, two cores). So they
are called on the Trio thread for as long as the disk answers at once, and in threads as soon as it does not.
"""

import math
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from trio_pilot.log import LOGGER

T = TypeVar("T")

SMALL = 65536  # bytes that are read, written, parsed or compressed in well under a millisecond
AT_ONCE = 0.05  # seconds; a busy machine may take so long to go on, a disk that works does not
FINISH_TIMEOUT = 30.0  # seconds that tidying up after a task may take; on a healthy disk it takes none
DISTRUST = 10.0  # seconds for which a disk is called in threads after it was slow


class BlockingCalls:
    """Calls functions that block, on the Trio thread or in another."""

    def __init__(self) -> None:
        self._slow_until = -math.inf

    async def call(self, size: float, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that handles `size` bytes. A cancelled caller waits for it: what it makes must not be left."""
        if not self.is_quick(size):
            return await trio.to_thread.run_sync(function, *arguments)
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._at_once(function, *arguments)

    async def finish(self, size: float, function: Callable[..., T], *arguments: object) -> T | None:
        """Call a function that tidies up, cancelled or not; None if it was not done in FINISH_TIMEOUT."""
        if self.is_quick(size):
            return self._at_once(function, *arguments)
        with trio.move_on_after(FINISH_TIMEOUT, shield=True):
            return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)
        LOGGER.error("the disk hangs: %s is not done with %s", function.__name__, arguments)
        return None

    def is_quick(self, size: float) -> bool:
        """Tell whether to handle so many bytes takes no time to speak of, as far as is known."""
        return size <= SMALL and time.monotonic() >= self._slow_until

    def _at_once(self, function: Callable[..., T], *arguments: object) -> T:
        started = time.monotonic()
        try:
            return function(*arguments)
        finally:
            if time.monotonic() - started > AT_ONCE:
                self._slow_until = time.monotonic() + DISTRUST
