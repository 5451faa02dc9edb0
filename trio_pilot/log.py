"""Logging: the level of this package's logger, and the level of other libraries' loggers."""

import logging
import os
import re
import select
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TextIO

LOGGER = logging.getLogger("trio_pilot")

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MOST_KEPT = 10_000  # lines for a reader that does not read; older lines are lost
LAST_WAIT = 2.0  # seconds for that reader to read on, at the end


# What a terminal would obey, or what makes a text look like another one: control characters, line and paragraph separators,
# and invisible characters, of which some turn the direction of writing (Unicode, "Bidirectional Character Types").
NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
INDENTED = "\n    "  # in place of a line feed: the next line does not look like one of the log


def shown(text: str) -> str:
    """Return a text with escapes in place of all that a terminal would not show as it is, except tabs and line feeds."""
    return text if text.isprintable() else NOT_SHOWN.sub(_escape, text)


def in_one_line(text: str) -> str:
    """Return a text as `shown`, with escapes for line feeds too."""
    return shown(text).replace("\n", r"\n")


def indented(text: str) -> str:
    """Return a text as `shown`, with each line after the first indented: none looks like a line of its own."""
    return shown(text).replace("\n", INDENTED)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


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


class UtcFormatter(logging.Formatter):
    """Writes times as 2027-01-31T18:30:05.123Z, and texts of others, such as message ids and errors of tasks, as `shown`.

    Text has no line feeds then, apart from that of an error: the error of a task may be a traceback. Its lines are indented.
    """

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- the name in the standard library
        """Return the line of a record, without its traceback."""
        errors = (one for one in _arguments(record) if isinstance(one, BaseException))
        if "\n" in record.message and not any("\n" in str(error) for error in errors):
            record.message = record.message.replace("\n", r"\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return indented(super().format(record))


def _arguments(record: logging.LogRecord) -> Iterable[object]:
    return record.args.values() if isinstance(record.args, Mapping) else record.args or ()


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
