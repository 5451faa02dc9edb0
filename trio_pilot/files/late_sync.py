"""Output files whose sending takes long: those are worth having on disk for good, should the machine fail meanwhile.

A confirm takes a millisecond, a sync to disk often ten: so no output pays for one unless its sending is late, because the
broker is away, say. The file is in the task's directory until then.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from trio_pilot.files.filesystem import sync
from trio_pilot.log import LOGGER

LATE = 5.0  # seconds


class LateSync:
    """The outputs that are being sent."""

    def __init__(self) -> None:
        self._since: dict[Path, float] = {}
        self._watching = trio.CancelScope()

    async def watch(self) -> None:
        """Have outputs on disk that are late: run this beside the tasks."""
        with self._watching:
            while True:
                await trio.sleep(LATE)
                for path in [path for path, since in self._since.items() if since + LATE <= trio.current_time()]:
                    if self._since.pop(path, None) is not None:  # once is enough; it may be sent by now
                        await trio.to_thread.run_sync(_keep, path, abandon_on_cancel=True)

    def close(self) -> None:
        """End the watch: there is nothing left to send."""
        self._watching.cancel()

    @contextmanager
    def sending(self, path: Path) -> Iterator[None]:
        """Watch over an output while it is sent."""
        self._since[path] = trio.current_time()
        try:
            yield
        finally:
            self._since.pop(path, None)


def _keep(path: Path) -> None:
    try:
        with suppress(FileNotFoundError):  # it was sent at this very moment
            for one in (path, path.parent, path.parent.parent):
                sync(one)
    except OSError as error:
        LOGGER.warning("the output %s is not sent yet, and cannot be synced to disk: %s", path, error.strerror)
