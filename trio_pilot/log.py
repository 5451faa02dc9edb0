"""Logging: one logger of ours, one level for everybody else's."""

import logging
import select
import sys
from collections import deque
from contextlib import nullcontext
from typing import TextIO

LOGGER = logging.getLogger("trio_pilot")

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MOST_KEPT = 10_000  # records for a reader that does not read; older ones are lost
LAST_WAIT = 2.0  # seconds for that reader to read on, at the end


class PatientHandler(logging.StreamHandler[TextIO]):
    """Does not wait for who reads our log through a pipe: what finds no room is written with what comes later.

    A pilot would stand still otherwise, with all its events, once nobody has read its first 64 KiB.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._kept = deque[logging.LogRecord](maxlen=MOST_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after those that were kept."""
        self._kept.append(record)
        self._write(0)

    def close(self) -> None:
        """Write what was kept, for as long as it is read."""
        with self.lock or nullcontext():
            self._write(LAST_WAIT)
        super().close()

    def _write(self, patience: float) -> None:
        while self._kept and _has_room(self.stream, patience):
            super().emit(self._kept.popleft())


def _has_room(stream: TextIO, patience: float) -> bool:
    """Tell whether the stream takes a line (of 4 KiB, if it is a pipe) within some seconds."""
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


def finish() -> None:
    """Write what was kept: whatever is said now is to come after it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PatientHandler):
            handler.close()
