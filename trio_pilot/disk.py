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

T = TypeVar("T")

SMALL = 65536  # bytes that are read, written, parsed or compressed in well under a millisecond
AT_ONCE = 0.05  # seconds; a busy machine may take so long to go on, a disk that works does not
DISTRUST = 10.0  # seconds for which a disk is called in threads after it was slow


class Disk:
    """Calls functions that block, on the Trio thread or in another."""

    def __init__(self) -> None:
        self._slow_until = -math.inf

    async def call(self, size: float, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that handles `size` bytes. A cancelled caller waits for it: what it makes must not be left."""
        if size > SMALL or time.monotonic() < self._slow_until:
            return await trio.to_thread.run_sync(function, *arguments)
        await trio.lowlevel.checkpoint_if_cancelled()
        started = time.monotonic()
        try:
            return function(*arguments)
        finally:
            if time.monotonic() - started > AT_ONCE:
                self._slow_until = time.monotonic() + DISTRUST
