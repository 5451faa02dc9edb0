"""The logs of a task, its stdout and stderr, and how much of them is kept: the beginning, and while it runs the end too.

A task that writes more than that is not disturbed. Its logs are open to append: when one is cut, its writer goes on from
there. So they never take more room on the disk than that and what is written between two checks.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import trio
from trio_util import AsyncValue

from trio_pilot.files import log_copies
from trio_pilot.files.blocking_calls import BlockingCalls
from trio_pilot.files.error_summary import MOST
from trio_pilot.files.filesystem import opened
from trio_pilot.files.task_directory import TaskFiles
from trio_pilot.log import LOGGER
from trio_pilot.processes import threads

TAIL = MOST  # bytes of the end that are kept while a task runs: the error summary is taken from them

INTERVAL = 1.0  # seconds between two checks
SHOW_TIMEOUT = 30.0  # seconds to wait for a reader of this process's stdout and stderr
FAILED_SHOW_TIMEOUT = 2.0  # seconds, likewise, if showing the logs was not asked for


def open_log(path: Path) -> IO[bytes]:
    """Open a log of a task, empty. Each write goes to its current end, so it can be cut at any time."""
    return open(path, "wb", 0, opener=_open_to_append)


def _open_to_append(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND | os.O_NOFOLLOW, 0o600)


def cut(path: Path, most: int) -> None:
    """Remove the middle of a log that has grown too long. Blocks; errors are ignored.

    What is written to it at the same moment may be lost, like the rest of the middle.
    """
    with suppress(OSError):
        size = path.lstat().st_size
        if size > most + TAIL:
            with opened(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK) as log:
                tail = os.pread(log, TAIL, os.fstat(log).st_size - TAIL)
                os.ftruncate(log, most)
                os.write(log, tail)


def finish(path: Path, most: int) -> None:
    """Keep only the beginning of a log that is complete, with a note at its end. Blocks."""
    with suppress(OSError):
        facts = path.lstat()
        if facts.st_size > most and stat.S_ISREG(facts.st_mode):
            with opened(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK) as log:
                os.ftruncate(log, most)
                os.write(log, b"\n[trio-pilot: output beyond %d bytes was dropped]\n" % most)


class TaskLogs:
    """The logs of all running tasks. Keeps each from growing without limit."""

    def __init__(self, most: int, disk: BlockingCalls) -> None:
        """Keep `most` bytes of each log."""
        self._most = most
        self._disk = disk
        self._growing: set[Path] = set()
        self._some_grow = AsyncValue(False)
        self._showing = trio.CapacityLimiter(1)
        self._is_unread = False
        self._watching = trio.CancelScope()

    async def watch(self) -> None:
        """Cut the logs of running tasks once a second, until closed. Runs beside the tasks."""
        with self._watching:
            while True:
                await self._some_grow.wait_value(True)
                await trio.sleep(INTERVAL)
                for path in list(self._growing):
                    await self._disk.call(TAIL, cut, path, self._most)

    def close(self) -> None:
        """End `watch`: no task runs any more."""
        self._watching.cancel()

    @contextmanager
    def growing(self, *paths: Path) -> Iterator[None]:
        """Keep logs from growing without limit while the body runs."""
        self._growing.update(paths)
        self._some_grow.value = True
        try:
            yield
        finally:
            self._growing.difference_update(paths)
            self._some_grow.value = bool(self._growing)

    async def show(self, files: TaskFiles, *, failed: bool = False) -> None:
        """Copy the logs of a task to this process's stdout and stderr. While these are not read, only one task waits.

        Those of a task that has failed are marked, and nothing waits long for a reader: they may not be wanted.
        """
        copy = log_copies.copy_marked_logs if failed else log_copies.copy_logs
        if log_copies.are_files():
            await self._disk.finish(_size(files), copy, files)
            return
        if self._is_unread and not self._showing.available_tokens:
            return
        seconds = FAILED_SHOW_TIMEOUT if failed else SHOW_TIMEOUT
        with trio.move_on_after(seconds, shield=True) as scope:  # the output of the task must not be lost
            await threads.run_sync(copy, files, abandon_on_cancel=True, limiter=self._showing)
        if scope.cancelled_caught and not self._is_unread:
            LOGGER.warning("stdout or stderr is not read: the logs of tasks are not copied to it until it is")
        self._is_unread = scope.cancelled_caught

    def finish(self, *paths: Path) -> None:
        """Keep only the beginning of logs that are complete. Blocks."""
        for path in paths:
            finish(path, self._most)


def _size(files: TaskFiles) -> int:
    size = 0
    for path in (files.stdout, files.stderr):
        with suppress(OSError):
            size += path.lstat().st_size
    return size
