"""Calls that block for a moment, on the Trio thread or in another.

A task needs about twenty small file operations. On a healthy disk they take 0.2 ms together. In threads, each of them passes
the interpreter's lock to and fro, and the event costs 1.7 ms of CPU more (measured: concurrency 8, two cores). So they are
called on the Trio thread as long as the disk answers at once, and in threads as soon as it does not.
"""

import math
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from trio_pilot.log import LOGGER
from trio_pilot.processes import threads

T = TypeVar("T")

SMALL = 65536  # bytes that are read, written, parsed or compressed in well under a millisecond
SLOW_CALL = 0.05  # seconds; a call may take as long on a busy machine, but not because of a disk that works
SLOW_PERIOD = 10.0  # seconds after a slow call in which calls are made in threads
FINISH_TIMEOUT = 30.0  # seconds that cleaning up after a task may take; on a healthy disk it takes none


class BlockingCalls:
    """Calls functions that block, on the Trio thread or in another."""

    def __init__(self, finish_timeout: float = FINISH_TIMEOUT) -> None:
        self._finish_timeout = finish_timeout
        self._slow_until = -math.inf

    async def call(self, size: float, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that handles `size` bytes. If cancelled, wait for it: what it makes must not be left behind."""
        if not self.is_quick(size):
            return await threads.run_sync(function, *arguments)
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._call_here(function, *arguments)

    async def finish(self, size: float, function: Callable[..., T], *arguments: object) -> T | None:
        """Call a function that cleans up, cancelled or not; return None if it did not return within `finish_timeout`."""
        if self.is_quick(size):
            return self._call_here(function, *arguments)
        with trio.move_on_after(self._finish_timeout, shield=True):
            return await threads.run_sync(function, *arguments, abandon_on_cancel=True)
        LOGGER.error("%s%s not done in %g s, given up: the disk hangs", function.__name__, arguments, self._finish_timeout)
        return None

    def is_quick(self, size: float) -> bool:
        """Return whether handling `size` bytes is expected to take no noticeable time."""
        return size <= SMALL and time.monotonic() >= self._slow_until

    def _call_here(self, function: Callable[..., T], *arguments: object) -> T:
        started = time.monotonic()
        try:
            return function(*arguments)
        finally:
            if time.monotonic() - started > SLOW_CALL:
                self._slow_until = time.monotonic() + SLOW_PERIOD
