"""Detection of an engine's restarts, by an idle connection: it ends when the engine ends.

An engine that is shut down first stops its containers, and reports their ends as if they had ended by themselves. Under
systemd, new connections are accepted all the while, for the engine's successor.
"""

from contextlib import suppress
from pathlib import Path

import trio

REQUEST = b"GET /_ping HTTP/1.1\r\nHost: engine\r\n\r\n"  # without a request, the engine closes it after some minutes
READ_SIZE = 4096
PAUSE = 0.5  # seconds before the next connection


class RestartWatch:
    """Counts how often an engine has ended."""

    def __init__(self, socket: Path) -> None:
        self.ends = 0
        self._socket = socket

    async def watch(self) -> None:
        """Watch the engine until cancelled."""
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with await trio.open_unix_socket(self._socket) as stream:
                    await stream.send_all(REQUEST)
                    try:
                        while await stream.receive_some(READ_SIZE):
                            pass
                    finally:
                        self.ends += 1
            await trio.sleep(PAUSE)
