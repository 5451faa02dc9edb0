"""A connection that says nothing: it ends when the engine ends.

An engine that is told to stop ends its containers first, and tells those who wait how they ended, as if it had been their
own doing. With systemd before it, new connections are accepted all the while, for its successor.
"""

from contextlib import suppress
from pathlib import Path

import trio

REQUEST = b"GET /_ping HTTP/1.1\r\nHost: engine\r\n\r\n"  # without one, it would be closed after some minutes
READ_SIZE = 4096
PAUSE = 0.5  # seconds to the next try


class RestartWatch:
    """Counts the ends of an engine."""

    def __init__(self, socket: Path) -> None:
        self.ends = 0
        self._socket = socket

    async def watch(self) -> None:
        """Watch, until cancelled."""
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
