"""Logging: one logger of ours, one level for everybody else's."""

import logging
import os
import select
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

LOGGER = logging.getLogger("trio_pilot")

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MOST_KEPT = 10_000  # lines for a reader that does not read; older ones are lost
LAST_WAIT = 2.0  # seconds for that reader to read on, at the end


class PatientWriter:
    """Does not wait for who reads what we write through a pipe: what finds no room is written with what comes later.

    A pilot would stand still otherwise, with all its events, once nobody has read its first 64 KiB.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines = deque[bytes](maxlen=MOST_KEPT)
        self._rest = b""  # of a line whose beginning is written

    def write(self, line: str) -> None:
        """Write a line, after those that were kept."""
        self._lines.append(f"{line}\n".encode(errors="backslashreplace"))
        self.flush(0)

    def flush(self, patience: float) -> None:
        """Write what was kept, for as long as there is room for more within some seconds."""
        with suppress(OSError):  # there is nobody any more who could read it
            while (self._rest or self._lines) and _has_room(self._stream, patience):
                self._rest = self._rest or self._lines.popleft()
                self._rest = self._rest[self._put(self._rest[: select.PIPE_BUF]) :]

    def _put(self, piece: bytes) -> int:
        try:
            descriptor = self._stream.fileno()
        except OSError:  # it is no file
            return self._stream.write(piece.decode(errors="replace")) and len(piece)
        return os.write(descriptor, piece)


class PatientHandler(logging.Handler):
    """Logs to a stream, patiently."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.writer = PatientWriter(stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after those that were kept."""
        self.writer.write(self.format(record))


def _has_room(stream: TextIO, patience: float) -> bool:
    """Tell whether the stream takes PIPE_BUF bytes (pipe(7)) within some seconds."""
    try:
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        return bool(poll.poll(1000 * patience))
    except (OSError, ValueError):  # closed, or no file at all
        return True


def set_up(level: str, third_party_level: str) -> None:
    """Log to stderr: ours from `level` on, other libraries' from `third_party_level` on."""
    logging.basicConfig(handlers=[PatientHandler(sys.stderr)], format=FORMAT, level=third_party_level)
    LOGGER.setLevel(level)
    if logging.getLevelName(third_party_level) >= logging.WARNING:
        # pika logs a page for each lost connection; we say the same in a line.
        logging.getLogger("pika").setLevel(logging.CRITICAL)


def finish(lines: Iterable[str] = ()) -> None:
    """Write what was kept, and these lines after it, for as long as they are read."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, PatientHandler)]
    writer = handlers[0].writer if handlers else PatientWriter(sys.stderr)
    for line in lines:
        writer.write(line)
    writer.flush(LAST_WAIT)
