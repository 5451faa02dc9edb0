"""Logging: the level of this package's logger, and the level of other libraries' loggers."""

import logging
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

LOGGER = logging.getLogger("trio_pilot")

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MOST_KEPT = 10_000  # lines for a reader that does not read; older lines are lost
LAST_WAIT = 2.0  # seconds for that reader to read on, at the end


class NonBlockingWriter:
    """Writes lines to a stream, without waiting for its reader: what does not fit in a pipe is written with a later line.

    Otherwise a pilot would stop, with all its events, as soon as the first 64 KiB are not read.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines = deque[bytes](maxlen=MOST_KEPT)
        self._rest = b""  # of a line whose beginning is written

    def write(self, line: str) -> None:
        """Write a line, after those that were kept."""
        self._lines.append(f"{line}\n".encode(errors="backslashreplace"))
        self.flush(0)

    def flush(self, seconds: float) -> None:
        """Write the lines that were kept, until the stream has had no room for `seconds`."""
        with suppress(OSError):  # the reader is gone
            while (self._rest or self._lines) and _has_room(self._stream, seconds):
                self._rest = self._rest or self._lines.popleft()
                self._rest = self._rest[self._put(self._rest[: select.PIPE_BUF]) :]

    def _put(self, piece: bytes) -> int:
        try:
            descriptor = self._stream.fileno()
        except OSError:  # the stream has no file
            return self._stream.write(piece.decode(errors="replace")) and len(piece)
        return os.write(descriptor, piece)


class NonBlockingHandler(logging.Handler):
    """Logs to a stream, without waiting for its reader."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.writer = NonBlockingWriter(stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after those that were kept."""
        self.writer.write(self.format(record))


def printable(text: str) -> str:
    """Escape what would do more than show: line breaks, and what a terminal obeys. Messages have texts of others in them."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class UtcFormatter(logging.Formatter):
    """Writes times as 2027-01-31T18:30:05.123Z, and each message in one line."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- of logging.Formatter
        """Format a record, but not its traceback."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def _has_room(stream: TextIO, seconds: float) -> bool:
    """Return whether the stream takes PIPE_BUF bytes (pipe(7)) within `seconds`."""
    try:
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        return bool(poll.poll(1000 * seconds))
    except (OSError, ValueError):  # it is closed, or has no file
        return True


def set_up(level: str, third_party_level: str) -> None:
    """Log to stderr: records of this package from `level` on, those of other libraries from `third_party_level` on."""
    handler = NonBlockingHandler(sys.stderr)
    handler.setFormatter(UtcFormatter(FORMAT))
    logging.basicConfig(handlers=[handler], level=third_party_level)
    LOGGER.setLevel(level)
    if logging.getLevelName(third_party_level) >= logging.WARNING:
        # pika logs a page for each lost connection; the pilot logs a line.
        logging.getLogger("pika").setLevel(logging.CRITICAL)


def finish(lines: Iterable[str] = (), wait: float = LAST_WAIT) -> None:
    """Write what was kept and then `lines`, until nothing is read for `wait` seconds."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, NonBlockingHandler)]
    writer = handlers[0].writer if handlers else NonBlockingWriter(sys.stderr)
    for line in lines:
        writer.write(line)
    writer.flush(wait)
