"""Sync of output files to disk if sending them takes long, so that they survive a failure of the machine.

A broker confirms in a millisecond, a sync to disk often takes ten. So an output is synced only if its sending is late, for
example because the broker is away. Its file stays in the task's directory until it is sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from trio_pilot.files.filesystem import sync
from trio_pilot.log import LOGGER
from trio_pilot.processes import threads

LATE = 5.0  # seconds after which the sending of an output is late


class LateSync:
    """Syncs outputs whose sending is late."""

    def __init__(self) -> None:
        self._since: dict[Path, float] = {}
        self._watching = trio.CancelScope()

    async def watch(self) -> None:
        """Sync outputs that are late, until closed. Runs beside the tasks."""
        with self._watching:
            while True:
                await trio.sleep(LATE)
                for path in [path for path, since in self._since.items() if since + LATE <= trio.current_time()]:
                    if self._since.pop(path, None) is not None:  # only once, and not if it is sent by now
                        await threads.run_sync(_sync_output, path, abandon_on_cancel=True)

    def close(self) -> None:
        """End `watch`: there is nothing left to send."""
        self._watching.cancel()

    @contextmanager
    def sending(self, path: Path) -> Iterator[None]:
        """Sync an output if the body, which sends it, takes long."""
        self._since[path] = trio.current_time()
        try:
            yield
        finally:
            self._since.pop(path, None)


def _sync_output(path: Path) -> None:
    try:
        with suppress(FileNotFoundError):  # it was sent just now, and removed
            for one in (path, path.parent, path.parent.parent):
                sync(one)
    except OSError as error:
        LOGGER.warning("output %s not synced to disk (%s): a failure of this machine would lose it", path, error.strerror)
