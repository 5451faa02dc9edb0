"""The logs of a container, as an engine sends them: stdout and stderr in one stream of frames."""

from collections.abc import Mapping
from typing import Protocol

HEADER = 8  # bytes before each frame: the stream's number, three zeros, and the length of the frame, big-endian

# Bytes of a stream that are kept: the first, and the last. Error texts come from the end.
MOST = 64 * 2**20
MOST_TAIL = 2**20


class LogWriter(Protocol):
    """A destination of bytes."""

    def write(self, data: bytes, /) -> object:
        """Write some bytes."""


class HeadAndTail:
    """Writes the beginning and the end of a stream, and drops what is between if the stream is too long.

    Errors of the destination are raised by `close`: a stream is read to its end even if it cannot be written.
    """

    def __init__(self, destination: LogWriter, most: int = MOST, most_tail: int = MOST_TAIL) -> None:
        self._destination = destination
        self._room = most
        self._most_tail = most_tail
        self._tail = bytearray()
        self._failure: OSError | None = None

    def write(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        head, rest = data[: self._room], data[self._room :]
        self._room -= len(head)
        if head:
            self._put(head)
        self._tail += rest
        if len(self._tail) > 2 * self._most_tail:
            self._cut()

    def close(self) -> None:
        """Write the end of the stream. Raises OSError if the destination did not take all."""
        self._cut()
        if self._tail:
            self._put(bytes(self._tail))
        if self._failure:
            raise self._failure

    def _put(self, data: bytes) -> None:
        try:
            self._destination.write(data)
        except OSError as error:
            self._failure = error

    def _cut(self) -> None:
        del self._tail[: max(0, len(self._tail) - self._most_tail)]


class Demultiplexer:
    """Splits the stream of frames, in whatever pieces it comes."""

    def __init__(self, destinations: Mapping[int, LogWriter]) -> None:
        self._destinations = destinations
        self._header = b""
        self._destination: LogWriter | None = None
        self._left = 0  # bytes of the current frame that have not come yet

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        position = 0
        while position < len(data):
            if self._left:
                piece = data[position : position + self._left]
                self._left -= len(piece)
                if self._destination:
                    self._destination.write(piece)
            else:
                piece = data[position : position + HEADER - len(self._header)]
                self._read_header(piece)
            position += len(piece)

    def _read_header(self, piece: bytes) -> None:
        self._header += piece
        if len(self._header) == HEADER:
            self._destination = self._destinations.get(self._header[0])
            self._left = int.from_bytes(self._header[4:], "big")
            self._header = b""
