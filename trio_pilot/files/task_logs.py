"""What a task says on its stdout and stderr, and how much of it is kept: the beginning, and until it has ended the end too.

A task that says more than that is not hurt by it. Its outputs are open to append: when one is cut, its writer goes on from
there. So the disk is filled with no more than what is written between two looks.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import trio
from trio_util import AsyncValue

from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.error_summary import MOST
from trio_pilot.files.filesystem import opened
from trio_pilot.files.task_directory import TaskFiles, dump
from trio_pilot.log import LOGGER

TAIL = MOST  # bytes of the end that are kept meanwhile: the last words are taken from them

INTERVAL = 1.0  # seconds between two looks
SHOW_TIMEOUT = 30.0  # seconds to wait for a reader of our own stdout and stderr


def open_log(path: Path) -> IO[bytes]:
    """Open an output of a task, empty. Each write goes to its end, wherever that is by then: so it can be cut meanwhile."""
    return open(path, "wb", 0, opener=_open_to_append)


def _open_to_append(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND, 0o666)


def cut(path: Path, most: int) -> None:
    """Take the middle out of an output that has grown too long. Blocks; failing is no reason to stop.

    What is written at this very moment may be lost, as the rest of the middle is.
    """
    with suppress(OSError):
        size = path.lstat().st_size
        if size > most + TAIL:
            with opened(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK) as output:
                tail = os.pread(output, TAIL, os.fstat(output).st_size - TAIL)
                os.ftruncate(output, most)
                os.write(output, tail)


def finish(path: Path, most: int) -> None:
    """Keep no more than the beginning of an output that is complete, and say so in it. Blocks."""
    with suppress(OSError):
        facts = path.lstat()
        if facts.st_size > most and stat.S_ISREG(facts.st_mode):
            with opened(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK) as output:
                os.ftruncate(output, most)
                os.write(output, b"\n[trio-pilot: output beyond %d bytes was dropped]\n" % most)


class TaskLogs:
    """The outputs of all running tasks, each kept from growing without end."""

    def __init__(self, most: int, disk: BlockingCalls) -> None:
        self._most = most
        self._disk = disk
        self._growing: set[Path] = set()
        self._some_grow = AsyncValue(False)
        self._showing = trio.CapacityLimiter(1)
        self._is_unread = False
        self._watching = trio.CancelScope()

    async def watch(self) -> None:
        """Look at the outputs now and then, while there are any: run this beside the tasks."""
        with self._watching:
            while True:
                await self._some_grow.wait_value(True)
                await trio.sleep(INTERVAL)
                for path in list(self._growing):
                    await self._disk.call(TAIL, cut, path, self._most)

    def close(self) -> None:
        """End the watch: there is nothing left to look at."""
        self._watching.cancel()

    @contextmanager
    def growing(self, *paths: Path) -> Iterator[None]:
        """Keep outputs from growing without end while the body runs."""
        self._growing.update(paths)
        self._some_grow.value = True
        try:
            yield
        finally:
            self._growing.difference_update(paths)
            self._some_grow.value = bool(self._growing)

    async def show(self, files: TaskFiles) -> None:
        """Copy what a task has said to our own stdout and stderr. Once nobody reads these, no other task waits for it."""
        if self._is_unread and not self._showing.available_tokens:
            return
        with trio.move_on_after(SHOW_TIMEOUT, shield=True) as patience:  # what it has made is not to be lost meanwhile
            await trio.to_thread.run_sync(dump, files, abandon_on_cancel=True, limiter=self._showing)
        if patience.cancelled_caught and not self._is_unread:
            LOGGER.warning("nobody reads our stdout or stderr: what tasks say is not copied to them until somebody does")
        self._is_unread = patience.cancelled_caught

    def finish(self, *paths: Path) -> None:
        """Keep no more than the beginning of outputs that are complete. Blocks."""
        for path in paths:
            finish(path, self._most)
